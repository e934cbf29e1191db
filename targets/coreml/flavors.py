"""Flavors: the calling conventions of a model, for the runner and the lowering. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moec.compiler.common.choices import Choice


class Flavor(Choice):
    """Conventions of a model's functions."""

    DEFAULT = "default", "functions prefill and decode"
    SWIFT = "swift-transformers", "one function with the inputs of that library"


TOKENS = ("input_ids", "inputIds")
"""Names of the input that holds the token ids."""

Feeds = Mapping[str, np.ndarray]


def call(flavor: Flavor, input_ids: np.ndarray, past: int) -> tuple[str, Feeds]:
    """Name of the function to call, and its inputs.

    Args:
        flavor: Flavor of the model.
        input_ids: New tokens [1, n].
        past: Number of tokens before them.
    """
    ids, new = np.ascontiguousarray(input_ids, dtype=np.int32), input_ids.shape[1]
    if flavor is Flavor.SWIFT:
        # As in the library, the mask has one row and is one longer than the sequence.
        return "main", {"inputIds": ids, "causalMask": np.zeros((1, 1, 1, past + new + 1), np.float16)}
    position = np.arange(past, past + new, dtype=np.int32)
    return "decode" if new == 1 else "prefill", {"input_ids": ids, "cache_position": position}


def max_tokens(flavor: Flavor, context: int) -> int:
    """Maximum length of a sequence in a KV cache of `context` slots: swift-transformers leaves slot 0 empty."""
    return context - 1 if flavor is Flavor.SWIFT else context
