"""The model in transformers, the reference of the capture gate: eager attention and experts, float32, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moec.compiler.common.errors import CheckpointError
from moec.compiler.common.progress_bars import no_progress_bars
from moec.compiler.frontend import architecture
from moec.compiler.frontend.adapters.lightning_attention import recompute_chunk_factors
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.frontend.conversion import open_weights
from moec.compiler.frontend.meta_model import model_without_weights
from moec.compiler.frontend.scans import scans_token_by_token
from moec.compiler.frontend.streamed import stream_weights
from moec.compiler.frontend.turns import in_turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EAGER = "eager"

LOADED = 256 << 20
"""Bytes of float32 weights up to which a model is loaded; a larger one reads its weights while it runs."""


class Source:
    """A model of transformers that gives the logits of sequences without padding.

    Args:
        model: The model, in eager mode.
        together: Whether its weights are read while it runs, so that sequences should run together.
    """

    def __init__(self, model: PreTrainedModel, *, together: bool) -> None:
        architecture.set_experts(model, EAGER)
        recompute_chunk_factors(model)
        model.train(mode=False)
        self._decoder: Any = architecture.text_decoder(model)
        self.together = together

    def __call__(self, input_ids: np.ndarray, steps: Sequence[int] = ()) -> np.ndarray:
        """Input ids [B, T], and the lengths of the steps in which they are fed -> logits [B, T, V] float32."""
        return self.logits([(input_ids, steps)])[0]

    def logits(self, sequences: Sequence[tuple[np.ndarray, Sequence[int]]], *, apart: bool = False) -> list[np.ndarray]:
        """The logits of several batches of sequences.

        Args:
            sequences: Input ids and lengths of the steps of each batch.
            apart: Run them one after another, since the model keeps something of the last sequence.
        """
        work = [partial(self._run, torch.from_numpy(ids), steps) for ids, steps in sequences]
        with scans_token_by_token(self._decoder):
            return in_turns(work) if self.together and not apart else [one() for one in work]

    @torch.no_grad()
    def _run(self, ids: Tensor, steps: Sequence[int]) -> np.ndarray:
        if len(steps) > 1:
            return self._step_by_step(ids, steps)
        mask = torch.ones_like(ids)
        found: np.ndarray = self._decoder(input_ids=ids, attention_mask=mask, use_cache=False).logits.numpy()
        return found

    def _step_by_step(self, ids: Tensor, steps: Sequence[int]) -> np.ndarray:
        """Logits [B, T, V] of `ids` [B, T] fed in steps of these lengths."""
        decoder = self._decoder
        # A short sequence resets dynamic rotary scaling, which otherwise keeps the frequencies of the last sequence.
        decoder(input_ids=ids[:, :1], use_cache=False)
        cache, past, pieces, offset = architecture.cache_argument(decoder), None, list[np.ndarray](), 0
        for step in steps:
            stop = offset + step
            mask = torch.ones_like(ids[:, :stop])
            out = decoder(input_ids=ids[:, offset:stop], attention_mask=mask, use_cache=True, **{cache: past})
            past, offset = out[cache], stop
            pieces.append(out.logits.numpy())
        return np.concatenate(pieces, axis=1)


def open_source(checkpoint: Checkpoint, most: int = LOADED) -> Source:
    """The model of a checkpoint; one of more than `most` bytes in float32 reads its weights while it runs.

    Raises:
        CheckpointError: Weights that the model needs are missing.
    """
    values = sum(torch.Size(tensor.shape).numel() for tensor in checkpoint.weights.values())
    return load_source(checkpoint) if 4 * values <= most else stream_source(checkpoint)


def load_source(checkpoint: Checkpoint) -> Source:
    """Load the model into memory, by the code of transformers alone.

    Raises:
        CheckpointError: Weights that the model needs are missing.
    """
    kind, config = architecture.model_class(checkpoint.config)
    settings = {
        "config": config,
        "dtype": torch.float32,
        "attn_implementation": EAGER,
        "trust_remote_code": checkpoint.trust_remote_code,
        "local_files_only": True,
        "output_loading_info": True,
    }
    with no_progress_bars():
        if checkpoint.stored_plainly:
            loaded: Any = kind.from_pretrained(checkpoint.directory, **settings)
        else:
            # Decoded weights under the names in the files, which transformers converts as usual.
            weights = {name: tensor.read().to(torch.float32) for name, tensor in checkpoint.weights.items()}
            loaded = kind.from_pretrained(None, state_dict=weights, **settings)
    info: Mapping[str, Any] = loaded[1]
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{checkpoint.directory}: transformers finds no weights for {missing[0]} ({len(missing)} tensors)",
            hint="these weights of the reference would be random; download the checkpoint again",
        )
    return Source(loaded[0], together=False)


def stream_source(checkpoint: Checkpoint) -> Source:
    """Build the model without its large weights, which are read from the files while it runs.

    Names and conversions are those of transformers, applied by `moec.compiler.frontend.conversion`.

    Raises:
        CheckpointError: Weights that the model needs are missing.
    """
    model, _ = model_without_weights(checkpoint, torch.float32, attention=EAGER, experts=EAGER)
    stream_weights(model, open_weights(checkpoint, model).store)
    return Source(model, together=True)
