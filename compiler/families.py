"""What works for which model family: tiny random checkpoints, captured, proven and, if asked, lowered.

`moec families --check --target onnx -o docs/families.md` writes the page of the documentation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.compiler.errors import MoecError, OutputError
from moec.compiler.recipe import Recipe, unknown
from moec.compiler.tiny_models import family_names, write_tiny_checkpoint

if TYPE_CHECKING:
    from moec.compiler.gates.verdict import Verdict
    from moec.targets.base import Progress

_INTRODUCTION = """# Model families

One row for each family that moec has a tiny random model of: two or three layers with every trait of the family
(window, chunk, grouped heads, dense first layers, shared experts, biases, group limits). The model is captured, and the
captured Program is compared with the eager model of transformers, prefill and decode.{target}

Written by `{command}`.
"""


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """What was found for one family; `reason` names module and cause of what does not work."""

    family: str
    captured: bool
    proven: bool
    lowered: bool | None
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """The row, JSON-able."""
        return asdict(self)


def choose(names: Sequence[str]) -> tuple[str, ...]:
    """`names`, or all families if there are none.

    Raises:
        UsageError: One is unknown.
    """
    known = family_names()
    for name in names:
        if name not in known:
            raise unknown(name, known, "unknown model family", "the families")
    return tuple(names) or known


def check(names: Iterable[str], target: str | None, *, progress: Progress) -> list[FamilyRow]:
    """Check one family after the other.

    Args:
        names: Families.
        target: Lower to this target too, with all gates; None stops after capture.
        progress: Told about every family.
    """
    chosen = list(names)
    rows = []
    for position, name in enumerate(chosen):
        progress("families", position, len(chosen))
        with tempfile.TemporaryDirectory() as folder:
            rows.append(_check(name, target, Path(folder)))
    progress("families", len(chosen), len(chosen))
    return rows


def _check(name: str, target: str | None, folder: Path) -> FamilyRow:
    from moec.compiler.capture import capture
    from moec.compiler.checkpoint import Checkpoint
    from moec.compiler.gates.cases import Prompts
    from moec.compiler.gates.parity import check_capture
    from moec.compiler.gates.verdict import Status

    checkpoint = Checkpoint.open(write_tiny_checkpoint(name, folder / "checkpoint"))
    try:
        program = capture(checkpoint)
    except MoecError as error:
        return FamilyRow(name, False, False, None if target is None else False, error.message)
    if target is not None:
        return _lower(name, target, folder)
    verdict = check_capture(checkpoint, program, Prompts.of(checkpoint.directory, program.vocab_size))
    return FamilyRow(name, True, verdict.status is Status.PASS, None, verdict.summary)


def _lower(name: str, target: str, folder: Path) -> FamilyRow:
    from moec.compiler.gates.verdict import Status
    from moec.compiler.pipeline import compile_recipe

    recipe = Recipe(checkpoint=str(folder / "checkpoint"), target=target)
    try:
        result = compile_recipe(recipe, folder / "out")
    except MoecError as error:
        return FamilyRow(name, True, False, False, error.message)
    wrong = [verdict for verdict in result.verdicts if verdict.status is not Status.PASS]
    parity = [verdict for verdict in result.verdicts if verdict.gate.startswith("parity")]
    return FamilyRow(name, True, _passed(parity[:1]), not wrong, _summary(wrong or parity))


def _passed(verdicts: Sequence[Verdict]) -> bool:
    return all(verdict.status == "pass" for verdict in verdicts)


def _summary(verdicts: Sequence[Verdict]) -> str:
    return "; ".join(f"{verdict.gate}: {verdict.summary}" for verdict in verdicts)


def markdown(rows: Sequence[FamilyRow], target: str | None) -> str:
    """The page: counts, then one table row for each family."""
    header = [
        "family",
        "captured",
        "equal to transformers",
        *([f"{target} artifact proven"] if target else []),
        "details",
    ]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        found = [row.captured, row.proven, *([bool(row.lowered)] if target else [])]
        details = " ".join(row.reason.split()).replace("|", "\\|")
        lines.append("| " + " | ".join([row.family, *("yes" if item else "no" for item in found), details]) + " |")
    works = sum(bool(row.lowered) if target else row.proven for row in rows)
    text = f" It is then lowered to {target}, and the artifact goes through every gate." if target else ""
    command = f"moec families --check{f' --target {target}' if target else ''} -o docs/families.md"
    intro = _INTRODUCTION.format(target=text, command=command)
    return "\n".join([intro, f"{works} of {len(rows)} families work.\n", *lines])


def write_page(path: Path, text: str) -> None:
    """Write the page.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}", hint="choose another file with -o") from error
