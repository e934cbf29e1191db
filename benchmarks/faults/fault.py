"""What a fault is: a change of the Program that is lowered, of the files that were written, or of the runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moec.compiler.ir.program import Program
from moec.targets.runners import Runner

TARGETS = ("onnx", "tflite", "coreml", "tensorrt")

Change = Callable[[Program], Program]
"""A fault of the compiler: the Program that should be lowered -> the one that is."""


@dataclass(frozen=True)
class Fault:
    """A fault that is put into an artifact while the gates keep what the artifact should be.

    Attributes:
        kind: Part of the model or the artifact, by which the table is ordered.
        name: What is wrong, in words.
        model: A key of `models.MODELS`.
        program: Applied between the last pass and lowering.
        files: Applied to the directory of the artifact after lowering; the Program tells what is where.
        runner: Applied to the runner that the gates open.
        targets: Targets that can have the fault.
    """

    kind: str
    name: str
    model: str
    program: Change | None = None
    files: Callable[[Path, Program], None] | None = None
    runner: Callable[[Runner], Runner] | None = None
    targets: Sequence[str] = TARGETS
