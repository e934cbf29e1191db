"""From the quantize section of a recipe to passes: the plan, calibrated rounding, and the records in moec.json."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moec.compiler.common.digest import sha256_of_text
from moec.compiler.common.errors import UsageError
from moec.compiler.common.progress import Progress
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.program import Program
from moec.compiler.ir.weights import LazyTensor
from moec.compiler.pipeline.input_checks import KEEP, calibration_text
from moec.compiler.pipeline.recipe import QuantizeRecipe
from moec.compiler.text.corpus import spread, tokenize, windows
from moec.passes.base import Pass
from moec.passes.keep_codes import KeepCodes
from moec.passes.quantize import Quantize
from moec.passes.quantize_cache import QuantizeCache
from moec.quantize.formats import FP16, Activations, IntegerFormat
from moec.quantize.keep import SupportedFormats
from moec.quantize.kv_cache import measure_scales, sha256_of_scale, unit_scales
from moec.quantize.lazy import Coded, Float16
from moec.quantize.methods.calibrated import Calibration, calibrate
from moec.quantize.methods.gptq import GptqOptions
from moec.quantize.methods.rounding import Method, RoundingResult
from moec.quantize.plan import QuantizationPlan, TensorClass, requested, with_activations
from moec.quantize.planning.auto import Choice, choose, round_significant
from moec.quantize.planning.sensitivity import NEAREST, AvailableFormats, Rounding, size_of
from moec.quantize.recorded import RecordedCalibration, matrices_of, sha256_of
from moec.quantize.tensor_classes import weight_roles

SENSITIVITY_WINDOWS = 16
"""Windows of text on which `auto` measures each part. Divergences vary by a few percent between windows, and by
factors between formats."""


@dataclass(frozen=True)
class Quantization:
    """The passes and records that quantization adds to an export.

    Attributes:
        passes: The passes that run after the common passes and routing.
        recorded: The quantize section for moec.json, which gives the same Program again without a search.
        facts: Decisions and measurements for moec.json.
    """

    passes: tuple[Pass, ...] = ()
    recorded: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantizationInputs:
    """The inputs from which a quantization plan is made.

    Attributes:
        checkpoint: The checkpoint, for its tokenizer.
        program: The float Program after the common passes and routing.
        in_float32: Makes the same Program with activations in float32, which calibration runs.
        check: Raises a LoweringError if the target refuses the Program after a quantizing pass.
        progress: Called during calibration and search.
    """

    checkpoint: Checkpoint
    program: Program
    in_float32: Callable[[], Program]
    check: Callable[[Program, Pass], None]
    progress: Progress


def plan_quantization(
    settings: QuantizeRecipe | None,
    material: QuantizationInputs,
    held: SupportedFormats,
    recorded: RecordedCalibration | None,
) -> Quantization:
    """Decide a recipe's quantization.

    Text is read and the model is run only for calibrated rounding, for `auto` and for the scales of a KV cache.

    Args:
        settings: The quantize section of the recipe.
        material: Checkpoint and Program.
        held: The formats that the target can hold, for `keep` and `auto`.
        recorded: What calibration chose for an artifact of this recipe, which replaces calibration; None if there is no
            artifact yet.

    Raises:
        UsageError: The plan is not valid, a block size does not divide a dimension, or there is no KV cache to round.
        LoweringError: The target does not support a format of the plan.
        CheckpointError: There is no tokenizer, or the text is missing, empty, binary or too short.
    """
    if settings is None or settings.does_nothing:
        return Quantization()
    if settings.cache and recorded is None:
        _check_cache(settings, material)
    found = Quantization(recorded=settings.model_dump(mode="json"))
    if settings.weights:
        found = _of_weights(settings, material, held, recorded)
    return _with_cache(found, settings, material, recorded) if settings.cache else found


def _of_weights(
    settings: QuantizeRecipe,
    material: QuantizationInputs,
    held: SupportedFormats,
    recorded_calibration: RecordedCalibration | None,
) -> Quantization:
    """The quantization of weights; arguments and errors as for `plan_quantization`."""
    if settings.format == KEEP:
        return _kept(settings, material.program, held)
    chosen = _choose(settings, material, held.formats) if settings.format == "auto" else None
    plan = chosen.plan if chosen is not None else requested(settings.format)
    activations = _activations(settings, held)
    if activations is not Activations.FLOAT:
        plan = with_activations(plan, activations)
    method = _method(settings, plan, material.checkpoint)
    if recorded_calibration is not None:
        return Quantization((Quantize(plan, recorded=recorded_calibration.codes),))
    # moec.json holds no path of the text; its effect is in the plan and the codes.
    fixed = {
        "format": plan.to_dict(),
        "rounding": method.value,
        "calibration": None,
        "activations": activations.value,
    }
    recorded = settings.model_dump(mode="json") | fixed
    facts: dict[str, Any] = {"plan": plan.to_dict(), "rounding": method.value}
    rounded: Mapping[str, RoundingResult] = {}
    if method is Method.GPTQ:
        rounded, calibrated = _calibrated(settings, plan, material)
        facts |= calibrated
        recorded |= {"calibration_sha256": calibrated["calibration"]["sha256"]}
    if chosen is not None:
        facts["auto"] = dict(chosen.facts)
        # Once the formats are known there is nothing left to choose.
        recorded |= {"max_size": None, "max_perplexity_increase": None}
    return Quantization((Quantize(plan, rounded),), recorded, facts)


def _calibrated(
    settings: QuantizeRecipe, plan: QuantizationPlan, material: QuantizationInputs
) -> tuple[Mapping[str, RoundingResult], dict[str, Any]]:
    """Codes by GPTQ on calibration text, and their facts for moec.json."""
    # Before calibration, which is slow: a block may not divide a dimension, or the target may refuse a format.
    material.check(material.program, Quantize(plan))
    text, tokens = _calibration_windows(settings, material.checkpoint)
    found = calibrate(material.in_float32(), plan, tokens, progress=material.progress)
    calibration = {
        "sha256": sha256_of_text(text),
        "windows": len(tokens),
        "length": settings.window,
        "tokens_per_expert": {name: list(counts) for name, counts in found.tokens.items()},
        "rounded_to_nearest": _fallbacks(found),
    }
    codes = {name: sha256_of(matrices_of(item.tensor)) for name, item in sorted(found.rounded.items())}
    return found.rounded, {"calibration": calibration, "codes": codes}


def _check_cache(settings: QuantizeRecipe, material: QuantizationInputs) -> None:
    """Refuse a KV cache in 8 bits before the text is read."""
    scales = unit_scales(material.program)
    if not scales:
        raise UsageError(
            f"--kv-cache {settings.kv_cache}: the model has no attention whose keys and values alone are its cache",
            hint="export without --kv-cache",
        )
    material.check(material.program, QuantizeCache(scales))


def _with_cache(
    found: Quantization,
    settings: QuantizeRecipe,
    material: QuantizationInputs,
    recorded: RecordedCalibration | None,
) -> Quantization:
    """`found` with a KV cache in 8 bits, whose scales are measured on the text or those of an artifact."""
    if recorded is not None:
        return replace(found, passes=(*found.passes, QuantizeCache(recorded.cache_scales)))
    text, tokens = _calibration_windows(settings, material.checkpoint)
    scales = measure_scales(
        material.in_float32(), tokens, lambda done, total: material.progress("scales of the KV cache", done, total)
    )
    facts = {
        "format": settings.kv_cache,
        "sha256": sha256_of_text(text),
        "windows": len(tokens),
        "length": settings.window,
        "scales": {name: sha256_of_scale(scale) for name, scale in sorted(scales.items())},
    }
    return Quantization(
        (*found.passes, QuantizeCache(scales)),
        {**(found.recorded or {}), "calibration": None, "calibration_sha256": facts["sha256"]},
        {**found.facts, "kv_cache": facts},
    )


def _kept(settings: QuantizeRecipe, program: Program, held: SupportedFormats) -> Quantization:
    activations = _activations(settings, held)
    keep = KeepCodes(held, activations)
    # The outcome for each weight is decided before any weight is written.
    kept = keep.decide(program).outcomes
    recorded = settings.model_dump(mode="json") | {"activations": activations.value}
    return Quantization((keep,), recorded, {"plan": KEEP, "kept": kept})


def _activations(settings: QuantizeRecipe, held: SupportedFormats) -> Activations:
    return held.activations if settings.activations == "auto" else Activations(settings.activations)


def _choose(settings: QuantizeRecipe, material: QuantizationInputs, offered: AvailableFormats) -> Choice:
    program, tokens = material.in_float32(), _calibration_windows(settings, material.checkpoint)[1]

    def by_gptq(plan: QuantizationPlan) -> Mapping[str, RoundingResult]:
        return calibrate(program, plan, tokens, progress=material.progress).rounded

    return choose(
        program,
        spread(tokens, SENSITIVITY_WINDOWS),
        offered,
        max_size=settings.max_size,
        max_increase=settings.max_perplexity_increase,
        rounding=NEAREST if settings.rounding == Method.RTN.value else Rounding(by_gptq, GptqOptions().clip),
        progress=material.progress,
    )


def _calibration_windows(settings: QuantizeRecipe, checkpoint: Checkpoint) -> tuple[str, np.ndarray]:
    text = calibration_text(settings)
    return text, spread(windows(tokenize(checkpoint.directory, text), settings.window), settings.windows)


def manifest_facts(quantization: Quantization, program: Program) -> dict[str, Any]:
    """The facts of quantization, with formats and relative errors per tensor class and layer.

    The errors are known once the tensors have been written. A relative error is the root of the squared error over the
    squared norm: of the outputs on the calibration text for GPTQ, else of the weights.
    """
    if not quantization.facts:
        return {}
    classes: dict[str, dict[str, Any]] = {}
    errors: dict[str, list[float]] = defaultdict(list)
    by_layer: dict[int, list[float]] = defaultdict(list)
    for name, role in weight_roles(program).items():
        tensor = program.weights[name]
        entry = classes.setdefault(role.tensor_class.value, {"formats": {}})
        chosen = _stored_as(tensor)
        entry["formats"][chosen] = entry["formats"].get(chosen, 0) + 1
        if isinstance(tensor, Coded):
            errors[role.tensor_class.value] += tensor.errors()
            by_layer[role.layer] += tensor.errors()
    for name, values in errors.items():
        if values:
            classes[name]["relative_error"] = _root_mean(values)
    layers = {
        f"layer {layer}" if layer >= 0 else "outside of layers": _root_mean(by_layer[layer])
        for layer in sorted(by_layer, key=lambda layer: (layer < 0, layer))
        if by_layer[layer]
    }
    weight_bytes = sum(tensor_bytes(program).values())
    return {**quantization.facts, "classes": classes, "layers": layers, "weight_bytes": weight_bytes}


def tensor_bytes(program: Program) -> dict[str, int]:
    """Tensor class -> bytes of its weights, each in its format, or in the Program's dtype if it is not quantized."""
    roles = weight_roles(program)
    found: dict[str, int] = defaultdict(int)
    for name in dict.fromkeys(map(program.weights.resolve, program.weight_names())):
        tensor = program.weights[name]
        chosen = tensor.format if isinstance(tensor, Coded) else FP16 if isinstance(tensor, Float16) else None
        tensor_class = roles[name].tensor_class if name in roles else TensorClass.OTHER
        found[tensor_class.value] += size_of(program, [name], chosen)
    return dict(sorted(found.items()))


def _root_mean(values: Sequence[float]) -> float:
    return round_significant(math.sqrt(math.fsum(values) / len(values)))


def _stored_as(tensor: LazyTensor) -> str:
    if isinstance(tensor, Coded):
        return str(tensor.format)
    return "fp16" if isinstance(tensor, Float16) else "none"


def _method(settings: QuantizeRecipe, plan: QuantizationPlan, checkpoint: Checkpoint) -> Method:
    formats = [chosen for _, chosen in plan.formats] + [override.format for override in plan.overrides]
    bits = [chosen.bits for chosen in formats if isinstance(chosen, IntegerFormat)]
    has_tokenizer = (checkpoint.directory / "tokenizer.json").is_file()
    if settings.rounding == Method.RTN.value or not bits:
        return Method.RTN
    if settings.rounding == Method.GPTQ.value:
        return Method.GPTQ
    return Method.GPTQ if 4 in bits and (has_tokenizer or settings.calibration is not None) else Method.RTN


def _fallbacks(found: Calibration) -> dict[str, dict[str, str]]:
    """Weight name -> index of an expert -> why it was rounded to nearest instead of by GPTQ."""
    listed = {
        name: {str(index): report.reason for index, report in enumerate(result.matrices) if report.reason}
        for name, result in found.rounded.items()
    }
    return {name: reasons for name, reasons in listed.items() if reasons}
