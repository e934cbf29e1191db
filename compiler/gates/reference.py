"""The reference side of a parity check: logits, router ties and experts of every token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from torch import Tensor, fx

from moec.compiler.common.errors import CheckpointError
from moec.compiler.common.progress_bars import no_progress_bars
from moec.compiler.common.threads import available_cores
from moec.compiler.frontend import architecture
from moec.compiler.frontend.adapters.lightning_attention import recompute_chunk_factors
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.frontend.scans import scans_token_by_token
from moec.compiler.gates.ties import RouterWatch
from moec.compiler.ir.interpreter import ActivationRounding, Disturbance, ProgramRunner
from moec.compiler.ir.program import EXPERTS, Program

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Logits = Callable[[np.ndarray, Sequence[int]], np.ndarray]
"""Input ids [B, T] without padding, and the lengths of the steps in which they are fed -> logits [B, T, V] float32."""

SMALL = 64 << 20
"""Bytes of weights below which one thread runs the reference faster than several."""


@contextmanager
def reference_threads(program: Program) -> Iterator[None]:
    """Let torch, which runs the reference, use one thread if the weights of `program` take less than `SMALL`.

    Else it uses no more than the cores that this process may use.

    Waking threads that sleep while they wait takes longer than the small products of such a model: the gate of capture
    took 1.2 s on two threads and 0.5 s on one (golden model). The number of threads is that of the process and is set
    back at the end. Runtimes of artifacts have threads of their own.
    """
    before, size = torch.get_num_threads(), sum(program.weights[name].nbytes for name in program.weight_names())
    torch.set_num_threads(1 if size < SMALL else min(before, available_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, eq=False)
class Trace:
    """The reference's output for a batch of sequences.

    Attributes:
        logits: [B, T, V] float32, 0 in padding.
        tied: [B, T] bool: whether a router decision of the token is a tie.
        slots: MoE layer -> [B, T, k] int32: the expert of each slot, or -1 for a dropped slot.
    """

    logits: np.ndarray
    tied: np.ndarray
    slots: Mapping[int, np.ndarray]


SAMPLED = 64
"""Number of hidden states that are kept per layer."""


class HiddenStates:
    """Keeps a sample of the hidden states that the experts of each layer get, from the longest sequence.

    Args:
        program: The Program that will run.
    """

    def __init__(self, program: Program) -> None:
        self._layers = {node: index for index, node in enumerate(program.nodes(EXPERTS))}
        self._tokens: dict[int, int] = {}
        self.rows: dict[int, Tensor] = {}
        """MoE layer -> hidden states [n, H] spread over the sequence, in the dtype of the graph."""

    def __call__(self, node: fx.Node, args: tuple[Any, ...], result: Any) -> None:  # noqa: ARG002
        """Called by the interpreter after each node (`moec.compiler.ir.interpreter.Observer`)."""
        layer = self._layers.get(node)
        if layer is not None and len(args[0]) > self._tokens.get(layer, 0):
            self._tokens[layer] = len(args[0])
            chosen = torch.linspace(0, len(args[0]) - 1, min(SAMPLED, len(args[0]))).long()
            self.rows[layer] = args[0][chosen].clone()


class Oracle:
    """Runs sequences through the reference, each without padding and in one pass from the first token.

    If rotary frequencies depend on the length of the sequence, cached keys keep the frequencies of their own step, in
    transformers as in an artifact. Then the reference is fed the same steps as the candidate.

    Args:
        program: The Program that gives ties and experts, and the logits unless `logits` is given.
        margin: `Tolerance.tie_margin`.
        logits: Another source of logits, such as the model in transformers.
        rounding: How the artifact's kernels round activations, from `Target.activation_rounding`.
    """

    def __init__(
        self,
        program: Program,
        margin: float,
        logits: Logits | None = None,
        rounding: ActivationRounding | None = None,
    ) -> None:
        self._watch = RouterWatch(program, margin)
        self.hidden = HiddenStates(program)
        self._runner = ProgramRunner(program, observer=self._observe, rounding=rounding)
        self._logits = logits
        self._by_steps = bool(program.rotary_borders)

    def _observe(self, node: fx.Node, args: tuple[Any, ...], result: Any) -> None:
        self._watch(node, args, result)
        self.hidden(node, args, result)

    def trace(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, steps: Sequence[int] = ()
    ) -> Trace:
        """Run a batch of sequences.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], 0 in left padding. Each row is run alone, without its padding.
            steps: Lengths of the steps of the case; tokens after them are fed one by one.
        """
        if attention_mask is None:
            return self._trace(input_ids, steps)
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            start = int(len(mask) - mask.sum())
            rows.append(
                _pad_left(self._trace(ids[None, start:], (steps[0] - start, *steps[1:]) if steps else ()), start)
            )
        return Trace(
            np.concatenate([row.logits for row in rows]),
            np.concatenate([row.tied for row in rows]),
            {layer: np.concatenate([row.slots[layer] for row in rows]) for layer in rows[0].slots},
        )

    def disturbed(
        self,
        disturbance: Disturbance | None,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None,
        steps: Sequence[int],
    ) -> np.ndarray:
        """Logits [B, T, V] of the Program, not of another source, with errors inside of it; the rest as in `trace`."""
        given, self._logits, self._runner.disturbance = self._logits, None, disturbance
        try:
            return self.trace(input_ids, attention_mask, steps).logits
        finally:
            self._logits, self._runner.disturbance = given, None

    def _trace(self, input_ids: np.ndarray, steps: Sequence[int]) -> Trace:
        length = input_ids.shape[1]
        if not self._by_steps or not steps:
            steps = (length,)
        steps = (*steps, *[1] * (length - sum(steps)))
        pieces: list[Trace] = []
        offset = 0
        for step in steps:
            ids = input_ids[:, offset : offset + step]
            self._watch.begin(*ids.shape)
            logits = (self._runner.decode if offset else self._runner.prefill)(ids)
            pieces.append(Trace(logits, self._watch.tied, self._watch.slots))
            offset += step
        self._runner.reset()
        trace = _joined(pieces)
        if self._logits is not None:
            trace = dataclasses.replace(trace, logits=self._logits(input_ids, steps))
        return trace


def _joined(pieces: Sequence[Trace]) -> Trace:
    """Join the traces of successive steps."""
    if len(pieces) == 1:
        return pieces[0]
    return Trace(
        np.concatenate([piece.logits for piece in pieces], axis=1),
        np.concatenate([piece.tied for piece in pieces], axis=1),
        {layer: np.concatenate([piece.slots[layer] for piece in pieces], axis=1) for layer in pieces[0].slots},
    )


def _pad_left(trace: Trace, padding: int) -> Trace:
    def pad(values: np.ndarray, fill: int) -> np.ndarray:
        widths = [(0, 0), (padding, 0)] + [(0, 0)] * (values.ndim - 2)
        return np.pad(values, widths, constant_values=fill)

    return Trace(
        pad(trace.logits, 0), pad(trace.tied, 0), {layer: pad(slots, -1) for layer, slots in trace.slots.items()}
    )


def load_source(checkpoint: Checkpoint) -> Logits:
    """Load the checkpoint in transformers: eager attention and experts, float32, on the CPU.

    Raises:
        CheckpointError: Weights that the model needs are missing.
    """
    kind, config = architecture.model_class(checkpoint.config)
    settings = {
        "config": config,
        "dtype": torch.float32,
        "attn_implementation": "eager",
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
    model: PreTrainedModel = loaded[0]
    info: Mapping[str, Any] = loaded[1]
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{checkpoint.directory}: transformers finds no weights for {missing[0]} ({len(missing)} tensors)",
            hint="these weights of the reference would be random; download the checkpoint again",
        )
    architecture.set_experts(model, "eager")
    recompute_chunk_factors(model)
    model.train(mode=False)
    decoder = architecture.text_decoder(model)

    @torch.no_grad()
    def logits(input_ids: np.ndarray, steps: Sequence[int] = ()) -> np.ndarray:
        ids = torch.from_numpy(input_ids)
        with scans_token_by_token(decoder):
            if len(steps) > 1:
                return _step_by_step(decoder, ids, steps)
            found: np.ndarray = decoder(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).logits.numpy()
        return found

    return logits


def _step_by_step(decoder: Any, ids: Tensor, steps: Sequence[int]) -> np.ndarray:
    """Logits [B, T, V] of `ids` [B, T] fed in steps of these lengths."""
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


def source_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of memory that the model in transformers takes: every weight in float32, and a quarter more for running.

    Decoded weights are in memory beside the model while it is loaded.
    """
    values = sum(torch.Size(tensor.shape).numel() for tensor in checkpoint.weights.values())
    return values * (5 if checkpoint.stored_plainly else 9)


def available_bytes() -> int:
    """Bytes of memory that this process may still take: those free on the machine, or in the container if fewer."""
    available = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    with suppress(OSError, ValueError):  # no control groups, or no limit ("max")
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available
