"""The page of the random builds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fuzz import build
from fuzz.campaign import Row
from moec.compiler.common import markdown

COLUMNS = (build.RIGHT, build.REFUSED, build.UNDECIDED, *build.FAULTS)


def alarms_share(rows: Sequence[Row]) -> float:
    """False alarms as a share of the artifacts that were built and judged."""
    judged = [row for row in rows if row.outcome.outcome in (build.RIGHT, build.ALARM, build.CAUGHT, build.SILENT)]
    return sum(row.outcome.outcome == build.ALARM for row in judged) / max(1, len(judged))


def page(rows: Sequence[Row], made_on: str) -> str:
    """The tables: by target and outcome, by what recipes ask for, and the cause of every fault."""
    seeds = ", ".join(str(seed) for seed in sorted({row.seed for row in rows}))
    commits = ", ".join(sorted({row.commit for row in rows}))
    models = len({(row.architecture.base, str(row.architecture.changes)) for row in rows})
    bases = len({row.architecture.base for row in rows})
    summary = (
        f"{len(rows)} builds of {models} architectures from {bases} families and releases, seed {seeds}; "
        f"made on commits {commits}, {made_on}. False alarms: {alarms_share(rows):.2%} of the judged artifacts."
    )
    parts = [
        summary,
        _counts(rows),
        _kinds(rows),
    ]
    faults = [row for row in rows if row.outcome.outcome in build.FAULTS]
    if faults:
        parts.append(_faults(faults))
    return "\n\n".join(parts)


def _counts(rows: Sequence[Row]) -> str:
    targets = [*dict.fromkeys(row.recipe["target"] for row in rows if row.recipe)]
    lines = []
    for target in (*targets, "all"):
        own = [row for row in rows if target in ("all", row.recipe.get("target"))]
        found = Counter(row.outcome.outcome for row in own)
        lines.append([target, str(len(own)), *(str(found[name]) for name in COLUMNS)])
    return markdown.table(["target", "builds", *COLUMNS], lines)


def _kinds(rows: Sequence[Row]) -> str:
    """Builds, and the judged ones among them, by what the recipe asks for."""
    kinds = {
        "weights as they are": lambda row: not row.recipe.get("quantize"),
        "quantized": lambda row: bool(row.recipe.get("quantize")),
        "dynamic routing": lambda row: row.recipe.get("routing", {}).get("policy", "off") != "off",
        "experts pruned": lambda row: bool(row.recipe.get("routing", {}).get("removed")),
    }
    lines = []
    for name, chosen in kinds.items():
        own = [row for row in rows if chosen(row)]
        judged = [row for row in own if row.outcome.outcome == build.RIGHT]
        errors = sorted(row.outcome.excess for row in judged)
        near = f"{errors[int(0.99 * (len(errors) - 1))]:.2f}" if errors else "-"
        lines.append([name, str(len(own)), str(len(judged)), near])
    return markdown.table(["recipe", "builds", "judged right", "99th percentile of error over allowance"], lines)


def _faults(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        cause = " ".join(row.outcome.cause.split())[:240]
        lines.append([str(row.index), row.outcome.outcome, row.recipe.get("target", ""), row.architecture.base, cause])
    return markdown.table(["build", "fault", "target", "model", "cause"], lines)
