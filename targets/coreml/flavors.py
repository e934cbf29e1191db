"""Who calls the model, and with what: the flavors, as the runner and the lowering both see them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moec.compiler.common.choices import Choice


class Flavor(Choice):
    """Conventions of a model's functions."""

    DEFAULT = "default", "functions prefill and decode"
    SWIFT = "swift-transformers", "one function, as that library calls it"


TOKENS = ("input_ids", "inputIds")
"""Names of the input that holds the token ids."""

Feeds = Mapping[str, np.ndarray]


def call(flavor: Flavor, input_ids: np.ndarray, past: int) -> tuple[str, Feeds]:
    """The function to call, and its inputs.

    Args:
        flavor: Of the model.
        input_ids: New tokens [1, n].
        past: Tokens before them.
    """
    ids, new = np.ascontiguousarray(input_ids, dtype=np.int32), input_ids.shape[1]
    if flavor is Flavor.SWIFT:
        # As the library has it: the mask is one longer than the sequence, and always of one row.
        return "main", {"inputIds": ids, "causalMask": np.zeros((1, 1, 1, past + new + 1), np.float16)}
    position = np.arange(past, past + new, dtype=np.int32)
    return "decode" if new == 1 else "prefill", {"input_ids": ids, "cache_position": position}


def most_tokens(flavor: Flavor, context: int) -> int:
    """Tokens of a sequence that a cache of `context` slots holds: swift-transformers leaves the first slot empty."""
    return context - 1 if flavor is Flavor.SWIFT else context
