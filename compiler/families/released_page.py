"""`moec families --released`: build and prove a tiny checkpoint with the configuration of each released model.

`moec families --released --resume rows.jsonl -o docs/released.md` writes the page of the documentation.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.compiler.common.errors import MoecError, OutputError, UsageError
from moec.compiler.common.markdown import table
from moec.compiler.common.validation import checked_names
from moec.compiler.families.families_page import IN_PART, NO, YES, Notes, build
from moec.compiler.families.released_models import released_names, write_released_checkpoint

if TYPE_CHECKING:
    from moec.compiler.common.progress import Progress

TARGETS = ("onnx", "tflite", "coreml", "tensorrt")
_TOP_P = {"policy": "top-p", "parameters": {"mass": 0.55}}
_INT4 = {"format": "int4", "rounding": "rtn"}
FORMS: Mapping[str, Mapping[str, Any]] = {
    "static": {},
    "top-p": {"routing": _TOP_P},
    "static int4": {"quantize": _INT4},
    "top-p int4": {"quantize": _INT4, "routing": _TOP_P},
}
"""Title of a column -> recipe keys of the configuration in which each model is built."""

_INTRODUCTION = """# Released models

One row for each released model and target. config.json is the published one with its sizes reduced
(`golden_models/released.yaml`), the weights are random, of the published names and dtype. Each is exported as it is
("static"), with routing of dynamic width ("top-p"), and both with int4 weights, and the artifact goes through every
gate: the captured Program against transformers, the artifact against the Program, every expert, every expert tensor.
"{part}" means that no gate failed, but one could not run here.

Written by `{command}`.
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """The result of one released model for one target in one of `FORMS`.

    Attributes:
        model: Name of the model.
        target: Name of the target.
        form: One of `FORMS`.
        found: YES, IN_PART or NO.
        reason: The gates that did not pass, or why there is no artifact; empty for YES.
    """

    model: str
    target: str
    form: str
    found: str
    reason: str


def choose(names: Sequence[str]) -> tuple[str, ...]:
    """`names`, or all released models if `names` is empty.

    Raises:
        UsageError: A model is unknown.
    """
    return checked_names(names, released_names(), "unknown released model", "the models")


def check(
    names: Iterable[str],
    targets: Sequence[str],
    *,
    forms: Sequence[str] = tuple(FORMS),
    resume: Path | None = None,
    progress: Progress,
) -> list[Cell]:
    """Build and prove one released model after the other.

    Args:
        names: Names of released models.
        targets: Names of targets.
        forms: Keys of `FORMS`.
        resume: File with one result per line in JSON. Results in it are not built again, and new ones are appended.
        progress: Called for every result.

    Raises:
        UsageError: `resume` does not hold such results.
        OutputError: `resume` cannot be written.
    """
    known = {(cell.model, cell.target, cell.form): cell for cell in _read(resume)}
    wanted = [(name, target, form) for name in names for target in targets for form in forms]
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        written = _Checkpoints(Path(folder))
        for position, key in enumerate(wanted):
            progress("released models", position, len(wanted))
            cell = known.get(key) or _check(*key, written)
            cells.append(cell)
            if key not in known:
                _append(resume, cell)
    progress("released models", len(wanted), len(wanted))
    return cells


class _Checkpoints:
    """The checkpoint of the current model, which is written once and captured once per dtype."""

    def __init__(self, folder: Path) -> None:
        from moec.compiler.pipeline.captures import Captures

        self.folder, self.captures = folder, Captures()
        self._name = ""

    def of(self, name: str) -> Path:
        import shutil

        directory = self.folder / "checkpoint"
        if name != self._name:
            shutil.rmtree(directory, ignore_errors=True)
            self._name = ""
            write_released_checkpoint(name, directory)
            self._name = name
        return directory


def _check(name: str, target: str, form: str, written: _Checkpoints) -> Cell:
    try:
        checkpoint = written.of(name)
    except MoecError as error:
        return Cell(name, target, form, NO, error.message.replace(f"{written.folder / 'checkpoint'}: ", ""))
    with tempfile.TemporaryDirectory() as output:
        fields = {"checkpoint": str(checkpoint), "target": target, **FORMS[form]}
        found, reason = build(fields, Path(output) / "out", written.captures)
    return Cell(name, target, form, found, reason)


def _read(resume: Path | None) -> list[Cell]:
    if resume is None or not resume.is_file():
        return []
    try:
        return [Cell(**json.loads(line)) for line in resume.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{resume}: not a file of results of released models: {error}", hint="give another file"
        ) from error


def _append(resume: Path | None, cell: Cell) -> None:
    if resume is None:
        return
    try:
        with resume.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(cell)) + "\n")
    except OSError as error:
        raise OutputError(f"{resume}: cannot be written: {error.strerror}", hint="choose another file") from error


def markdown(cells: Sequence[Cell], command: str) -> str:
    """The page in Markdown: the command that wrote it, counts, and a table with a row for each model and target."""
    forms = list(dict.fromkeys(cell.form for cell in cells))
    rows: dict[tuple[str, str], dict[str, Cell]] = {}
    for cell in cells:
        rows.setdefault((cell.model, cell.target), {})[cell.form] = cell
    header, notes, lines = ["model", "target", *forms, "notes"], Notes(), []
    for (model, target), by_form in rows.items():
        found = [by_form[form].found for form in forms]
        reasons = {form: cell.reason for form, cell in by_form.items() if cell.found != YES}
        lines.append([model, target, *found, notes.of(reasons)])
    works = sum(all(cell.found != NO for cell in by_form.values()) for by_form in rows.values())
    intro = _INTRODUCTION.format(command=command, part=IN_PART)
    return "\n".join(
        [
            intro,
            f"{works} of {len(rows)} rows work in every form.\n",
            table(header, lines),
            notes.text(),
        ]
    )
