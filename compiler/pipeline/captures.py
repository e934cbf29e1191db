"""Captured Programs of one checkpoint, shared by several builds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moec import passes
from moec.compiler.common.errors import CheckpointError
from moec.compiler.frontend.capture import capture
from moec.compiler.ir.fake_values import count_fixed_axes

if TYPE_CHECKING:
    import torch

    from moec.compiler.frontend.checkpoint import Checkpoint
    from moec.compiler.ir.program import Program
    from moec.passes.base import Pass

Prepared = tuple["Program", tuple[passes.PassRecord, ...]]
"""A Program after passes, and the log of these passes."""


@dataclass(frozen=True)
class _Held:
    program: Program
    settled: int
    prepared: dict[tuple[Pass, ...], Prepared] = field(default_factory=dict)


class Captures:
    """Captures a checkpoint once per dtype, and runs the passes that builds have in common once.

    Only one checkpoint is held at a time. Builds can share a Program because no pass, target or gate changes it. They
    also share the fake mode of its fake values, so if a failed build has fixed a dynamic axis there, the checkpoint is
    captured anew.
    """

    def __init__(self) -> None:
        self._checkpoint: Checkpoint | None = None
        self._held: dict[torch.dtype, _Held] = {}

    def of(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Program:
        """The captured Program; it is reused if directory, files and dtype are those of an earlier call.

        Raises:
            MoecError: As for `capture`.
        """
        if not self._is_held(checkpoint):
            self._checkpoint, self._held = None, {}
        held = self._held.get(dtype)
        if held is None or count_fixed_axes(held.program.graph) != held.settled:
            program = capture(checkpoint, dtype=dtype)
            held = self._held[dtype] = _Held(program, count_fixed_axes(program.graph))
            self._checkpoint = self._checkpoint or checkpoint
        return held.program

    def after(
        self, captured: Program, common: Sequence[Pass], told: Callable[[passes.PassRecord], None] | None = None
    ) -> Prepared:
        """The Program after passes, with their log; it is reused if the passes are those of an earlier call.

        Args:
            captured: The Program that `of` returned last for its dtype.
            common: The passes.
            told: Called after each pass that runs.

        Raises:
            MoecError: As for `run_passes`.
        """
        prepared, key = self._held[captured.dtype].prepared, tuple(common)
        if key not in prepared:
            prepared[key] = passes.run_passes(captured, common, told)
        return prepared[key]

    def _is_held(self, checkpoint: Checkpoint) -> bool:
        held = self._checkpoint
        if held is None or (held.directory, held.trust_remote_code) != (
            checkpoint.directory,
            checkpoint.trust_remote_code,
        ):
            return False
        try:
            return held.digests == checkpoint.digests
        except CheckpointError:
            return False  # its files were written to after they were opened
