"""What can be said of the inputs that a recipe names before anything is built."""

from __future__ import annotations

from moec.compiler.gates.quality import held_out_text
from moec.compiler.pipeline.gates import latency_options
from moec.compiler.pipeline.quantization import calibration_text, check_plan
from moec.compiler.pipeline.recipe import Recipe
from moec.compiler.pipeline.routing import check_routing


def check_inputs(recipe: Recipe) -> None:
    """Read the texts, the plan, the budgets and the baseline that the recipe names before anything is built.

    Raises:
        CheckpointError: A text is missing, empty or binary.
        UsageError: The plan, the routing or a budget is wrong, or the baseline is no artifact.
    """
    check_demands(recipe)
    if recipe.routing is not None:
        check_routing(recipe.routing)
    if recipe.quantize is not None and not recipe.quantize.does_nothing:
        calibration_text(recipe.quantize)
        check_plan(recipe.quantize)


def check_demands(recipe: Recipe) -> None:
    """The part of it that gates read.

    Raises:
        CheckpointError: The held-out text is missing, empty or binary.
        UsageError: A budget is wrong, or the baseline is no artifact.
    """
    latency_options(recipe)
    if recipe.quality is not None and recipe.quality.max_loss is not None:
        held_out_text(recipe.quality.text)
