"""What works for which model family: tiny random checkpoints, captured, proven and, if asked, lowered.

`moec families --check --target onnx -o docs/families.md` writes the page of the documentation. With `--recipe` every
family is built by that recipe: with dynamic routing, say, or quantized.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.compiler.errors import MoecError, OutputError
from moec.compiler.recipe import make_recipe, unknown
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


def check(names: Iterable[str], fields: Mapping[str, Any], *, progress: Progress) -> list[FamilyRow]:
    """Check one family after the other.

    Args:
        names: Families.
        fields: Recipe of every artifact, but for the checkpoint: with a target, the family is lowered to it too and
            goes through all gates; without one, the check stops after capture.
        progress: Told about every family.

    Raises:
        UsageError: The recipe makes no sense.
    """
    if fields.get("target"):
        make_recipe({**fields, "checkpoint": "tiny"}, where="recipe")
    chosen = list(names)
    rows = []
    for position, name in enumerate(chosen):
        progress("families", position, len(chosen))
        with tempfile.TemporaryDirectory() as folder:
            rows.append(_check(name, fields, Path(folder)))
    progress("families", len(chosen), len(chosen))
    return rows


def _check(name: str, fields: Mapping[str, Any], folder: Path) -> FamilyRow:
    from moec.compiler.capture import capture
    from moec.compiler.checkpoint import Checkpoint
    from moec.compiler.gates.cases import Prompts
    from moec.compiler.gates.parity import check_capture
    from moec.compiler.gates.verdict import Status

    checkpoint = Checkpoint.open(write_tiny_checkpoint(name, folder / "checkpoint"))
    try:
        program = capture(checkpoint)
    except MoecError as error:
        return FamilyRow(name, False, False, False if fields.get("target") else None, error.message)
    if fields.get("target"):
        return _lower(name, fields, folder)
    verdict = check_capture(checkpoint, program, Prompts.of(checkpoint.directory, program.vocab_size))
    return FamilyRow(name, True, verdict.status is Status.PASS, None, verdict.summary)


def _lower(name: str, fields: Mapping[str, Any], folder: Path) -> FamilyRow:
    from moec.compiler.gates.parity import EXIT_CODE
    from moec.compiler.gates.verdict import Status
    from moec.compiler.pipeline import compile_recipe

    recipe = make_recipe({**fields, "checkpoint": str(folder / "checkpoint")}, where="recipe")
    try:
        result = compile_recipe(recipe, folder / "out")
    except MoecError as error:
        return FamilyRow(name, True, False, False, error.message)
    # Quality and latency ask for limits, which tiny random models have none of; the proof must be whole.
    asked = [verdict for verdict in result.verdicts if verdict.exit_code == EXIT_CODE or verdict.status.failed]
    wrong = [verdict for verdict in asked if verdict.status is not Status.PASS]
    parity = [verdict for verdict in result.verdicts if verdict.gate.startswith("parity")]
    return FamilyRow(name, True, _passed(parity[:1]), not wrong, _summary(wrong or parity))


def _passed(verdicts: Sequence[Verdict]) -> bool:
    return all(verdict.status == "pass" for verdict in verdicts)


def _summary(verdicts: Sequence[Verdict]) -> str:
    return "; ".join(f"{verdict.gate}: {verdict.summary}" for verdict in verdicts)


def markdown(
    rows: Sequence[FamilyRow],
    target: str | None,
    names: Sequence[str] = (),
    output: Path | None = None,
    recipe: Path | None = None,
) -> str:
    """The page: the command with what it was given, counts, then one table row for each family."""
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
    given = {"--target": target, "--recipe": recipe, "-o": output}
    flags = [f"{flag} {value}" for flag, value in given.items() if value is not None]
    command = " ".join(["moec families", *names, "--check", *flags])
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
