"""What a target cannot build is refused before anything is calibrated, measured or written."""

from __future__ import annotations

from moec.compiler.common.errors import LoweringError
from moec.compiler.ir.program import Program
from moec.targets.base import Target, TargetOptions

NAMED = 5
"""Most refusals that the message names."""


def check_target(target: Target, program: Program, options: TargetOptions) -> None:
    """Ask a target what it refuses.

    Args:
        target: Is asked.
        program: As it is to be lowered, or before codes of its weights are chosen.
        options: The target's options.

    Raises:
        LoweringError: Something; the message names the modules or tensors and the reasons.
    """
    refused = target.refusals(program, options)
    if not refused:
        return
    lines = [f"{rejection.where}: {rejection.reason}" for rejection in refused[:NAMED]]
    more = f" (and {len(refused) - NAMED} more)" if len(refused) > NAMED else ""
    hints = [rejection.hint for rejection in refused if rejection.hint]
    raise LoweringError(
        f"target {target.name} cannot build this model: {'; '.join(lines)}{more}",
        hint=hints[0] if hints else f"moec export --target {target.name} --help lists other forms",
    )
