"""Savings of dynamic routing relative to the pretrained top-k: slots, expert FLOPs and weight bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from moec.compiler.ir.program import EXPERTS, Program
from moec.compiler.measure.expert_use import sequence_of
from moec.compiler.measure.paging import TOKENS, reuse_distances
from moec.passes.routing.calibrate.collect import Collector
from moec.targets.base import Capabilities, Phase

if TYPE_CHECKING:
    from moec.passes.routing.calibrate.traces import RoutingTrace

MEMORY_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Shares of the expert weights for which paging is estimated."""
MOST_USES = 100_000
"""Uses of an expert that are simulated for it, which takes about a second."""


def account(
    captured: Program,
    program: Program,
    traces: Sequence[RoutingTrace],
    capabilities: Mapping[Phase, Capabilities],
    added: Sequence[int] = (),
) -> dict[str, Any]:
    """Count the experts that `program` executes on text. The result is for JSON, and deterministic.

    Args:
        captured: The Program without routing, whose top-k is the basis of all shares.
        program: The final Program.
        traces: The routing of the final Program on the text, one entry per MoE layer.
        capabilities: Phase -> capabilities of the target; a phase that cannot skip experts executes all routed slots.
        added: Multiplications per token of what stands in for dropped experts, for each MoE layer; empty: none.

    Returns:
        `layers`: for each MoE layer the pretrained `top_k`, `kept_share`, `kept_by_k` (share of the tokens that use 0,
        1, ... slots) and `tokens` per expert. `kept_share`: share of all slots. `phases`: for each phase
        `executed_flops_share`, with what stands in for dropped experts; in decode also `bytes_per_token_share` (expert
        weights that one token reads); and `reason` if experts are not skipped. `paging`: what a token reads from disk
        if memory holds a share of the expert weights (`_paging`).
    """
    rows, kept, slots = [], np.zeros(2), 0.0
    for number, (before, trace) in enumerate(zip(captured.layers, traces, strict=True)):
        row = _layer(before.top_k, program.layers[number].num_experts, trace)
        size = _expert_size(program.nodes(EXPERTS)[number])
        weight = before.top_k * size
        kept += np.array([row["kept_share"], program.layers[number].top_k / before.top_k]) * weight
        slots += weight
        rows.append({"module": before.module, **row})
    live, routed = (float(share) for share in kept / max(slots, 1.0))
    extra = sum(added) / max(slots, 1.0)
    return {
        "kept_share": float(np.average([row["kept_share"] for row in rows], weights=[row["top_k"] for row in rows])),
        "layers": rows,
        "phases": {str(phase): _phase(phase, given, live, routed, extra) for phase, given in capabilities.items()},
        "paging": _paging(program, traces),
    }


def _paging(program: Program, traces: Sequence[RoutingTrace]) -> list[dict[str, float]]:
    """For several sizes of memory, what a token finds in it and reads from disk.

    Returns:
        `memory_share`: share of all expert weights that memory holds, those that were used last. `hit_rate`: share of
        a token's experts that are among them. `read_share`: expert weights that a token reads from disk, relative to
        all expert weights.
    """
    counts = [layer.num_experts for layer in program.layers]
    sizes = [_expert_size(node) for node in program.nodes(EXPERTS)]
    tokens = max(1, min(TOKENS, MOST_USES // max(1, sum(layer.top_k for layer in program.layers))))
    totals = [trace.indices.numel() // layer.top_k for trace, layer in zip(traces, program.layers, strict=True)]
    sequences = [sequence_of(trace, total, tokens) for trace, total in zip(traces, totals, strict=True)]
    found = reuse_distances(sequences, counts, sizes)
    whole = sum(count * size for count, size in zip(counts, sizes, strict=True))
    return [
        {
            "memory_share": share,
            "hit_rate": found.hit_rate(int(share * whole)),
            "read_share": found.read(int(share * whole)) / whole,
        }
        for share in MEMORY_SHARES
    ]


def _layer(top_k: int, experts: int, trace: RoutingTrace) -> dict[str, Any]:
    live = trace.weights != 0
    used = live.sum(-1)
    return {
        "top_k": top_k,
        "kept_share": float(used.double().mean()) / top_k,
        "kept_by_k": (torch.bincount(used, minlength=top_k + 1).double() / len(used)).tolist(),
        "tokens": torch.bincount(trace.indices[live].long(), minlength=experts).tolist(),
    }


def _expert_size(node: fx.Node) -> int:
    """Number of weights of one expert, to which its FLOPs and bytes are proportional."""
    first, second = (node.args[position] for position in (3, 5))
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    return sum(int(stack.meta["val"][0].numel()) for stack in (first, second))


def _phase(phase: Phase, given: Capabilities, live: float, routed: float, extra: float) -> dict[str, Any]:
    share = (live if given.skips_experts else routed) + extra
    found: dict[str, Any] = {"executed_flops_share": share}
    if not given.skips_experts:
        return {**found, "reason": f"logical saving only: {given.reason}"}
    # In prefill many tokens share the weights that are read, so only in decode the bytes follow the slots.
    return {**found, "bytes_per_token_share": live} if phase is Phase.DECODE else found


def token_view(program: Program, ids: Sequence[int]) -> list[tuple[int, float, tuple[int, ...]]]:
    """The number of experts that each token of a text uses.

    Args:
        program: The final Program.
        ids: Token ids of one sequence.

    Returns:
        For each token: its id, the share of the slots that it uses, and the number of used slots in each MoE layer.
    """
    collector = Collector(program)
    collector.run(np.asarray([ids], dtype=np.int64))
    used = torch.stack([(trace.weights != 0).sum(-1) for trace in collector.traces()], dim=1)
    slots = sum(row.top_k for row in program.layers)
    return [(int(index), float(row.sum()) / slots, tuple(row.tolist())) for index, row in zip(ids, used, strict=True)]
