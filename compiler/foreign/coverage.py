"""Coverage of a foreign file: does every expert compute what the checkpoint's does, as far as tokens reach it?

The file is run on the probes. In a float file, an expert is right if the logits of a position that uses it are within
the tolerance of parity: a wrong expert changes every position that uses it. In a quantized file the rounding of
activations changes all logits, and experts of some tokens, so half of the positions must be within a limit: a few times
the median of all positions if the reference has the values of the codes, else of what rounding the weights alone causes
(`precision.rounded_like`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moec.compiler.common.progress import Progress
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.foreign.probes import Probes, positions
from moec.compiler.gates.compare import position_errors
from moec.compiler.gates.coverage import EXIT_CODE, GATE
from moec.compiler.ir.program import MoeLayer, Program
from moec.compiler.text.perplexity import kl_divergence, log_softmax
from moec.targets.runners import Runner

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Logits [1, T, V] of a candidate and of the reference -> how far apart they are at each position, [T]."""

LISTED = 6
FAR = 4.0
"""How many times the divergence of rounding alone the median of an expert may be."""


def relative(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Largest difference of each position relative to its own largest logit: the distance of float files."""
    rows = [position_errors(got[:, [at]], want[:, [at]], np.ones((1, 1), bool))[0] for at in range(want.shape[1])]
    return np.concatenate(rows)


def divergence(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """KL(reference || candidate) of each position in nats: the distance of quantized files; infinite for NaN."""
    found = [kl_divergence(log_softmax(want[0, [at]]), log_softmax(got[0, [at]])) for at in range(want.shape[1])]
    values: np.ndarray = np.nan_to_num(np.asarray(found, dtype=np.float64).reshape(-1), nan=np.inf)
    return values


@dataclass(frozen=True)
class Limits:
    """How the experts of a file are judged.

    Attributes:
        limit: The largest that an expert may have.
        share: The share of an expert's positions that must be within it: 0 means one of them.
        text: What the distance is, for people.
    """

    limit: float
    share: float
    text: str


def float_limits(limit: float) -> Limits:
    """The limits of a float file: `limit` is the tolerance of parity."""
    return Limits(limit, 0.0, f"|difference| of max |logit| (limit {limit:.0e})")


def decoded_limits(distances: Sequence[np.ndarray], most: float) -> Limits:
    """The limits of a file of codes whose values the reference has.

    Args:
        distances: The distances of all positions, most of which do not use a wrong expert.
        most: The largest limit, for a file in which everything is wrong.
    """
    usual = float(np.median(np.concatenate(distances))) if distances else 0.0
    limit = min(most, FAR * max(usual, 1e-3))
    return Limits(limit, 0.5, f"|difference| of max |logit| (limit {limit:.0e}, {FAR:g} times the usual one)")


def quantized_limits(rounded: Runner, probes: Probes) -> Limits:
    """The limits of a quantized file: `rounded` runs the checkpoint with its weights rounded as coarsely."""
    every = [divergence(rounded.prefill(probe.ids), probe.trace.logits) for probe in probes.probes]
    usual = float(np.quantile(np.concatenate(every), 0.9)) if every else 0.0
    limit = FAR * max(usual, 1e-4)
    return Limits(limit, 0.5, f"KL in nats (limit {limit:.2g}, {FAR:g} times that of rounding alone)")


def run_probes(runner: Runner, probes: Probes, distance: Distance, progress: Progress) -> list[np.ndarray]:
    """The distance of every position of every probe."""
    found = []
    for done, probe in enumerate(probes.probes):
        progress(GATE, done, len(probes.probes))
        found.append(distance(runner.prefill(probe.ids), probe.trace.logits))
    runner.reset()
    progress(GATE, len(probes.probes), len(probes.probes))
    return found


def judge(
    program: Program, probes: Probes, distances: list[np.ndarray], limits: Limits, minimum: float = 1.0
) -> Verdict:
    """Fail if an expert is wrong. If too few experts were tried, the gate has not run, since it proves nothing.

    Args:
        program: The checkpoint's Program.
        probes: The probes.
        distances: What `run_probes` returned.
        limits: How to judge.
        minimum: Share of all experts that must have been tried.
    """
    seen = _by_expert(probes, distances)
    wrong, idle, tried, total = dict[str, list[int]](), dict[str, list[int]](), 0, 0
    for row in program.layers:
        own = {expert: seen[row.index, expert] for expert in range(row.num_experts) if (row.index, expert) in seen}
        tried, total = tried + len(own), total + row.num_experts
        if bad := [expert for expert, values in own.items() if not _is_right(values, limits)]:
            wrong[row.module] = bad
        if rest := sorted(set(range(row.num_experts)) - set(own)):
            idle[row.module] = rest
    parts = [f"{tried - sum(map(len, wrong.values()))} of {total} experts are right at tokens that choose them"]
    worst = max((float(np.median(values)) for values in seen.values()), default=0.0)
    parts.append(f"largest median {worst:.1e} {limits.text}")
    if wrong:
        parts.append(f"tokens that use them are wrong: {_listing(wrong)}")
    if idle:
        parts.append(f"not tried, no token reached them: {_listing(idle)}")
    status = Status.FAIL if wrong else Status.PASS if total and tried >= minimum * total else Status.NOT_RUN
    figures = {
        "minimum": minimum,
        "limit": limits.limit,
        "tried": tried,
        "experts": total,
        "wrong": wrong,
        "not_tried": idle,
        "steps": {"tokens that were searched": _usage(program.layers, probes)},
    }
    return Verdict(GATE, status, "; ".join(parts), EXIT_CODE, figures)


def _is_right(values: list[float], limits: Limits) -> bool:
    within = np.asarray(values) <= limits.limit
    return bool(within.any()) if limits.share == 0 else float(within.mean()) >= limits.share


def _by_expert(probes: Probes, distances: list[np.ndarray]) -> dict[tuple[int, int], list[float]]:
    """MoE layer and expert -> the distances of the positions that use it and are not ties."""
    found: dict[tuple[int, int], list[float]] = {}
    for probe, own in zip(probes.probes, distances, strict=True):
        for layer, position in positions(probe):
            for expert in probe.trace.slots[layer][0, position]:
                if expert >= 0:
                    found.setdefault((layer, int(expert)), []).append(float(own[position]))
    return found


def _usage(layers: tuple[MoeLayer, ...], probes: Probes) -> dict[str, object]:
    counts = {row.index: probes.reached[row.index] for row in layers}
    total = sum(len(own) for own in counts.values()) or 1
    return {
        "share": float(sum((own > 0).sum() for own in counts.values()) / total),
        "layers": [{"layer": row.index, "module": row.module, "tokens": counts[row.index].tolist()} for row in layers],
    }


def _listing(experts: Mapping[str, list[int]]) -> str:
    rows = [f"{module} {', '.join(map(str, found))}" for module, found in experts.items()]
    return "; ".join(rows[:LISTED]) + (f"; and {len(rows) - LISTED} more layers" if len(rows) > LISTED else "")
