"""From a recipe to an artifact: the order of the stages, their times, and the name of the one that failed."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import moec
from moec import passes
from moec.compiler.common.artifact import read_manifest, verify, write_manifest
from moec.compiler.common.errors import ArtifactError, CheckpointError, LoweringError, MoecError, UsageError, out_of_memory
from moec.compiler.common.progress import Progress
from moec.compiler.common.rejections import Rejection
from moec.compiler.common.staging import check_output, staged
from moec.compiler.common.validation import validate
from moec.compiler.common.verdict import Verdict
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.quality import held_out_text
from moec.compiler.gates.run import GateInputs, exit_code
from moec.compiler.ir.program import Program
from moec.compiler.measure.summary import model_summary
from moec.compiler.pipeline.gates import latency_options, not_proven, prove
from moec.compiler.pipeline.quantization import (
    Quantization,
    calibration_text,
    check_plan,
    manifest_facts,
    plan_quantization,
    tensor_bytes,
)
from moec.compiler.pipeline.recipe import Recipe, make_recipe
from moec.compiler.pipeline.routing import RoutingPlan, check_routing, measure_savings, plan_routing
from moec.compiler.report import write as report
from moec.compiler.text.tokenizer import make_loadable
from moec.passes.inputs_embeds import InputsEmbeds
from moec.quantize.keep import Held
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


@dataclass
class _Stages:
    """Times each stage, tells progress, and notes on an exception in which stage it came up."""

    progress: Progress
    timings: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self.progress(name, 0, 1)
        try:
            yield
        except Exception as error:
            told = out_of_memory(error) or error
            told.add_note(f"stage: {name}")
            raise told
        self.timings[name] = time.perf_counter() - start
        self.progress(name, 1, 1)


def silent(name: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""


def compile_recipe(
    recipe: Recipe, output: Path, *, overwrite: bool = False, gates: bool = True, progress: Progress = silent
) -> Result:
    """Build the artifact of `recipe` at `output`.

    Args:
        recipe: What to build.
        output: A directory that does not exist or is empty, or an artifact if `overwrite` is set.
        overwrite: Replace the artifact at `output`.
        gates: Prove the artifact. Without, the report says "not run" for every gate.
        progress: Told about every stage.

    Returns:
        The result; a gate that failed is in it and no exception.

    Raises:
        MoecError: Its subclass and message say what is wrong with recipe, checkpoint, model or output; nothing is
            left at `output`, and an artifact that was there before still is.
    """
    target, options = _target(recipe)
    recipe = _completed(recipe, target)
    _check_inputs(recipe)
    if recipe.inputs_embeds and not target.takes_embeddings:
        raise UsageError(
            f"an artifact for {target.name} has no optional input of embeddings", hint="export without --inputs-embeds"
        )
    check_output(output.expanduser().resolve(), overwrite=overwrite)
    stages = _Stages(progress)
    built = _build(recipe, target, options, stages)
    with staged(output, overwrite=overwrite) as directory:
        with stages("lower"):
            refused = target.refusals(built.program, options)
            if refused:
                raise _cannot_lower(target, refused)
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
                "rejections": [asdict(rejection) for rejection in (*built.captured.rejections, *lowered.rejections)],
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
    calibration: str | None = None,
    demands: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Result:
    """Run the gates on an artifact that exists, and write its report anew.

    Args:
        directory: The artifact.
        against: Directory or hub id of the checkpoint that it was built from.
        calibration: Calibration text that its weights were rounded with, if not the one that moec brings along.
        demands: Sections of a recipe that only gates read (`recipe.DEMANDS`), which moec.json does not hold.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Run modelling code that the checkpoint brings along.
        progress: Told about every stage.

    Raises:
        ArtifactError: The artifact is damaged.
        CheckpointError: `against` is another checkpoint.
    """
    stages = _Stages(progress)
    with stages("verify"):
        verify(directory)
        manifest = read_manifest(directory)
        given = {
            "checkpoint": against,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            **(demands or {}),
        }
        recipe = _recipe_of(directory, manifest, given, calibration)
        _check_inputs(recipe)
        target, options = _target(recipe)
        checkpoint = Checkpoint.open(against, revision=revision, trust_remote_code=trust_remote_code)
        _check_source(directory, manifest, checkpoint)
    built = _build(recipe, target, options, stages)
    with stages("gates"):
        verdicts = prove(_gate_inputs(built, target, directory, manifest), recipe, manifest, progress)
    report.write(directory, manifest, verdicts, stages.timings)
    return Result(directory, manifest, verdicts, stages.timings)


def build_program(recipe: Recipe, *, progress: Progress = silent) -> Program:
    """The Program that an export of `recipe` would lower: captured and with every pass run."""
    target, options = _target(recipe)
    return _build(_completed(recipe, target), target, options, _Stages(progress)).program


def _check_inputs(recipe: Recipe) -> None:
    """Read the texts, the plan, the budgets and the baseline that the recipe names before anything is built.

    Raises:
        CheckpointError: A text is missing, empty or binary.
        UsageError: The plan, the routing or a budget is wrong, or the baseline is no artifact.
    """
    latency_options(recipe)
    if recipe.routing is not None:
        check_routing(recipe.routing)
    if recipe.quantize is not None and not recipe.quantize.does_nothing:
        calibration_text(recipe.quantize)
        check_plan(recipe.quantize)
    if recipe.quality is not None and recipe.quality.max_loss is not None:
        held_out_text(recipe.quality.text)


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


def _build(recipe: Recipe, target: Target, options: TargetOptions, stages: _Stages) -> _Built:
    with stages("capture"):
        checkpoint = Checkpoint.open(
            recipe.checkpoint, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code
        )
        target.check(options, checkpoint.raw_config)
        captured = capture(checkpoint, dtype=_DTYPES[recipe.dtype or target.default_dtype])
    settings = None if recipe.routing is None or recipe.routing.does_nothing else recipe.routing
    with stages("routing") if settings else contextlib.nullcontext():
        routing = plan_routing(settings, checkpoint, captured, stages.progress)

    def told(record: passes.PassRecord) -> None:
        stages.progress(f"pass {record.name}", 1, 1)

    with stages("passes"):
        embeds = (InputsEmbeds(),) if recipe.inputs_embeds else ()
        common = (*embeds, *passes.default_passes(), *routing.passes)
        program, log = passes.run_passes(captured, common, told)
    if settings:
        with stages("accounting"):
            capabilities = {phase: target.capabilities(options, phase) for phase in Phase}
            savings = measure_savings(settings, checkpoint, captured, program, capabilities)
            routing = replace(routing, facts={**(routing.facts or {}), "accounting": savings})

    def in_float32() -> Program:
        if captured.dtype == torch.float32:
            return program
        return passes.run_passes(capture(checkpoint, dtype=torch.float32), common)[0]

    weights = None if recipe.quantize is None or recipe.quantize.does_nothing else recipe.quantize
    with stages("quantize") if weights else contextlib.nullcontext():
        offered = functools.partial(target.auto_formats, options)
        held = Held(functools.partial(target.kept_formats, options), offered)
        quantization = plan_quantization(weights, checkpoint, program, in_float32, offered, held, stages.progress)
        later = (*quantization.passes, *target.passes(options))
        final, more = passes.run_passes(program, later, told, completed=[record.name for record in log])
    # Without the times: moec.json is the same on every rebuild.
    kept = [
        {"name": record.name, "modified": record.modified, "rejections": [asdict(item) for item in record.rejections]}
        for record in (*log, *more)
    ]
    return _Built(
        checkpoint,
        captured,
        final,
        _described(captured, final, (routing.recorded or {}).get("removed")),
        kept,
        routing,
        quantization,
    )


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


def _cannot_lower(target: Target, refused: Sequence[Rejection]) -> LoweringError:
    lines = [f"{rejection.where}: {rejection.reason}" for rejection in refused[:5]]
    more = f" (and {len(refused) - 5} more)" if len(refused) > 5 else ""
    return LoweringError(
        f"target {target.name} cannot build this model: {'; '.join(lines)}{more}",
        hint=f"moec export --target {target.name} --help lists other forms",
    )


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


def _recipe_of(
    directory: Path, manifest: Mapping[str, Any], given: Mapping[str, Any], calibration: str | None
) -> Recipe:
    recorded = manifest.get("recipe")
    if not isinstance(recorded, Mapping):
        raise ArtifactError(f"{directory}: its moec.json holds no recipe", hint="export it again")
    fields = {**recorded, **given}
    if calibration is not None and isinstance(fields.get("quantize"), Mapping):
        fields["quantize"] = {**fields["quantize"], "calibration": calibration}
    return make_recipe(fields, where=f"recipe of {directory}")


def _check_source(directory: Path, manifest: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    built_from = manifest["source"]["digests"]
    found = checkpoint.digests
    if differing := sorted(name for name in {*built_from, *found} if built_from.get(name) != found.get(name)):
        raise CheckpointError(
            f"{checkpoint.directory}: not the checkpoint that {directory} was built from: "
            f"{', '.join(differing[:4])} differ",
            hint="give the checkpoint that it was exported from, or export this one",
        )
