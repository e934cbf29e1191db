"""`moec validate FILE --against CHECKPOINT` for a file that another exporter made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moec import passes
from moec.compiler.common.artifact import is_artifact
from moec.compiler.common.errors import OutputError, UsageError
from moec.compiler.common.progress import Progress
from moec.compiler.common.rejections import Rejection
from moec.compiler.foreign import precision
from moec.compiler.foreign.binding import Bindings
from moec.compiler.foreign.cost import sentence
from moec.compiler.foreign.formats import recognise
from moec.compiler.foreign.judgement import Demands, Judgement
from moec.compiler.foreign.model import Cost
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.reference import reference_threads
from moec.compiler.measure.summary import model_summary
from moec.compiler.pipeline.captures import Captures
from moec.compiler.pipeline.export import Result
from moec.compiler.pipeline.stages import Stages, silent
from moec.compiler.report import write as report
from moec.compiler.report.schema import JSON


def is_foreign(path: Path) -> bool:
    """Whether `path` exists and is no artifact of moec."""
    return path.exists() and not is_artifact(path)


def validate_foreign(
    path: Path,
    against: str,
    *,
    bindings: Path | None = None,
    output: Path | None = None,
    demands: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Result:
    """Judge a model file of another exporter and write the report beside the working directory.

    Args:
        path: The file, or the directory that holds it. Nothing is written there.
        against: Directory or hub id of the checkpoint that it was made from.
        bindings: YAML file with names of inputs and states.
        output: Directory for the report; None: `NAME.report` in the working directory.
        demands: The sections of a recipe that only gates read.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether to run modelling code of the checkpoint.
        progress: Called for every stage.

    Raises:
        UsageError: The format is unknown, or names cannot be found.
        MissingExtraError: The runtime of the format is not installed.
        ArtifactError: The file is damaged.
        CheckpointError: The file is of another model than `against`.
    """
    stages = Stages(progress)
    wanted = Demands.of(demands or {})
    folder = _report_directory(path, output)
    with stages("open"):
        model = recognise(path)
        names = Bindings() if bindings is None else Bindings.read(bindings)
        checkpoint = Checkpoint.open(against, revision=revision, trust_remote_code=trust_remote_code)
    with stages("capture"):
        captures = Captures()
        captured = captures.of(checkpoint, torch.float32)
        program, _ = captures.after(captured, passes.default_passes())
    with stages("gates"), reference_threads(program):
        judged = Judgement(checkpoint, captured, program, model, names, wanted, progress)
        verdicts = judged.verdicts()
        manifest = _described(judged, against)
    sizes = {file.name: _size(file) for file in model.files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: the report cannot be written: {error}") from error
    report.write(folder, manifest, verdicts, stages.timings, sizes)
    return Result(folder, manifest, verdicts, stages.timings, sizes)


def _report_directory(path: Path, output: Path | None) -> Path:
    """Where the report goes.

    Raises:
        UsageError: There is something else.
    """
    folder = output or Path(f"{path.resolve().name}.report")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / JSON).is_file())):
        raise UsageError(f"{folder}: it exists and holds no report", hint="give another directory with --output")
    if is_artifact(folder):
        raise UsageError(f"{folder}: it is an artifact", hint="give another directory with --output")
    return folder


def _size(file: Path) -> int:
    return (
        file.stat().st_size if file.is_file() else sum(own.stat().st_size for own in file.rglob("*") if own.is_file())
    )


def _described(judged: Judgement, against: str) -> dict[str, Any]:
    """What the report says about the file, in the form of a moec.json."""
    model, program = judged.model, judged.program
    rows = precision.table(judged.tensors, program)
    unused = sentence(judged.cost, program)
    size = sum(path.stat().st_size for path in judged.checkpoint.files)
    classes: dict[str, int] = {}
    for row in rows:
        classes[row.tensor_class] = classes.get(row.tensor_class, 0) + row.nbytes
    found = precision.remarks(rows)
    if isinstance(judged.cost, Cost) and not unused.startswith("nothing"):
        found.append((precision.EXPERTS, f"one that no token uses costs {unused}"))
    return {
        "source": {"bytes": size},
        "recipe": {"target": model.format, "dtype": model.float_precision, "checkpoint": against},
        "model": model_summary(judged.captured),
        "model_files": [file.name for file in model.files],
        "rejections": [Rejection(model.format, where, why).record() for where, why in found],
        "tensor_bytes": classes,
        **({"quantization": {"classes": _formats(rows)}} if judged.rounded is not None else {}),
        "tools": {},
        "foreign": {
            "path": str(model.path),
            "format": model.format,
            "producer": model.producer or "not named",
            "runtime": model.runtime,
            "unused_expert": unused,
            "tensors": [
                {"class": row.tensor_class, "precision": row.precision, "tensors": row.tensors, "bytes": row.nbytes}
                for row in rows
            ],
            "operators": dict(Counter(own.kind for own in model.operators()).most_common()),
        },
    }


def _formats(rows: Sequence[precision.Row]) -> dict[str, Any]:
    """The precisions of each class of tensors, as moec.json has its formats."""
    found: dict[str, Any] = {}
    for row in rows:
        found.setdefault(row.tensor_class, {"formats": {}})["formats"][row.precision] = row.tensors
    return found
