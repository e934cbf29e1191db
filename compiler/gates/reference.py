"""The reference side of a parity check: logits, router ties and experts of every token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx

from moec.compiler.common.threads import available_cores
from moec.compiler.gates.source import Source
from moec.compiler.gates.ties import RouterWatch
from moec.compiler.ir.interpreter import ActivationRounding, Disturbance, WeightObserver
from moec.compiler.ir.lockstep import Guests, Lockstep, Step, steps_of
from moec.compiler.ir.program import EXPERTS, Program

Told = Callable[[int, int], None]
"""Called with the number of finished parts and of all parts."""

LOGITS = 192 << 20
"""Bytes of logits that are computed together."""

SMALL = 64 << 20
"""Bytes of weights below which one thread runs the reference faster than several."""


Item = TypeVar("Item")


def in_parts(items: Iterable[Item], size: Callable[[Item], int], most: int | None = None) -> list[list[Item]]:
    """Items whose logits take at most `most` bytes together, by the `size` of each, but at least one in each part.

    Args:
        items: The items, in order.
        size: Bytes of the logits of an item.
        most: `LOGITS` if None.
    """
    parts: list[list[Item]] = []
    left = 0
    for item in items:
        if not parts or size(item) > left:
            parts.append([])
            left = LOGITS if most is None else most
        parts[-1].append(item)
        left -= size(item)
    return parts


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


def sampled(hidden: Tensor) -> Tensor:
    """At most `SAMPLED` rows of hidden states [T, H], spread over the sequence."""
    chosen = torch.linspace(0, len(hidden) - 1, min(SAMPLED, len(hidden))).long()
    return hidden[chosen].clone()


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
            self.rows[layer] = sampled(args[0])


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences for the reference.

    Attributes:
        input_ids: [B, T] int64.
        attention_mask: [B, T], 0 in left padding; None: there is none.
        steps: Lengths of the steps in which the candidate is fed; tokens after them are fed one by one.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray | None = None
    steps: Sequence[int] = ()

    def rows(self) -> list[tuple[np.ndarray, tuple[int, ...], int]]:
        """The parts to run: ids without padding, their steps, and the length of the padding before them."""
        if self.attention_mask is None:
            return [(self.input_ids, tuple(self.steps), 0)]
        found = []
        for ids, mask in zip(self.input_ids, self.attention_mask, strict=True):
            start = int(len(mask) - mask.sum())
            steps = (self.steps[0] - start, *self.steps[1:]) if self.steps else ()
            found.append((ids[None, start:], steps, start))
        return found


class Oracle:
    """Runs sequences through the reference, each without padding and in one pass from the first token.

    If rotary frequencies depend on the length of the sequence, cached keys keep the frequencies of their own step, in
    transformers as in an artifact. Then the reference is fed the same steps as the candidate.

    Args:
        program: The Program that gives ties and experts, and the logits unless `source` is given.
        margin: `Tolerance.tie_margin`.
        source: The model in transformers, whose logits are taken.
        rounding: How the artifact's kernels round activations, from `Target.activation_rounding`.
        guests: Calls of experts to run beside the sequences.
        weight_observer: See `moec.compiler.ir.interpreter.WeightObserver`.
    """

    def __init__(
        self,
        program: Program,
        margin: float,
        source: Source | None = None,
        rounding: ActivationRounding | None = None,
        guests: Guests | None = None,
        weight_observer: WeightObserver | None = None,
    ) -> None:
        self._watch = RouterWatch(program, margin)
        self.hidden = HiddenStates(program)
        self._runner = Lockstep(program, rounding=rounding, guests=guests, weight_observer=weight_observer)
        self._source = source
        self._by_steps, self._vocab_size = bool(program.rotary_borders), program.vocab_size

    def trace(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, steps: Sequence[int] = ()
    ) -> Trace:
        """Run one batch of sequences; the arguments are those of `Batch`."""
        return self.traces([Batch(input_ids, attention_mask, steps)])[0][0]

    def traces(
        self, batches: Sequence[Batch], candidates: Sequence[Sequence[Step]] = (), told: Told = lambda *_: None
    ) -> tuple[list[Trace], list[np.ndarray]]:
        """Run batches of sequences together, so that each weight is read once.

        Args:
            batches: The batches. Each row of a batch with padding is run alone, without it.
            candidates: Batches to run beside them, as they are.
            told: Called with the number of finished parts of the graph, and of all parts.

        Returns:
            A trace of each batch, and the logits of each candidate.
        """
        rows = [[(ids, self._steps(ids, steps), padding) for ids, steps, padding in batch.rows()] for batch in batches]
        every = [row for own in rows for row in own]
        watched = [self._watched(ids, steps) for ids, steps, _ in every]
        logits = self._runner.run_together([*([step for step, _ in own] for own in watched), *candidates], told)
        found, others = logits[: len(every)], logits[len(every) :]
        if self._source is not None:
            found = self._source.logits([(ids, steps) for ids, steps, _ in every], apart=self._by_steps)
        traces = iter(
            _pad_left(_joined(own, [watch for _, watch in seen]), padding)
            for own, seen, (_, _, padding) in zip(found, watched, every, strict=True)
        )
        return [_stacked([next(traces) for _ in own]) for own in rows], others

    def disturbed(self, disturbances: Sequence[Disturbance | None], batch: Batch) -> Iterator[np.ndarray]:
        """Logits [B, T, V] of the Program, not of another source, with errors inside of it, for each disturbance.

        As many of them as `LOGITS` allows run together.
        """
        rows = [(self._steps(ids, steps), ids, padding) for ids, steps, padding in batch.rows()]
        size = batch.input_ids.size * self._vocab_size * 4
        for part in in_parts(disturbances, lambda _: size):
            lanes = [
                [replace(step, disturbance=own) for step in steps_of(ids, None, steps)]
                for own in part
                for steps, ids, _ in rows
            ]
            logits = iter(self._runner.run_together(lanes))
            for _ in part:
                yield np.concatenate([np.pad(next(logits), [(0, 0), (padding, 0), (0, 0)]) for _, _, padding in rows])

    def _steps(self, ids: np.ndarray, steps: Sequence[int]) -> tuple[int, ...]:
        """The steps in which `ids` [B, T] are fed."""
        if not self._by_steps or not steps:
            return (ids.shape[1],)
        return (*steps, *[1] * (ids.shape[1] - sum(steps)))

    def _watched(self, ids: np.ndarray, lengths: Sequence[int]) -> list[tuple[Step, RouterWatch]]:
        """The steps of `ids`, each with the watch that observes it."""
        found = []
        for step in steps_of(ids, None, lengths):
            watch = self._watch.of_step(*step.input_ids.shape)
            found.append((replace(step, observer=partial(self._observe, watch)), watch))
        return found

    def _observe(self, watch: RouterWatch, node: fx.Node, args: tuple[Any, ...], result: Any) -> None:
        watch(node, args, result)
        self.hidden(node, args, result)


def _joined(logits: np.ndarray, watches: Sequence[RouterWatch]) -> Trace:
    """The trace of successive steps with the `logits` [B, T, V]."""
    return Trace(
        logits,
        np.concatenate([watch.tied for watch in watches], axis=1),
        {layer: np.concatenate([watch.slots[layer] for watch in watches], axis=1) for layer in watches[0].slots},
    )


def _stacked(rows: Sequence[Trace]) -> Trace:
    """The trace of a batch from those of its rows."""
    if len(rows) == 1:
        return rows[0]
    return Trace(
        np.concatenate([row.logits for row in rows]),
        np.concatenate([row.tied for row in rows]),
        {layer: np.concatenate([row.slots[layer] for row in rows]) for layer in rows[0].slots},
    )


def _pad_left(trace: Trace, padding: int) -> Trace:
    if not padding:
        return trace

    def pad(values: np.ndarray, fill: int) -> np.ndarray:
        widths = [(0, 0), (padding, 0)] + [(0, 0)] * (values.ndim - 2)
        return np.pad(values, widths, constant_values=fill)

    return Trace(
        pad(trace.logits, 0), pad(trace.tied, 0), {layer: pad(slots, -1) for layer, slots in trace.slots.items()}
    )


AHEAD = 512 << 20
"""Bytes of logits of the windows that run together."""


class Ahead:
    """A language model that runs windows of text before they are asked for, so that each weight is read once for many.

    Args:
        program: The Program.
        windows: The windows [n, length], in the order in which they will be asked for.
    """

    def __init__(self, program: Program, windows: np.ndarray) -> None:
        self._runner = Lockstep(program)
        self._parts = iter(in_parts(windows, lambda window: window.size * program.vocab_size * 4, AHEAD))
        self._ready = deque[np.ndarray]()

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:  # noqa: ARG002
        """Logits [1, S, V] float32 of the next window, which `input_ids` [1, S] must be."""
        if not self._ready:
            self._ready.extend(self._runner.run_together([[Step(window[None])] for window in next(self._parts)]))
        return self._ready.popleft()
