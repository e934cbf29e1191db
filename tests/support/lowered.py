"""A model lowered to an ONNX file, for the targets that write one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from moec.compiler.ir.program import Program
from moec.targets.base import Lowered
from moec.targets.runners import Runner


@dataclass(frozen=True)
class Model:
    """A tiny model: its Program, the result of lowering, and a runner of the artifact (or of its ONNX twin)."""

    program: Program
    lowered: Lowered
    runner: Runner
    directory: Path

    def graph(self) -> ir.Graph:
        """The graph in the ONNX file."""
        return ir.load(self.directory / "model.onnx").graph
