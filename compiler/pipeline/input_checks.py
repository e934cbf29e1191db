"""Checks of a recipe's inputs before anything is built."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from moec.compiler.common.errors import OutputError
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.quality import held_out_text
from moec.compiler.pipeline.gates import latency_options
from moec.compiler.pipeline.quantization import calibration_text, check_plan
from moec.compiler.pipeline.recipe import Recipe
from moec.compiler.pipeline.routing import check_routing

QUANTIZED_BITS, FLOAT_BITS = 4, {"fp32": 32, "fp16": 16}
"""Bits of a weight: the fewest of any quantized format, and those of a float."""
NEEDED_SHARE = 0.5
"""Share of a checkpoint's weights that an artifact surely needs; vision towers and heads for drafts are left out."""


def check_inputs(recipe: Recipe) -> None:
    """Read and check the texts, the quantization plan, the routing, the budgets and the baseline of a recipe.

    Raises:
        CheckpointError: A text is missing, empty or binary.
        UsageError: The plan, the routing or a budget is not valid, or the baseline is not an artifact.
    """
    check_demands(recipe)
    if recipe.routing is not None:
        check_routing(recipe.routing)
    if recipe.quantize is not None and not recipe.quantize.does_nothing:
        calibration_text(recipe.quantize)
        check_plan(recipe.quantize)


def check_demands(recipe: Recipe) -> None:
    """Check the sections that only gates read: the latency demands and the held-out text.

    Raises:
        CheckpointError: The held-out text is missing, empty or binary.
        UsageError: A budget is not valid, or the baseline is not an artifact.
    """
    latency_options(recipe)
    if recipe.quality is not None and recipe.quality.max_loss is not None:
        held_out_text(recipe.quality.text)


def check_space(recipe: Recipe, checkpoint: Checkpoint, output: Path) -> None:
    """Check that the disk of the output has room for the smallest artifact that the recipe could give.

    Args:
        recipe: The recipe, with a dtype.
        checkpoint: Its checkpoint, of which only the headers are read.
        output: Where the artifact will be.

    Raises:
        OutputError: It has not.
    """
    quantized = recipe.quantize is not None and not recipe.quantize.does_nothing
    bits = QUANTIZED_BITS if quantized else FLOAT_BITS[recipe.dtype or "fp16"]
    pruned = (recipe.routing.prune or 0) if recipe.routing is not None else 0
    count = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    needed = int(count * bits / 8 * (1 - pruned) * NEEDED_SHARE)
    place = next(path for path in output.expanduser().resolve().parents if path.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"{output}: the artifact takes at least {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free",
            hint="free some space, choose another disk with -o, or quantize: --quantize int4",
        )
