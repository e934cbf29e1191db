"""Refuses what a target cannot build before anything is calibrated, measured or written."""

from __future__ import annotations

from moec.compiler.common.errors import LoweringError
from moec.compiler.ir.program import Program
from moec.targets.base import Target, TargetOptions

NAMED = 5
"""Largest number of refusals in a message."""


def check_target(target: Target, program: Program, options: TargetOptions) -> None:
    """Check that a target can build a Program.

    Args:
        target: The target.
        program: The final Program, or one whose weights are not rounded yet.
        options: The target's options.

    Raises:
        LoweringError: The target refuses a part; the message names modules or tensors, and reasons.
    """
    refused = target.refusals(program, options)
    if not refused:
        return
    lines = [f"{rejection.where}: {rejection.reason}" for rejection in refused[:NAMED]]
    more = f" (and {len(refused) - NAMED} more)" if len(refused) > NAMED else ""
    hints = [rejection.hint for rejection in refused if rejection.hint]
    raise LoweringError(
        f"target {target.name} cannot build this model: {'; '.join(lines)}{more}",
        hint=hints[0] if hints else f"moec export --target {target.name} --help lists the options of the target",
    )
