"""`moec families --check`: capture and prove a tiny random checkpoint of each family, and lower it if asked.

`moec families --check --target onnx -o docs/families.md` writes the page of the documentation. With one or several
`--recipe`, every family is built by each of these recipes, for example with dynamic routing or quantized.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.compiler.common.errors import MoecError, OutputError
from moec.compiler.common.markdown import table
from moec.compiler.common.validation import checked_names
from moec.compiler.families.tiny_models import family_names, write_tiny_checkpoint
from moec.compiler.pipeline.recipe import make_recipe

if TYPE_CHECKING:
    from moec.compiler.common.progress import Progress
    from moec.compiler.common.verdict import Verdict
    from moec.compiler.pipeline.captures import Captures

YES, IN_PART, NO = "yes", "in part", "no"

_INTRODUCTION = """# Model families

One row for each family that moec has a tiny random model of: two or three layers with every trait of the family
(window, chunk, grouped heads, dense first layers, shared experts, biases, group limits). The model is captured, and the
captured Program is compared with the eager model of transformers, prefill and decode.{built}

Written by `{command}`.
"""


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """The results of one family.

    Attributes:
        family: Name of the family.
        captured: Whether it can be captured.
        proven: Whether the captured Program computes the same as the model of transformers.
        artifacts: Title of a recipe -> `YES` if the artifact passed its gates, `NO` if one failed, `IN_PART` if none
            failed but one could not run here.
        reasons: "captured", "proven" or the title of a recipe -> why it does not work or could not be proven here.
    """

    family: str
    captured: bool
    proven: bool
    artifacts: Mapping[str, str]
    reasons: Mapping[str, str]

    @property
    def works(self) -> bool:
        """Whether the capture is proven and no artifact failed."""
        return self.proven and NO not in self.artifacts.values()

    def as_dict(self) -> dict[str, Any]:
        """The row as a mapping for JSON."""
        return asdict(self)


def choose(names: Sequence[str]) -> tuple[str, ...]:
    """`names`, or all families if `names` is empty.

    Raises:
        UsageError: A family is unknown.
    """
    return checked_names(names, family_names(), "unknown model family", "the families")


def check(names: Iterable[str], recipes: Mapping[str, Mapping[str, Any]], *, progress: Progress) -> list[FamilyRow]:
    """Check one family after the other.

    Args:
        names: Names of families.
        recipes: Title -> recipe without a checkpoint. Every family is built by each recipe, and the artifact goes
            through all gates; without recipes, the check stops after capture.
        progress: Called for every family.

    Raises:
        UsageError: A recipe is not valid.
    """
    for title, fields in recipes.items():
        make_recipe({**fields, "checkpoint": "tiny"}, where=title)
    chosen = list(names)
    rows = []
    for position, name in enumerate(chosen):
        progress("families", position, len(chosen))
        with tempfile.TemporaryDirectory() as folder:
            rows.append(_check(name, recipes, Path(folder)))
    progress("families", len(chosen), len(chosen))
    return rows


def _check(name: str, recipes: Mapping[str, Mapping[str, Any]], folder: Path) -> FamilyRow:
    import torch

    from moec.compiler.common.verdict import Status
    from moec.compiler.frontend.checkpoint import Checkpoint
    from moec.compiler.gates.cases import Prompts
    from moec.compiler.gates.parity import check_capture
    from moec.compiler.pipeline.captures import Captures

    checkpoint = Checkpoint.open(write_tiny_checkpoint(name, folder / "checkpoint", tokenizer=True))
    captures = Captures()
    try:
        program = captures.of(checkpoint, torch.float32)
    except MoecError as error:
        return FamilyRow(name, False, False, dict.fromkeys(recipes, NO), {"captured": error.message})
    verdict = check_capture(checkpoint, program, Prompts.of(checkpoint.directory, program.vocab_size))
    built = {
        title: build({**fields, "checkpoint": str(checkpoint.directory)}, folder / str(number), captures)
        for number, (title, fields) in enumerate(recipes.items())
    }
    proven = verdict.status is Status.PASS
    reasons = {title: reason for title, (_, reason) in built.items() if reason}
    artifacts = {title: passed for title, (passed, _) in built.items()}
    return FamilyRow(name, True, proven, artifacts, reasons if proven else {"proven": _summary([verdict]), **reasons})


def build(fields: Mapping[str, Any], output: Path, captures: Captures) -> tuple[str, str]:
    """Build an artifact: `YES`, `IN_PART` or `NO`, and the reason unless it is `YES`.

    Args:
        fields: The recipe.
        output: Directory of the artifact.
        captures: Captures that builds of one model share.
    """
    from moec.compiler.common.verdict import Status
    from moec.compiler.gates.parity import EXIT_CODE
    from moec.compiler.pipeline.export import compile_recipe

    try:
        result = compile_recipe(make_recipe(fields, where="recipe"), output, captures=captures)
    except MoecError as error:
        return NO, error.message
    # Quality and latency need limits, which make no sense for tiny random models; all other gates must pass.
    asked = [verdict for verdict in result.verdicts if verdict.exit_code == EXIT_CODE or verdict.status.failed]
    open_ = [verdict for verdict in asked if verdict.status is not Status.PASS]
    failed = [verdict for verdict in open_ if verdict.status.failed]
    return NO if failed else IN_PART if open_ else YES, _summary(failed or open_)


def _summary(verdicts: Sequence[Verdict]) -> str:
    return "; ".join(f"{verdict.gate}: {verdict.summary}" for verdict in verdicts)


class Notes:
    """Numbered notes below a table, each listed once, to which cells refer."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def of(self, reasons: Mapping[str, str]) -> str:
        """The text of a cell for `reasons` (title of a column -> reason)."""
        titles: dict[int, list[str]] = {}
        for title, reason in reasons.items():
            number = self._numbers.setdefault(" ".join(reason.split()), len(self._numbers) + 1)
            titles.setdefault(number, []).append(title)
        return "; ".join(f"{', '.join(found)}: [{number}]" for number, found in titles.items())

    def text(self) -> str:
        """The list of notes; empty if there are none."""
        rows = (f"{number}. {reason}" for reason, number in self._numbers.items())
        return "\n".join(["", "## Notes", "", *rows]) if self._numbers else ""


def markdown(rows: Sequence[FamilyRow], command: str) -> str:
    """The page in Markdown: the command that wrote it, counts, and a table with a row for each family."""
    titles = list(rows[0].artifacts) if rows else []
    header = [
        "family",
        "captured",
        "equal to transformers",
        *(f"{title} artifact proven" for title in titles),
        "notes",
    ]
    notes = Notes()
    lines = []
    for row in rows:
        found = [YES if row.captured else NO, YES if row.proven else NO, *row.artifacts.values()]
        lines.append([row.family, *found, notes.of(row.reasons)])
    works = sum(row.works for row in rows)
    text = f" It is then built for {', '.join(titles)}, and the artifact goes through every gate." if titles else ""
    intro = _INTRODUCTION.format(built=text, command=command)
    return "\n".join([intro, f"{works} of {len(rows)} families work.\n", table(header, lines), notes.text()])


def write_page(path: Path, text: str) -> None:
    """Write a page.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}", hint="choose another file with -o") from error
