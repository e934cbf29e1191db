"""From a recipe to an artifact: the stages of an export in their order, and validating an existing artifact."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moec
from moec.compiler.common import provenance
from moec.compiler.common.artifact import read_manifest, verify, write_manifest
from moec.compiler.common.errors import (
    ArtifactError,
    CheckpointError,
    MoecError,
)
from moec.compiler.common.progress import Progress
from moec.compiler.common.staging import staged
from moec.compiler.common.verdict import Verdict
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.run import GateInputs, exit_code
from moec.compiler.pipeline.captures import Captures
from moec.compiler.pipeline.gates import latency_options, not_proven, prove
from moec.compiler.pipeline.input_checks import check_demands, check_inputs
from moec.compiler.pipeline.program import Built, build
from moec.compiler.pipeline.quantization import manifest_facts, tensor_bytes
from moec.compiler.pipeline.recipe import Recipe, make_recipe, target_of
from moec.compiler.pipeline.recorded_codes import recorded_calibration
from moec.compiler.pipeline.refusals import check_target
from moec.compiler.pipeline.routing import check_routing
from moec.compiler.pipeline.stages import Stages, silent
from moec.compiler.report import write as report
from moec.compiler.report.summary import README, readme
from moec.compiler.text.tokenizer import make_loadable
from moec.targets.base import Lowered, Target, TargetOptions

_TOOLS = ("torch", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class Result:
    """The result of an export or a validation.

    Attributes:
        directory: The artifact. It exists even if a gate failed, so that it can be examined.
        manifest: Its moec.json.
        verdicts: One for each gate, including those that did not run.
        timings: Stage -> seconds of wall-clock time, in the order in which they ran.
        files: File -> bytes, if what was validated is not in `directory`, which then holds the report alone.
    """

    directory: Path
    manifest: Mapping[str, Any]
    verdicts: tuple[Verdict, ...]
    timings: Mapping[str, float]
    files: Mapping[str, int] | None = None

    @property
    def failed(self) -> tuple[Verdict, ...]:
        """The verdicts of the gates that failed."""
        return tuple(verdict for verdict in self.verdicts if verdict.status.failed)

    @property
    def exit_code(self) -> int:
        """0 if no gate failed; the exit code of the failed gates if it is the same for all of them; else 12."""
        return exit_code(self.verdicts)


class GateError(MoecError):
    """A gate failed. The artifact and its report exist; `result` has the directory and every verdict."""

    exit_code = 5

    def __init__(self, message: str, *, hint: str = "", result: Result) -> None:
        super().__init__(message, hint=hint)
        self.result = result
        self.exit_code = result.exit_code


def compile_recipe(
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    gates: bool = True,
    progress: Progress = silent,
    captures: Captures | None = None,
) -> Result:
    """Build the artifact of `recipe` at `output`.

    Args:
        recipe: What to build.
        output: A directory that does not exist or is empty, or an artifact if `overwrite` is set.
        overwrite: Replace the artifact at `output`.
        gates: Whether to run the gates. If not, the report says "not run" for every gate.
        progress: Called for every stage.
        captures: Captures that builds of one checkpoint share, so that it is captured once.

    Returns:
        The result, with the verdicts; a failed gate raises no exception.

    Raises:
        MoecError: Recipe, checkpoint, model or output is wrong, as subclass and message say. Nothing new is left at
            `output`, and an artifact that was there before is unchanged.
    """
    recipe, target, options = check_inputs(recipe, output, overwrite=overwrite)
    latency_options(recipe)
    if recipe.routing is not None:
        check_routing(recipe.routing)
    stages = Stages(progress)
    built = build(recipe, target, options, stages, captures or Captures())
    with staged(output, overwrite=overwrite) as directory:
        with stages("lower"):
            check_target(target, built.program, options)
            lowered = target.lower(built.program, options, directory, progress)
        with stages("package"):
            manifest = _package(directory, recipe, target, options, built, lowered)
        verdicts = not_proven(target, "switched off with --no-gates")
        if gates:
            with stages("gates"):
                verdicts = prove(_gate_inputs(built, target, directory, manifest), recipe, manifest, progress)
        report.write(directory, manifest, verdicts, stages.timings)
    return Result(output, manifest, verdicts, stages.timings)


def _package(
    directory: Path, recipe: Recipe, target: Target, options: TargetOptions, built: Built, lowered: Lowered
) -> dict[str, Any]:
    """Add configs, tokenizer, README.md, the target's files, moec.json (returned) and provenance.json."""
    for path in built.checkpoint.companions():
        shutil.copyfile(path, directory / path.name)
    make_loadable(directory)
    if built.routing.use is not None:
        built.routing.use.write(directory)
    content: dict[str, Any] = {
        "source": _source(built.checkpoint),
        "recipe": _recorded(recipe, options, built),
        "model": built.model,
        "passes": built.pass_log,
        "rejections": [rejection.record() for rejection in (*built.captured.rejections, *lowered.rejections)],
        "signature": lowered.signature,
        **({"routing": built.routing.facts} if built.routing.facts else {}),
        **({"quantization": weights} if (weights := manifest_facts(built.quantization, built.program)) else {}),
        "model_files": sorted((*lowered.model_files, *target.package(options, directory))),
        "facts": lowered.facts,
        "tensor_bytes": tensor_bytes(built.program),
        "tools": _tools(target),
    }
    sizes = {name: (directory / name).stat().st_size for name in content["model_files"]}
    (directory / README).write_text(readme(content, sizes), encoding="utf-8")
    manifest = write_manifest(directory, content)
    provenance.write(directory, manifest)
    return manifest


def validate_artifact(
    directory: Path,
    against: str,
    *,
    demands: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Result:
    """Run the gates on an existing artifact and rewrite its report. Nothing is calibrated or searched again.

    Args:
        directory: The artifact.
        against: Directory or hub id of the checkpoint that it was built from.
        demands: The sections of a recipe that only gates read (`recipe.DEMANDS`), which moec.json does not hold.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether to run modelling code of the checkpoint.
        progress: Called for every stage.

    Returns:
        The result, with the new verdicts.

    Raises:
        ArtifactError: The artifact is damaged.
        CheckpointError: The artifact was built from another checkpoint than `against`.
    """
    stages = Stages(progress)
    with stages("verify"):
        verify(directory)
        manifest = read_manifest(directory)
        given = {
            "checkpoint": against,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            **(demands or {}),
        }
        recipe = _recipe_of(directory, manifest, given)
        check_demands(recipe)
        latency_options(recipe)
        target, options = target_of(recipe)
        checkpoint = Checkpoint.open(against, revision=revision, trust_remote_code=trust_remote_code)
        _check_source(directory, manifest, checkpoint)
        recorded = recorded_calibration(target, directory, manifest)
    built = build(recipe, target, options, stages, Captures(), recorded)
    with stages("gates"):
        verdicts = prove(_gate_inputs(built, target, directory, manifest), recipe, manifest, progress)
    report.write(directory, manifest, verdicts, stages.timings)
    return Result(directory, manifest, verdicts, stages.timings)


def _recorded(recipe: Recipe, options: TargetOptions, built: Built) -> dict[str, Any]:
    """The recipe for moec.json, in which calibrated parameters replace the settings of calibration."""
    return {
        **recipe.canonical(options),
        "routing": built.routing.recorded,
        "quantize": built.quantization.recorded,
    }


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in checkpoint.files)
    return {"digests": dict(sorted(checkpoint.digests.items())), "bytes": size}


def _tools(target: Target) -> dict[str, str]:
    found = {"moec": moec.__version__}
    for name in (*_TOOLS, *target.tools):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _gate_inputs(built: Built, target: Target, directory: Path, manifest: Mapping[str, Any]) -> GateInputs:
    facts = manifest.get("facts", {})
    return GateInputs(built.checkpoint, built.captured, built.program, target, directory, facts=facts)


def _recipe_of(directory: Path, manifest: Mapping[str, Any], given: Mapping[str, Any]) -> Recipe:
    recorded = manifest.get("recipe")
    if not isinstance(recorded, Mapping):
        raise ArtifactError(f"{directory}: its moec.json has no recipe", hint="export it again")
    return make_recipe({**recorded, **given}, where=f"recipe of {directory}")


def _check_source(directory: Path, manifest: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    built_from = manifest["source"]["digests"]
    found = checkpoint.digests
    if differing := sorted(name for name in {*built_from, *found} if built_from.get(name) != found.get(name)):
        raise CheckpointError(
            f"{checkpoint.directory}: not the checkpoint that {directory} was built from: "
            f"{', '.join(differing[:4])} differ",
            hint="give the checkpoint that the artifact was exported from, or export this checkpoint",
        )
