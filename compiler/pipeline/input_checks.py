"""Checks of a recipe's inputs before anything is built."""

from __future__ import annotations

from moec.compiler.gates.quality import held_out_text
from moec.compiler.pipeline.gates import latency_options
from moec.compiler.pipeline.quantization import calibration_text, check_plan
from moec.compiler.pipeline.recipe import Recipe
from moec.compiler.pipeline.routing import check_routing


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
