"""Running the gates that a recipe asks for, and the verdicts "not run" of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from moec.compiler.common.progress import Progress
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.gates import latency
from moec.compiler.gates.coverage import GATE as COVERAGE_GATE
from moec.compiler.gates.integrity import GATE as INTEGRITY_GATE
from moec.compiler.gates.parity import ARTIFACT_GATE, CAPTURE_GATE, EXIT_CODE, ParityOptions
from moec.compiler.gates.quality import EXIT_CODE as QUALITY_EXIT_CODE
from moec.compiler.gates.quality import GATE as QUALITY_GATE
from moec.compiler.gates.quality import QualityOptions, judge_quality, not_run
from moec.compiler.gates.reference import Ahead
from moec.compiler.gates.repeatability import GATE as REPEATABILITY_GATE
from moec.compiler.gates.run import Gate, GateInputs, run_gates
from moec.compiler.ir.widen import widened
from moec.compiler.pipeline.recipe import Recipe
from moec.targets.base import Target


def prove(inputs: GateInputs, recipe: Recipe, manifest: Mapping[str, Any], progress: Progress) -> tuple[Verdict, ...]:
    """Run the gates that `recipe` asks for.

    Args:
        inputs: The artifact, and what it was built from.
        recipe: The recipe, with its demands on coverage, quality and latency.
        manifest: The artifact's moec.json.
        progress: Called for every gate.

    Returns:
        One verdict for each gate, including those that the recipe does not ask for.
    """
    further: list[tuple[str, int, Gate]] = [
        (QUALITY_GATE, QUALITY_EXIT_CODE, partial(_quality, inputs, recipe, progress)),
        (latency.GATE, latency.EXIT_CODE, partial(_latency, inputs, recipe, manifest, progress)),
    ]
    parity = ParityOptions(coverage_min=recipe.coverage.min)
    return run_gates(inputs, parity, progress, further=further)


def not_proven(target: Target, reason: str) -> tuple[Verdict, ...]:
    """The verdicts "not run" of all gates, with `reason` as their summary."""
    gates = (CAPTURE_GATE, ARTIFACT_GATE, COVERAGE_GATE, INTEGRITY_GATE, REPEATABILITY_GATE)
    proofs = (Verdict(gate, Status.NOT_RUN, reason, EXIT_CODE) for gate in gates)
    own = (Verdict(gate.name, Status.NOT_RUN, reason, gate.exit_code) for gate in target.gates())
    quality = Verdict(QUALITY_GATE, Status.NOT_RUN, reason, QUALITY_EXIT_CODE)
    return (*proofs, *own, quality, latency.not_run(reason))


def latency_options(recipe: Recipe) -> latency.LatencyOptions | None:
    """The latency demands of the recipe; None if it has none.

    Raises:
        UsageError: A budget is not valid, or the baseline is not an artifact.
    """
    given = recipe.latency
    return None if given is None else latency.make_options(**given.model_dump())


def _quality(inputs: GateInputs, recipe: Recipe, progress: Progress) -> Verdict:
    asked = recipe.quality
    if asked is None or asked.max_loss is None:
        return not_run()
    options = QualityOptions(asked.max_loss, asked.text, asked.windows, asked.window)
    # The reference is the checkpoint's model in float32, without the rounding of an export in float16.
    source = partial(Ahead, widened(inputs.captured))
    return judge_quality(inputs.captured, source, inputs.runner, inputs.checkpoint.directory, options, progress)


def _latency(inputs: GateInputs, recipe: Recipe, manifest: Mapping[str, Any], progress: Progress) -> Verdict:
    asked = latency_options(recipe)
    if asked is None:
        return latency.not_run()
    verdict = latency.judge_latency(inputs.target, inputs.directory, asked, progress)
    return _beside_estimate(verdict, inputs, manifest, recipe)


def _beside_estimate(verdict: Verdict, inputs: GateInputs, manifest: Mapping[str, Any], recipe: Recipe) -> Verdict:
    """Add the error of `moec estimate` to the verdict, if this machine is calibrated for target and formats."""
    # Imported here, since the estimate builds Programs by this pipeline.
    from moec.compiler.measure.estimate.error import estimate_error

    if "workloads" not in verdict.figures:
        return verdict
    decode = manifest.get("routing", {}).get("accounting", {}).get("phases", {}).get("decode", {})
    kept, dtype = float(decode.get("executed_flops_share", 1.0)), recipe.dtype or inputs.target.default_dtype
    found = estimate_error(inputs.program, inputs.target.name, dtype, kept, verdict.figures["workloads"])
    return replace(verdict, figures={**verdict.figures, "estimate": found})
