"""Faults that are put into ONNX models: experts that change places or are lost, attributes that are lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

Change = Callable[[onnx.ModelProto], None]


def with_fault(source: Path, target: Path, change: Change) -> Path:
    """Copy the directory `source` to `target` with `change` made to its model.onnx, all weights inside."""
    shutil.copytree(source, target)
    model = onnx.load(source / "model.onnx")
    change(model)
    for path in target.glob("model.onnx*"):
        path.unlink()
    onnx.save(model, target / "model.onnx")
    return target


def weights(model: onnx.ModelProto, part: str, change: Callable[[np.ndarray], None]) -> int:
    """Change every initializer whose name contains `part` in place; return how many there were."""
    found = 0
    for tensor in model.graph.initializer:
        if part in tensor.name:
            values = numpy_helper.to_array(tensor).copy()
            change(values)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
            found += 1
    return found


def exchange(first: int, second: int) -> Callable[[np.ndarray], None]:
    """Exchange two experts of a stack."""

    def change(values: np.ndarray) -> None:
        values[[first, second]] = values[[second, first]]

    return change


def zero(expert: int) -> Callable[[np.ndarray], None]:
    """Lose one expert of a stack."""

    def change(values: np.ndarray) -> None:
        values[expert] = 0

    return change


def attribute(kind: str, name: str, value: object) -> Change:
    """Set an attribute of every operator of a kind."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == kind:
                kept = [own for own in node.attribute if own.name != name]
                del node.attribute[:]
                node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def exchange_tensors(first: str, second: str) -> Change:
    """Exchange two initializers, by the ends of their names."""

    def change(model: onnx.ModelProto) -> None:
        one, other = (
            next(tensor for tensor in model.graph.initializer if tensor.name.endswith(end)) for end in (first, second)
        )
        one.name, other.name = other.name, one.name

    return change
