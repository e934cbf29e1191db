"""A model that is lowered to a file of ONNX, for every target that does so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from moec.compiler.ir.program import Program
from moec.targets.base import Lowered, Runner


@dataclass(frozen=True)
class Model:
    """A tiny model: its Program, what lowering said, and the artifact (or its twin of ONNX) opened."""

    program: Program
    lowered: Lowered
    runner: Runner
    directory: Path

    def graph(self) -> ir.Graph:
        """What the file holds."""
        return ir.load(self.directory / "model.onnx").graph
