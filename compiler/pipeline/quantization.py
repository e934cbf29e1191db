"""From what a recipe says of quantization to a pass: the plan, calibrated rounding, and what moec.json records."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moec.compiler.common.digest import sha256_of_text
from moec.compiler.common.errors import CheckpointError
from moec.compiler.common.progress import Progress
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.program import Program
from moec.compiler.ir.weights import LazyTensor
from moec.compiler.pipeline.recipe import QuantizeRecipe
from moec.compiler.text.corpus import read_text, spread, tokenize, windows
from moec.passes.base import Pass
from moec.passes.keep_codes import KeepCodes
from moec.passes.quantize import Quantize
from moec.quantize.formats import FP16, Activations, IntegerFormat
from moec.quantize.keep import SupportedFormats
from moec.quantize.lazy import Coded, Float16
from moec.quantize.methods.calibrated import Calibration, calibrate
from moec.quantize.methods.gptq import GptqOptions
from moec.quantize.methods.rounding import Method, RoundingResult
from moec.quantize.plan import QuantizationPlan, TensorClass, requested, with_activations
from moec.quantize.planning.auto import Choice, choose, parse_size, round_significant
from moec.quantize.planning.sensitivity import NEAREST, AvailableFormats, Rounding, size_of
from moec.quantize.recorded import RecordedCodes, matrices_of, sha256_of
from moec.quantize.tensor_classes import weight_roles

KEEP = "keep"
"""The format that keeps the codes of a checkpoint that is stored quantized."""
SENSITIVITY_WINDOWS = 16
"""Windows that `auto` measures each part on: their divergences vary by a few percent, formats by factors."""


@dataclass(frozen=True)
class Quantization:
    """What quantization adds to an export.

    Attributes:
        passes: To run after the common ones and routing.
        recorded: The recipe's section for moec.json: with it the same Program comes out again, without a search.
        facts: What was decided and measured, for moec.json.
    """

    passes: tuple[Pass, ...] = ()
    recorded: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Material:
    """What a plan is made from.

    Attributes:
        checkpoint: Where the tokenizer comes from.
        program: The float Program after the common passes and routing.
        in_float32: Makes the same Program with activations in fp32, which calibration runs.
        check: Raises a LoweringError where the target has no form for the Program after a pass that quantizes it.
        progress: Told how far it is.
    """

    checkpoint: Checkpoint
    program: Program
    in_float32: Callable[[], Program]
    check: Callable[[Program, Pass], None]
    progress: Progress


def plan_quantization(
    settings: QuantizeRecipe | None,
    material: Material,
    held: SupportedFormats,
    recorded_codes: Mapping[str, RecordedCodes] | None,
) -> Quantization:
    """Decide a recipe's quantization. Text is read and the model run only where rounding or `auto` wants it.

    Args:
        settings: The section of the recipe.
        material: What it is decided from.
        held: What `keep` may leave as it is, and the formats that it may round to and `auto` may choose from.
        recorded_codes: Codes of an artifact of this recipe, which take the place of calibration; None where there is
            none yet.

    Raises:
        UsageError: The plan is wrong, or a block size does not divide a dimension.
        LoweringError: The target has no form for the formats of the plan.
        CheckpointError: There is no tokenizer, or the text does not serve.
    """
    if settings is None or settings.does_nothing:
        return Quantization()
    if settings.format == KEEP:
        return _kept(settings, material.program, held)
    chosen = _choose(settings, material, held.formats) if settings.format == "auto" else None
    plan = chosen.plan if chosen is not None else requested(settings.format)
    if settings.activations != Activations.FLOAT.value:
        plan = with_activations(plan, Activations(settings.activations))
    method = _method(settings, plan, material.checkpoint)
    if recorded_codes is not None:
        return Quantization((Quantize(plan, recorded=recorded_codes),))
    # Where the text lies is left out, as for the checkpoint; what of it counts is in the plan and the codes.
    fixed = {"format": plan.to_dict(), "rounding": method.value, "calibration": None}
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
    settings: QuantizeRecipe, plan: QuantizationPlan, material: Material
) -> tuple[Mapping[str, RoundingResult], dict[str, Any]]:
    """Codes by GPTQ on calibration text, and what moec.json says of them."""
    # Before anything is calibrated: a block may not divide, or a format have no form.
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


def _kept(settings: QuantizeRecipe, program: Program, held: SupportedFormats) -> Quantization:
    keep = KeepCodes(held, Activations(settings.activations))
    # What becomes of each weight is known before one is written.
    kept = keep.decide(program).outcomes
    return Quantization((keep,), settings.model_dump(mode="json"), {"plan": KEEP, "kept": kept})


def _choose(settings: QuantizeRecipe, material: Material, offered: AvailableFormats) -> Choice:
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


def check_plan(settings: QuantizeRecipe) -> None:
    """Read the plan of a recipe, as far as that goes without the model.

    Raises:
        UsageError: It is wrong.
    """
    if settings.format not in ("auto", KEEP):
        requested(settings.format)
    elif settings.max_size is not None:
        parse_size(settings.max_size, 0)


def calibration_text(settings: QuantizeRecipe) -> str:
    """The calibration text of a recipe.

    Raises:
        CheckpointError: It is missing, empty or binary, or not the text that the recipe names the digest of.
    """
    text = read_text(settings.calibration)
    if settings.calibration_sha256 not in {None, sha256_of_text(text)}:
        raise CheckpointError(
            f"{settings.calibration or 'the calibration text of moec'}: not the text that the recipe was made with",
            hint=f"give the text with sha256 {settings.calibration_sha256} (--calibration)",
        )
    return text


def manifest_facts(quantization: Quantization, program: Program) -> dict[str, Any]:
    """The facts, and formats and errors by tensor class and by layer, known once the tensors have been written.

    The error is the root of squared error over squared norm: of the outputs on the calibration text where GPTQ
    rounded, else of the weights.
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
    """Tensor class -> bytes of its weights: quantized ones in their formats, the others in the dtype of the Program."""
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
    """Name -> expert -> why it was rounded to nearest although GPTQ was asked for."""
    listed = {
        name: {str(index): report.reason for index, report in enumerate(result.matrices) if report.reason}
        for name, result in found.rounded.items()
    }
    return {name: reasons for name, reasons in listed.items() if reasons}
