"""What the differences between two artifacts amount to: a verdict, a sentence, and the whole as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from moec.compiler.common.markdown import table
from moec.compiler.common.verdict import Status
from moec.compiler.report.diff import Difference

_STATUSES = frozenset(Status)
_WIDTH = 60
"""Longest text of a cell in characters."""


class Comparison(StrEnum):
    """What B is, compared with A."""

    SAME = "the same"
    MEASURED = "measured again"
    BETTER = "better"
    WORSE = "worse"
    OTHER = "different"


@dataclass(frozen=True)
class Judgement:
    """The verdict of a comparison, and a sentence that says it."""

    comparison: Comparison
    sentence: str


def judge(differences: Sequence[Difference]) -> Judgement:
    """Judge what `moec.compiler.report.diff.diff` found.

    B is worse if a gate that passes in A does not pass in B, or fails in B alone; it is better if a gate that does not
    pass in A passes in B, and none is worse. Whether other figures are better depends on what one wants.
    """
    if not differences:
        return Judgement(Comparison.SAME, "B is the same as A, in every figure.")
    gates = [item for item in differences if item.section == "gates"]
    moved = [item for item in gates if {item.first, item.second} & _STATUSES]
    lost = [item for item in moved if item.first == Status.PASS or _failed(item.second) > _failed(item.first)]
    won = [item for item in moved if item not in lost and item.second == Status.PASS]
    if lost:
        return Judgement(Comparison.WORSE, f"B is worse than A: {_gates(lost)}{_rest(differences)}.")
    if won:
        return Judgement(Comparison.BETTER, f"B is better than A: {_gates(won)}{_rest(differences)}.")
    if len(gates) == len(differences):
        return Judgement(Comparison.MEASURED, f"B is what A is; only what was measured differs{_rest(differences)}.")
    return Judgement(
        Comparison.OTHER, f"B differs from A, and no gate passes in one of them alone{_rest(differences)}."
    )


def markdown(differences: Sequence[Difference], judgement: Judgement) -> str:
    """The comparison for the description of a pull request: the sentence, and the table folded below it."""
    lines = [f"**{judgement.sentence}**"]
    if differences:
        found = table(("section", "", "A", "B", "change"), rows(differences))
        lines += ["", f"<details><summary>{len(differences)} differences</summary>", "", found, "", "</details>"]
    return "\n".join(lines)


def rows(differences: Sequence[Difference], width: int = _WIDTH) -> list[tuple[str, str, str, str, str]]:
    """Section, name, both values and the relative change of each difference, as text of at most `width` characters."""
    return [
        (
            item.section,
            item.what,
            _short(item.first, width),
            _short(item.second, width),
            "" if item.change is None else f"{item.change:+.1%}",
        )
        for item in differences
    ]


def _failed(status: Any) -> bool:
    return status in _STATUSES and Status(status).failed


def _gates(moved: Sequence[Difference]) -> str:
    return ", ".join(
        f"{item.what}: {'absent' if item.second is None else item.second} in place of "
        f"{'absent' if item.first is None else item.first}"
        for item in moved
    )


def _rest(differences: Sequence[Difference]) -> str:
    """The sections that differ, and the changes of size and perplexity, each after a semicolon."""
    parts = []
    if sections := [name for name in dict.fromkeys(item.section for item in differences) if name != "gates"]:
        parts.append(f"it differs in {', '.join(sections)}")
    for item in differences:
        if (item.section, item.what) == ("sizes", "all files") and item.change is not None:
            size = "larger" if item.change > 0 else "smaller"
            parts.append(f"it is {abs(item.change):.1%} {size}")
        numbers = isinstance(item.first, float) and isinstance(item.second, float)
        if (item.section, item.what) == ("gates", "quality: increase") and numbers:
            parts.append(f"perplexity {item.second:+.2%} in place of {item.first:+.2%}")
    return "".join(f"; {part}" for part in parts)


def _short(value: Any, width: int) -> str:
    text = "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= width else f"{text[: width - 2]}.."
