"""Short sequences at which the reference chooses each expert, and what the file answers to them.

A file of another exporter has no handle on its routers. So tokens are searched: single tokens first, since no earlier
token disturbs them, then short sequences. A probe counts for an expert if the reference chooses it at a position where
no router decision is a tie. Experts that no probe reaches are named as not tried.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moec.compiler.gates.reference import Oracle, Trace
from moec.compiler.ir.program import Program

WANTED = 6
"""Positions that are searched for each expert, so that faults of others at a few of them do not accuse it."""

SINGLES, WINDOWS, LENGTH, BATCH = 1024, 256, 8, 64
"""Single tokens and windows that are tried, tokens of a window, and sequences that the reference runs at a time."""


@dataclass(frozen=True, eq=False)
class Probe:
    """One sequence: its token ids [1, T], and the reference's logits, ties and experts for it."""

    ids: np.ndarray
    trace: Trace


@dataclass(frozen=True)
class Probes:
    """The probes, and how often each expert was reached.

    Attributes:
        probes: The sequences.
        reached: MoE layer -> number of positions that use each expert, [E], at most about `WANTED`.
    """

    probes: Sequence[Probe]
    reached: Mapping[int, np.ndarray] = field(default_factory=dict)


def search(program: Program, oracle: Oracle, *, seed: int = 0, seconds: float = 60.0) -> Probes:
    """Find probes for the experts of every layer.

    Args:
        program: The checkpoint's Program.
        oracle: Its reference, with the margin of ties.
        seed: Seed of the token ids.
        seconds: After this time no further sequences are tried.
    """
    reached = {row.index: np.zeros(row.num_experts, np.int64) for row in program.layers}
    chosen, started = list[Probe](), time.perf_counter()
    for ids in _candidates(program.vocab_size, np.random.default_rng(seed)):
        trace = oracle.trace(ids)
        for row in range(len(ids)):
            probe = Probe(ids[row : row + 1], _row(trace, row))
            if _adds(probe, reached):
                chosen.append(probe)
        done = all((counts >= WANTED).all() for counts in reached.values())
        if done or time.perf_counter() - started > seconds:
            break
    return Probes(chosen, reached)


def _candidates(vocab_size: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of token ids [B, T]: different single tokens, then windows of random tokens."""
    singles = random.permutation(vocab_size)[:SINGLES].astype(np.int64)
    for start in range(0, len(singles), BATCH):
        yield singles[start : start + BATCH, None]
    for _ in range(0, WINDOWS, BATCH):
        yield random.integers(0, vocab_size, (BATCH, LENGTH), dtype=np.int64)


def _row(trace: Trace, row: int) -> Trace:
    own = slice(row, row + 1)
    return Trace(trace.logits[own], trace.tied[own], {layer: slots[own] for layer, slots in trace.slots.items()})


def _adds(probe: Probe, reached: Mapping[int, np.ndarray]) -> bool:
    """Whether a probe reaches an expert that has too few positions yet; if so, its positions are counted."""
    counts = {layer: np.zeros_like(own) for layer, own in reached.items()}
    for layer, position in positions(probe):
        experts = probe.trace.slots[layer][0, position]
        counts[layer][experts[experts >= 0]] += 1
    if not any(((reached[layer] < WANTED) & (own > 0)).any() for layer, own in counts.items()):
        return False
    for layer, own in counts.items():
        reached[layer][:] += own
    return True


def positions(probe: Probe) -> Iterator[tuple[int, int]]:
    """Each MoE layer with each position of a probe at which no router decision so far is a tie."""
    untied = ~np.logical_or.accumulate(probe.trace.tied[0])
    for layer in probe.trace.slots:
        yield from ((layer, int(position)) for position in np.flatnonzero(untied))
