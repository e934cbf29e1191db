"""Routing of a foreign file: do its own routers choose the experts that the checkpoint's choose?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.foreign.model import Choices, Unseen
from moec.compiler.foreign.probes import Probe, Probes, positions
from moec.compiler.ir.program import Program

GATE = "routing"
EXIT_CODE = 5

SLACK = 0.02
"""Share of the decisions that may differ in a quantized file beyond twice those that rounding alone changes."""


def judge(choices: Choices | Unseen, probes: Probes, expected: float | None) -> Verdict:
    """Compare the experts of every position that is no tie.

    Args:
        choices: The file's own choices.
        probes: The probes.
        expected: In a quantized file, the share of the decisions that rounding alone changes; None for a float file,
            where all must be equal.
    """
    if isinstance(choices, Unseen):
        return Verdict(GATE, Status.NOT_RUN, choices.reason, EXIT_CODE)
    found = [choices(probe.ids) for probe in probes.probes]
    return verdict(probes.probes, found, expected)


def verdict(probes: Sequence[Probe], found: Sequence[Mapping[int, np.ndarray]], expected: float | None) -> Verdict:
    """The verdict on `found`, the choices at each of `probes`; see `judge`."""
    decisions, different = counted(probes, found)
    share = sum(different.values()) / decisions if decisions else 0.0
    allowed = 0.0 if expected is None else 2 * expected + SLACK
    parts = [f"{decisions - sum(different.values())} of {decisions} decisions choose the checkpoint's experts"]
    if expected is not None:
        parts.append(f"{allowed:.1%} may differ by rounding")
    if different:
        parts.append(f"others in {', '.join(f'MoE layer {layer} ({count})' for layer, count in different.items())}")
    status = Status.NOT_RUN if not decisions else Status.PASS if share <= allowed else Status.FAIL
    figures = {"decisions": decisions, "different": different, "allowed": allowed}
    return Verdict(GATE, status, "; ".join(parts), EXIT_CODE, figures)


def counted(probes: Sequence[Probe], found: Sequence[Mapping[int, np.ndarray]]) -> tuple[int, dict[int, int]]:
    """Number of decisions, and for each MoE layer those in which other experts are chosen.

    The order of the experts of a token does not matter, nor do slots that routing dropped.
    """
    decisions, different = 0, dict[int, int]()
    for probe, chosen in zip(probes, found, strict=True):
        for layer, position in positions(probe):
            if layer not in chosen:
                continue
            want = probe.trace.slots[layer][0, position]
            decisions += 1
            if set(chosen[layer][position].tolist()) - {-1} != set(want[want >= 0].tolist()):
                different[layer] = different.get(layer, 0) + 1
    return decisions, different


def chosen_per_layer(
    candidates: Sequence[tuple[str, str]], results: Mapping[str, np.ndarray], program: Program, tokens: int
) -> dict[int, np.ndarray]:
    """MoE layer -> chosen experts [T, k]; the candidates that do not have the shapes of a router are left out."""
    found: dict[int, np.ndarray] = {}
    for indices, scores in candidates:
        layer = program.layers[min(len(found), len(program.layers) - 1)]
        given = results[scores]
        if given.shape[-1:] != (layer.num_experts,) or given.size != tokens * layer.num_experts:
            continue
        given = given.reshape(tokens, -1)
        own = results[indices] if indices else np.argsort(-given, axis=-1, kind="stable")[:, : layer.top_k]
        if own.size == tokens * layer.top_k:
            found[len(found)] = own.reshape(tokens, layer.top_k)
    return found
