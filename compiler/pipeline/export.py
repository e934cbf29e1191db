"""From a recipe to an artifact: the order of the stages, their times, and the name of the one that failed."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import moec
from moec import passes
from moec.compiler.common.artifact import read_manifest, verify, write_manifest
from moec.compiler.common.errors import (
    ArtifactError,
    CheckpointError,
    LoweringError,
    MoecError,
    UsageError,
)
from moec.compiler.common.progress import Progress
from moec.compiler.common.staging import check_output, staged
from moec.compiler.common.validation import validate
from moec.compiler.common.verdict import Verdict
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.run import GateInputs, exit_code
from moec.compiler.ir.program import Program
from moec.compiler.ir.widen import widened
from moec.compiler.measure.summary import model_summary
from moec.compiler.pipeline.captures import Captures
from moec.compiler.pipeline.gates import not_proven, prove
from moec.compiler.pipeline.input_checks import check_demands, check_inputs
from moec.compiler.pipeline.quantization import Quantization, manifest_facts, plan_quantization, tensor_bytes
from moec.compiler.pipeline.recipe import Recipe, make_recipe
from moec.compiler.pipeline.recorded_codes import recorded_codes
from moec.compiler.pipeline.refusals import check_target
from moec.compiler.pipeline.routing import RoutingPlan, measure_savings, plan_routing
from moec.compiler.pipeline.stages import Stages, silent
from moec.compiler.report import write as report
from moec.compiler.text.tokenizer import make_loadable
from moec.passes.base import Pass
from moec.passes.inputs_embeds import InputsEmbeds
from moec.quantize.keep import Held
from moec.quantize.recorded import RecordedCodes
from moec.targets import get_target
from moec.targets.base import Phase, Target, TargetOptions

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_TOOLS = ("torch", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class Result:
    """What an export or a validation ended with.

    Attributes:
        directory: The artifact. It is there even if a gate failed, so that it can be examined.
        manifest: Its moec.json.
        verdicts: One for each gate, those that did not run included.
        timings: Stage -> seconds of wall-clock time, in the order in which they ran.
    """

    directory: Path
    manifest: Mapping[str, Any]
    verdicts: tuple[Verdict, ...]
    timings: Mapping[str, float]

    @property
    def failed(self) -> tuple[Verdict, ...]:
        """The verdicts of the gates that failed."""
        return tuple(verdict for verdict in self.verdicts if verdict.status.failed)

    @property
    def exit_code(self) -> int:
        """0 if no gate failed, their exit code if those that failed have one in common, else 12."""
        return exit_code(self.verdicts)


class GateError(MoecError):
    """A gate failed. The artifact and its report are there: `result` has the directory and every verdict."""

    exit_code = 5

    def __init__(self, message: str, *, hint: str = "", result: Result) -> None:
        super().__init__(message, hint=hint)
        self.result = result
        self.exit_code = result.exit_code


@dataclass(frozen=True)
class _Built:
    """The final Program with what its making recorded."""

    checkpoint: Checkpoint
    captured: Program
    program: Program
    model: Mapping[str, Any]
    pass_log: Sequence[Mapping[str, Any]]
    routing: RoutingPlan
    quantization: Quantization


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
        gates: Prove the artifact. Without, the report says "not run" for every gate.
        progress: Told about every stage.
        captures: Shared by builds of one checkpoint, which is then captured once.

    Returns:
        The result; a gate that failed is in it and no exception.

    Raises:
        MoecError: Its subclass and message say what is wrong with recipe, checkpoint, model or output; nothing is
            left at `output`, and an artifact that was there before still is.
    """
    target, options = _target(recipe)
    recipe = _completed(recipe, target)
    check_inputs(recipe)
    if recipe.inputs_embeds and not target.takes_embeddings:
        raise UsageError(
            f"an artifact for {target.name} has no input of embeddings", hint="export without --inputs-embeds"
        )
    check_output(output.expanduser().resolve(), overwrite=overwrite)
    stages = Stages(progress)
    built = _build(recipe, target, options, stages, captures or Captures())
    with staged(output, overwrite=overwrite) as directory:
        with stages("lower"):
            check_target(target, built.program, options)
            lowered = target.lower(built.program, options, directory, progress)
        with stages("package"):
            for path in built.checkpoint.companions():
                shutil.copyfile(path, directory / path.name)
            make_loadable(directory)
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
            manifest = write_manifest(directory, content)
        verdicts = not_proven(target, "switched off with --no-gates")
        if gates:
            with stages("gates"):
                verdicts = prove(_gate_inputs(built, target, directory, manifest), recipe, manifest, progress)
        report.write(directory, manifest, verdicts, stages.timings)
    return Result(output, manifest, verdicts, stages.timings)


def validate_artifact(
    directory: Path,
    against: str,
    *,
    demands: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Result:
    """Run the gates on an artifact that exists, and write its report anew. Nothing is calibrated or chosen again.

    Args:
        directory: The artifact.
        against: Directory or hub id of the checkpoint that it was built from.
        demands: Sections of a recipe that only gates read (`recipe.DEMANDS`), which moec.json does not hold.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Run modelling code that the checkpoint brings along.
        progress: Told about every stage.

    Raises:
        ArtifactError: The artifact is damaged.
        CheckpointError: `against` is another checkpoint.
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
        target, options = _target(recipe)
        checkpoint = Checkpoint.open(against, revision=revision, trust_remote_code=trust_remote_code)
        _check_source(directory, manifest, checkpoint)
        codes = recorded_codes(target, directory, manifest)
    built = _build(recipe, target, options, stages, Captures(), codes)
    with stages("gates"):
        verdicts = prove(_gate_inputs(built, target, directory, manifest), recipe, manifest, progress)
    report.write(directory, manifest, verdicts, stages.timings)
    return Result(directory, manifest, verdicts, stages.timings)


def build_program(recipe: Recipe) -> Program:
    """The Program that an export of `recipe` would lower: captured and with every pass run."""
    target, options = _target(recipe)
    return _build(_completed(recipe, target), target, options, Stages(silent), Captures()).program


def _completed(recipe: Recipe, target: Target) -> Recipe:
    """`recipe` with what `target` means where it says nothing of precision, or names a preset."""
    recipe = recipe.model_copy(update={"dtype": recipe.dtype or target.default_dtype})
    settings = recipe.quantize
    if settings is None or not isinstance(settings.format, str) or settings.format not in target.presets:
        return recipe
    own = {"format": {"formats": dict(target.presets[settings.format])}}
    return recipe.model_copy(update={"quantize": settings.model_copy(update=own)})


def _target(recipe: Recipe) -> tuple[Target, TargetOptions]:
    target = get_target(recipe.target)
    return target, validate(target.Options, recipe.options, where=f"options of target {target.name}")


def _build(
    recipe: Recipe,
    target: Target,
    options: TargetOptions,
    stages: Stages,
    captures: Captures,
    codes: Mapping[str, RecordedCodes] | None = None,
) -> _Built:
    """Make the final Program.

    Args:
        recipe: What to build.
        target: Its target.
        options: Its options.
        stages: Told about each stage.
        captures: Programs that were captured before.
        codes: Calibrated codes of the artifact that was built from the recipe; None where there is no artifact yet.
    """
    with stages("capture"):
        checkpoint = Checkpoint.open(
            recipe.checkpoint, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code
        )
        target.check(options, checkpoint.raw_config)
        captured = captures.of(checkpoint, _DTYPES[recipe.dtype or target.default_dtype])
    with stages("passes"):
        common = (*((InputsEmbeds(),) if recipe.inputs_embeds else ()), *passes.default_passes())
        program, log = captures.after(captured, common, stages.ran)
    settings = None if recipe.routing is None or recipe.routing.does_nothing else recipe.routing
    weights = None if recipe.quantize is None or recipe.quantize.does_nothing else recipe.quantize

    def check(program: Program, *quantize: Pass) -> None:
        """Calibration and search take minutes to hours: what the target refuses is refused before."""
        if codes is None:
            done = [record.name for record in log]
            later = (*quantize, *target.passes(options))
            check_target(target, passes.run_passes(program, later, completed=done)[0], options)

    if settings or (weights and weights.format == "auto"):
        check(program)
    with stages("routing") if settings else contextlib.nullcontext():
        routing = plan_routing(settings, checkpoint, program, stages.progress)
        program, log = _run(routing.passes, program, log, stages)
    if settings and codes is None:
        with stages("accounting"):
            capabilities = {phase: target.capabilities(options, phase) for phase in Phase}
            savings = measure_savings(settings, checkpoint, captured, program, capabilities)
            routing = replace(routing, facts={**(routing.facts or {}), "accounting": savings})

    def in_float32() -> Program:
        if captured.dtype == torch.float32:
            return program
        return passes.run_passes(widened(captured), (*common, *routing.passes))[0]

    with stages("quantize") if weights else contextlib.nullcontext():
        offered = functools.partial(target.auto_formats, options)
        dtype = recipe.dtype or target.default_dtype
        held = Held(functools.partial(target.kept_formats, options, dtype=dtype), offered)
        quantization = plan_quantization(
            weights, checkpoint, program, in_float32, offered, held, codes, check, stages.progress
        )
        final, log = _run((*quantization.passes, *target.passes(options)), program, log, stages)
    return _Built(
        checkpoint,
        captured,
        final,
        _described(captured, final, (routing.recorded or {}).get("removed")),
        _pass_log(log),
        routing,
        quantization,
    )


def _run(
    more: Sequence[Pass], program: Program, log: Sequence[passes.PassRecord], stages: Stages
) -> tuple[Program, tuple[passes.PassRecord, ...]]:
    """Run `more` passes on a program that has had those of `log`."""
    program, new = passes.run_passes(program, more, stages.ran, completed=[record.name for record in log])
    return program, (*log, *new)


def _pass_log(log: Sequence[passes.PassRecord]) -> list[dict[str, Any]]:
    """For moec.json: without the times, since it is the same on every rebuild."""
    return [
        {"name": record.name, "modified": record.modified, "rejections": [item.record() for item in record.rejections]}
        for record in log
    ]


def _described(captured: Program, final: Program, removed: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    """The model that was built, and what it was built from."""
    before = model_summary(captured)
    _check_removed(captured, final, removed or [])
    return {**model_summary(final), "source": {key: before[key] for key in ("parameters", "moe_layers")}}


def _check_removed(captured: Program, final: Program, removed: Sequence[Sequence[int]]) -> None:
    """Compare what moec.json will say was pruned with what is left.

    Raises:
        LoweringError: A layer has another number of experts.
    """
    for before, after, gone in zip(captured.layers, final.layers, removed, strict=False):
        if after.num_experts != before.num_experts - len(gone):
            raise LoweringError(
                f"{before.module}: {len(gone)} of its {before.num_experts} experts should be pruned, "
                f"and {after.num_experts} are left",
                hint="this is a fault of moec: please report it with the recipe",
            )


def _recorded(recipe: Recipe, options: TargetOptions, built: _Built) -> dict[str, Any]:
    """The recipe for moec.json, with what was calibrated in place of how."""
    return {
        **recipe.canonical(options),
        "routing": built.routing.recorded,
        "quantize": built.quantization.recorded,
    }


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"digests": dict(sorted(checkpoint.digests.items()))}


def _tools(target: Target) -> dict[str, str]:
    found = {"moec": moec.__version__}
    for name in (*_TOOLS, *target.tools):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _gate_inputs(built: _Built, target: Target, directory: Path, manifest: Mapping[str, Any]) -> GateInputs:
    facts = manifest.get("facts", {})
    return GateInputs(built.checkpoint, built.captured, built.program, target, directory, facts=facts)


def _recipe_of(directory: Path, manifest: Mapping[str, Any], given: Mapping[str, Any]) -> Recipe:
    recorded = manifest.get("recipe")
    if not isinstance(recorded, Mapping):
        raise ArtifactError(f"{directory}: its moec.json holds no recipe", hint="export it again")
    return make_recipe({**recorded, **given}, where=f"recipe of {directory}")


def _check_source(directory: Path, manifest: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    built_from = manifest["source"]["digests"]
    found = checkpoint.digests
    if differing := sorted(name for name in {*built_from, *found} if built_from.get(name) != found.get(name)):
        raise CheckpointError(
            f"{checkpoint.directory}: not the checkpoint that {directory} was built from: "
            f"{', '.join(differing[:4])} differ",
            hint="give the checkpoint that it was exported from, or export this one",
        )
