"""From the routing section of a recipe to what stands in for dropped experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moec.compiler.common.digest import sha256_of_text
from moec.compiler.common.errors import CheckpointError
from moec.compiler.pipeline.calibration_data import CalibrationData
from moec.passes.routing.compensation import CompensateDropped
from moec.passes.routing.policies.base import Policy

if TYPE_CHECKING:
    from moec.compiler.common.progress import Progress
    from moec.compiler.pipeline.recipe import RoutingRecipe


def ranked(chosen: Policy, rank: int) -> Policy:
    """The policy with a compensation, which predicts what is missing if the kept weights stay as they are."""
    return replace(chosen, compensation=rank, renormalize=False) if rank else chosen


def check_text(settings: RoutingRecipe, material: CalibrationData) -> None:
    """Check that the calibration text is the one with which an artifact was made.

    Raises:
        CheckpointError: It has another digest than the recipe gives.
    """
    if settings.text_sha256 not in {None, sha256_of_text(material.text)}:
        raise CheckpointError(
            f"{settings.text or 'the calibration text of moec'}: not the text that the recipe was made with",
            hint=f"give the text with sha256 {settings.text_sha256} (--routing-text)",
        )


def compensation_pass(
    material: CalibrationData, chosen: Policy, removed: Sequence[Sequence[int]] | None, progress: Progress
) -> CompensateDropped:
    """The compensations of all layers, fitted on the pretrained model, for the experts that are left after pruning."""
    fitted = material.compensations(chosen, progress)
    gone = removed or [()] * len(fitted)
    return CompensateDropped(
        tuple(None if own is None else own.without(tuple(layer)) for own, layer in zip(fitted, gone, strict=True))
    )
