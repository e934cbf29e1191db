"""`moec estimate ARTIFACT --memory 6GB`: what a token reads from disk if memory holds only a part of the experts.

Memory holds all dense weights, and in the rest of it the experts that were used last. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.common.artifact import read_manifest
from moec.compiler.measure.expert_use import ExpertUse
from moec.compiler.measure.paging import Layers, ReuseDistances, drawn_sequence, reuse_distances
from moec.targets import get_target
from moec.targets.paging import WeightSizes

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Limits that are estimated if none is given, as shares of all weights."""
PROMPT, ANSWER = 32, 64
"""Tokens of the start of a run, when nothing is in memory: those that fill it, and those whose reads are estimated."""
RECORDED = "the experts that tokens of the calibration text used one after another"
COUNTED = "each expert's share of the calibration text; tokens are assumed to be independent of each other"
UNIFORM = "no routing is recorded in the artifact: all experts are assumed to be equally likely, which no model does"


@dataclass(frozen=True, eq=False)
class Routing:
    """A sequence of routed experts, and where it is from.

    Attributes:
        layers: The sequence.
        source: "recorded", "counts" or "uniform".
        basis: The same in words.
    """

    layers: Layers
    source: str
    basis: str


def estimate_paging(directory: Path, limits: Sequence[int], packed: Path | None = None) -> dict[str, Any]:
    """The estimate for several limits, as a mapping for JSON.

    Args:
        directory: The artifact.
        limits: Bytes of memory for weights; empty: shares of all weights.
        packed: Its packed weights, if there are any, whose sizes are those that are read.

    Raises:
        ArtifactError: The directory is not an artifact, or damaged.
        UsageError: Its experts cannot be left on the disk.
    """
    manifest = read_manifest(directory)
    sizes = get_target(str(manifest.get("recipe", {}).get("target"))).weight_sizes(packed or directory)
    routing = routing_of(directory, manifest, sizes.counts)
    found, starts = reuse_distances(routing.layers, sizes.counts, sizes.experts), _starts(routing.layers, sizes)
    wanted = limits or [int(share * sizes.total) for share in SHARES]
    return {
        "artifact": str(directory),
        "dense_bytes": sizes.dense,
        "expert_bytes": sizes.total - sizes.dense,
        "least_bytes": least_memory(sizes, manifest),
        "routing": {"source": routing.source, "basis": routing.basis, "tokens": found.tokens},
        "token_uses_bytes": found.used,
        "limits": [_limit(memory, sizes, found, starts) for memory in wanted],
    }


def least_memory(sizes: WeightSizes, manifest: Mapping[str, Any]) -> int:
    """Bytes below which not even one token's experts of each layer fit beside the dense weights."""
    slots = [int(row["top_k"]) for row in manifest["model"]["moe_layers"]]
    return sizes.dense + max(size * count for size, count in zip(sizes.experts, slots, strict=True))


def _starts(layers: Layers, sizes: WeightSizes) -> list[ReuseDistances]:
    """The sequence cut in runs of `PROMPT` and `ANSWER` tokens, each of which begins with nothing in memory."""
    length = PROMPT + ANSWER
    runs = [[row[start : start + length] for row in layers] for start in range(0, len(layers[0]) - length + 1, length)]
    share = (PROMPT + 0.5) / length
    return [reuse_distances(run, sizes.counts, sizes.experts, share, from_start=True) for run in runs]


def _limit(memory: int, sizes: WeightSizes, found: ReuseDistances, starts: Sequence[ReuseDistances]) -> dict[str, Any]:
    room = memory - sizes.dense
    return {
        "memory": memory,
        "fits": room >= 0,
        "hit_rate": found.hit_rate(room),
        "bytes_per_token": found.read(room),
        "bytes_per_token_at_start": float(np.mean([run.read(room) for run in starts])) if starts else None,
        "hit_rate_by_layer": list(found.hit_rates(room)),
    }


def routing_of(directory: Path, manifest: Mapping[str, Any], counts: Sequence[int]) -> Routing:
    """The best that the artifact has recorded of its routing: a sequence, counts, or nothing.

    Raises:
        ArtifactError: What it has recorded is damaged.
    """
    use, slots = ExpertUse.read(directory), [float(row["top_k"]) for row in manifest["model"]["moe_layers"]]
    if use is None or list(use.shapes.values()) != list(counts):
        return Routing(drawn_sequence([np.ones(count) for count in counts], slots), "uniform", UNIFORM)
    if all(layer.sequence for layer in use.layers):
        return Routing([layer.sequence for layer in use.layers], "recorded", RECORDED)
    tokens = use.length * len(use.layers[0].tokens)
    totals = [layer.tokens.sum(0) for layer in use.layers]
    return Routing(drawn_sequence(totals, [row.sum() / tokens for row in totals]), "counts", COUNTED)


def describe_paging(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The estimate as rows for people."""
    rows = [
        ("dense weights", f"{found['dense_bytes'] / 1e6:.1f} MB, always in memory"),
        (
            "experts",
            f"{found['expert_bytes'] / 1e6:.1f} MB, of which a token uses {found['token_uses_bytes'] / 1e6:.1f}",
        ),
        ("least memory", f"{found['least_bytes'] / 1e6:.1f} MB for weights"),
        ("routing", found["routing"]["basis"]),
    ]
    for row in found["limits"]:
        layers = row["hit_rate_by_layer"]
        text = "the dense weights do not fit"
        if row["fits"]:
            text = (
                f"a token reads {row['bytes_per_token'] / 1e6:.1f} MB from disk; {row['hit_rate']:.1%} of its experts "
                f"are in memory ({min(layers):.1%} to {max(layers):.1%} by layer)"
            )
            if row["bytes_per_token_at_start"] is not None:
                begun = f"{row['bytes_per_token_at_start'] / 1e6:.1f} MB"
                text += f"; at the start of a run, {begun} ({ANSWER} tokens after a prompt of {PROMPT})"
        rows.append((f"with {row['memory'] / 1e6:.0f} MB", text))
    return rows
