"""From a recipe to the final Program: capture, passes, routing and quantization."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moec import passes
from moec.compiler.common.errors import LoweringError
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.program import Program
from moec.compiler.ir.widen import widened
from moec.compiler.measure.summary import model_summary
from moec.compiler.pipeline.captures import Captures
from moec.compiler.pipeline.quantization import Quantization, QuantizationInputs, plan_quantization
from moec.compiler.pipeline.recipe import Recipe, target_of, with_target_defaults
from moec.compiler.pipeline.refusals import check_target
from moec.compiler.pipeline.routing import RoutingPlan, measure_savings, plan_routing
from moec.compiler.pipeline.stages import Stages, silent
from moec.passes.base import Pass
from moec.passes.inputs_embeds import InputsEmbeds
from moec.quantize.formats import Activations
from moec.quantize.keep import SupportedFormats
from moec.quantize.recorded import RecordedCalibration
from moec.targets.base import Phase, Target, TargetOptions

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Built:
    """The final Program, the captured one, and the records of the steps between them."""

    checkpoint: Checkpoint
    captured: Program
    program: Program
    model: Mapping[str, Any]
    pass_log: Sequence[Mapping[str, Any]]
    routing: RoutingPlan
    quantization: Quantization


def build_program(recipe: Recipe, captures: Captures | None = None) -> Program:
    """The Program that an export of `recipe` would lower; `captures` are those of other recipes."""
    target, options = target_of(recipe)
    recipe = with_target_defaults(recipe, target)
    return build(recipe, target, options, Stages(silent), captures or Captures()).program


def build(
    recipe: Recipe,
    target: Target,
    options: TargetOptions,
    stages: Stages,
    captures: Captures,
    recorded: RecordedCalibration | None = None,
) -> Built:
    """Make the final Program.

    Args:
        recipe: What to build.
        target: The target of the recipe.
        options: The target's options.
        stages: Called for each stage.
        captures: Programs that were captured before.
        recorded: What calibration chose for the artifact that was built from the recipe, which replaces calibration;
            None if there is no artifact yet.

    Raises:
        MoecError: A stage failed; subclass and message say why.
    """
    with stages("capture"):
        checkpoint = _opened(recipe)
        target.check(options, checkpoint.raw_config)
        captured = captures.of(checkpoint, DTYPES[recipe.dtype or target.default_dtype])
    common = (*((InputsEmbeds(),) if recipe.inputs_embeds else ()), *passes.default_passes())
    with stages("passes", len(common)) as one_is_done:
        program, log = captures.after(captured, common, one_is_done)
    settings = None if recipe.routing is None or recipe.routing.does_nothing else recipe.routing
    weights = None if recipe.quantize is None or recipe.quantize.does_nothing else recipe.quantize

    def check(program: Program, *quantize: Pass) -> None:
        """Let the target refuse the Program now, since calibration and search take minutes to hours."""
        if recorded is None:
            check_target(target, _run((*quantize, *target.passes(options)), program, log)[0], options)

    if settings or (weights and weights.format == "auto"):
        check(program)
    with stages("routing") if settings else contextlib.nullcontext():
        routing = plan_routing(settings, checkpoint, program, stages.progress)
        program, log = _run(routing.passes, program, log)
    if settings and recorded is None:
        with stages("accounting"):
            capable = {phase: target.capabilities(options, phase) for phase in Phase}
            savings, use = measure_savings(settings, checkpoint, captured, program, capable, routing.added_work)
            routing = replace(routing, facts={**(routing.facts or {}), "accounting": savings}, use=use)
    with stages("quantize") if weights else contextlib.nullcontext():
        in_float32 = functools.partial(_in_float32, captured, program, (*common, *routing.passes))
        material = QuantizationInputs(checkpoint, program, in_float32, check, stages.progress)
        quantization = plan_quantization(weights, material, _formats(recipe, target, options), recorded)
        final, log = _run((*quantization.passes, *target.passes(options)), program, log)
    model = _described(captured, final, (routing.recorded or {}).get("removed"))
    return Built(checkpoint, captured, final, model, _pass_log(log), routing, quantization)


def _opened(recipe: Recipe) -> Checkpoint:
    return Checkpoint.open(recipe.checkpoint, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)


def _in_float32(captured: Program, program: Program, done: Sequence[Pass]) -> Program:
    """`program` with activations in float32; it is `captured` after the passes `done`."""
    return program if captured.dtype == torch.float32 else passes.run_passes(widened(captured), done)[0]


def _formats(recipe: Recipe, target: Target, options: TargetOptions) -> SupportedFormats:
    """The formats in which the target can hold weights: those that `keep` may use, and those that `auto` may choose."""
    dtype = recipe.dtype or target.default_dtype
    return SupportedFormats(
        functools.partial(target.kept_formats, options, dtype=dtype),
        functools.partial(target.auto_formats, options),
        Activations(target.fast_activations(options)),
    )


def _run(
    more: Sequence[Pass], program: Program, log: Sequence[passes.PassRecord]
) -> tuple[Program, tuple[passes.PassRecord, ...]]:
    """Run the passes `more` after those of `log`; return the Program and the log of all."""
    program, new = passes.run_passes(program, more, completed=[record.name for record in log])
    return program, (*log, *new)


def _pass_log(log: Sequence[passes.PassRecord]) -> list[dict[str, Any]]:
    """The log for moec.json: without times, since moec.json is the same on every rebuild."""
    return [
        {"name": record.name, "modified": record.modified, "rejections": [item.record() for item in record.rejections]}
        for record in log
    ]


def _described(captured: Program, final: Program, removed: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    """The summary of the final model, with parameters and MoE layers of the source model beside it."""
    before = model_summary(captured)
    _check_removed(captured, final, removed or [])
    return {**model_summary(final), "source": {key: before[key] for key in ("parameters", "moe_layers")}}


def _check_removed(captured: Program, final: Program, removed: Sequence[Sequence[int]]) -> None:
    """Check that the final Program lacks exactly the experts that moec.json records as removed.

    Raises:
        LoweringError: A layer has another number of experts.
    """
    for before, after, gone in zip(captured.layers, final.layers, removed, strict=False):
        if after.num_experts != before.num_experts - len(gone):
            raise LoweringError(
                f"{before.module}: {len(gone)} of its {before.num_experts} experts should be pruned, "
                f"but {after.num_experts} are left",
                hint="this is a fault of moec: please report it with the recipe",
            )
