"""Checks of a recipe's inputs in a second: before torch is imported, and before a checkpoint is downloaded or captured.

What only the model can tell is checked later: `check_routing`, `Target.refusals` and the gates.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moec.compiler.common.digest import sha256_of_text
from moec.compiler.common.errors import CheckpointError, OutputError, UsageError
from moec.compiler.common.files import read_json
from moec.compiler.common.staging import check_output
from moec.compiler.measure.latency.demands import parse_budgets
from moec.compiler.pipeline.calibration_file import read_calibration_file
from moec.compiler.pipeline.recipe import QuantizeRecipe, Recipe, RoutingRecipe, target_of, with_target_defaults
from moec.compiler.text.corpus import held_out_text, read_text
from moec.quantize.plan import requested
from moec.targets.base import Target, TargetOptions

KEEP = "keep"
"""The format that keeps the codes of a quantized checkpoint."""
QUANTIZED_BITS, FLOAT_BITS = 4, {"fp32": 32, "fp16": 16}
"""Bits of a weight: the fewest of any quantized format, and those of a float."""
STORED_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}
"""Bits of a weight in a checkpoint whose config.json has this dtype."""
NEEDED_SHARE = 0.5
"""Share of a checkpoint's weights that an artifact surely needs; vision towers and heads for drafts are left out."""


def check_inputs(recipe: Recipe, output: Path, *, overwrite: bool) -> tuple[Recipe, Target, TargetOptions]:
    """Check the options, texts, formats, budgets and sizes of a recipe.

    Args:
        recipe: The recipe.
        output: Where the artifact will be.
        overwrite: Whether an artifact there may be replaced.

    Returns:
        The recipe with the defaults of its target, the target, and its options.

    Raises:
        MoecError: Something cannot work; subclass and message say what.
    """
    target, options = target_of(recipe)
    recipe = with_target_defaults(recipe, target)
    check_demands(recipe)
    if recipe.routing is not None:
        check_saving(recipe.routing)
    if recipe.quantize is not None and not recipe.quantize.does_nothing:
        calibration_text(recipe.quantize)
        if recipe.quantize.cache:
            target.check_cache(options, recipe.quantize.kv_cache)
        if recipe.quantize.format not in ("auto", KEEP):
            requested(recipe.quantize.format)
    if recipe.inputs_embeds and not target.takes_embeddings:
        raise UsageError(
            f"the target {target.name} does not support an input of embeddings", hint="export without --inputs-embeds"
        )
    check_output(output.expanduser().resolve(), overwrite=overwrite)
    if config := _config(recipe.checkpoint):
        target.check(options, config)
        _check_space(recipe, config, output)
    return recipe, target, options


def check_demands(recipe: Recipe) -> None:
    """Check the sections that only gates read, but for the baseline of latency.

    Raises:
        CheckpointError: The held-out text is missing, empty or binary.
        UsageError: A budget is not valid.
    """
    if recipe.latency is not None and recipe.latency.budget is not None:
        parse_budgets(recipe.latency.budget)
    if recipe.quality is not None and recipe.quality.max_loss is not None:
        held_out_text(recipe.quality.text)


def check_saving(settings: RoutingRecipe) -> None:
    """Check that a routing section says how much to save, and that its files can be read.

    Raises:
        UsageError: It has neither parameters nor a budget nor a bound, or the calibration file is not valid.
        CheckpointError: The calibration text is missing, empty or binary.
    """
    if settings.text is not None:
        read_text(settings.text)
    if settings.policy == "off" or settings.parameters is not None:
        return
    if settings.calibration is not None:
        read_calibration_file(Path(settings.calibration))
    elif settings.budget is None and settings.max_quality_loss is None:
        raise UsageError(
            f"the policy {settings.policy} has neither parameters nor a budget nor a quality bound",
            hint="give --expert-budget, --max-quality-loss or --calibration",
        )


def calibration_text(settings: QuantizeRecipe) -> str:
    """The calibration text of a recipe.

    Raises:
        CheckpointError: The text is missing, empty or binary, or does not have the digest that the recipe gives.
    """
    text = read_text(settings.calibration)
    if settings.calibration_sha256 not in {None, sha256_of_text(text)}:
        raise CheckpointError(
            f"{settings.calibration or 'the calibration text of moec'}: not the text that the recipe was made with",
            hint=f"give the text with sha256 {settings.calibration_sha256} (--calibration)",
        )
    return text


def _config(checkpoint: str) -> Mapping[str, Any]:
    """config.json of a checkpoint in a directory; empty if it is elsewhere, or has none.

    Raises:
        CheckpointError: It is not JSON.
    """
    path = Path(checkpoint).expanduser() / "config.json"
    if not path.is_file():
        return {}
    return read_json(path, CheckpointError, hint="download the file again")


def _check_space(recipe: Recipe, config: Mapping[str, Any], output: Path) -> None:
    """Check that the disk of the output has room for the smallest artifact that the recipe could give.

    Raises:
        OutputError: It has not.
    """
    stored = STORED_BITS.get(str(config.get("dtype") or config.get("torch_dtype")))
    if stored is None or "quantization_config" in config:
        return
    files = Path(recipe.checkpoint).expanduser().glob("model*.safetensors")
    weights = 8 * sum(path.stat().st_size for path in files) / stored
    quantized = recipe.quantize is not None and recipe.quantize.weights
    bits = QUANTIZED_BITS if quantized else FLOAT_BITS[recipe.dtype or "fp16"]
    pruned = (recipe.routing.prune or 0) if recipe.routing is not None else 0
    needed = weights * bits / 8 * (1 - pruned) * NEEDED_SHARE
    place = next(path for path in output.expanduser().resolve().parents if path.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"{output}: the artifact takes at least {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free",
            hint="free some space, choose another disk with -o, or quantize: --quantize int4",
        )
