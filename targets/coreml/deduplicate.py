"""Removes redundancy from a model's protobuf, so that the graph of many small experts stays small.

coremltools writes the name of each operation twice (as its attribute `name` and as the name of its output), numbers
values by op type (`not_equal_63`), and makes a constant for each use of a flag or an axis. This is a third of the bytes
of an expert's operations. Before and after, for `mul_76` of a graph with two constants of the same value:

    const()[name="cast_46_dtype_0", val="fp32"] -> cast_46_dtype_0    const()[name="v1", val="fp32"] -> v1
    const()[name="cast_47_dtype_0", val="fp32"] -> cast_47_dtype_0    mul(x="v0", y="w1_3_up") -> v2
    mul(x="silu_19", y="w1_3_up")[name="mul_76"] -> mul_76

Unchanged are: names that are not generated (weights, experts, inputs, outputs, states), operands, types, the order of
operations, and the `name` of constants, control flow and operations without outputs. Attributes of operations are
optional in the format (`MIL.proto`); Chromium's WebNN, which writes the same opset, sets `name` for constants only.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Collection, Iterator
from typing import Any, TypeAlias

CONST = "const"
Names: TypeAlias = ChainMap[str, str]
"""Old -> new name of a value, for one block and the blocks around it."""
Constants: TypeAlias = ChainMap[tuple[bytes, bytes], str]
"""Serialised type and value of a constant -> its name, for one block and the blocks around it."""


def compact(spec: Any) -> dict[str, dict[str, str]]:
    """Compact the ML program of a `Model` message in place.

    Returns:
        Function -> old name -> new name, for all renamed values outside of branches.
    """
    renamed: dict[str, dict[str, str]] = {}
    for name, function in spec.mlProgram.functions.items():
        names: Names = ChainMap({})
        for block in function.block_specializations.values():
            taken = {*(value.name for value in function.inputs), *block.outputs}
            _Function(taken, {operation.type for operation in _operations(block)}).compact(block, names, ChainMap({}))
        renamed[name] = dict(names)
    return renamed


def _operations(block: Any) -> Iterator[Any]:
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _operations(inner)


class _Function:
    """Renames values and merges constants of one function.

    Args:
        public: Names that must not change: inputs, outputs and states.
        op_types: Types of its operations, from which the builder generates names.
    """

    def __init__(self, public: Collection[str], op_types: Collection[str]) -> None:
        self._public = public
        # Generated names: mul_76; one of several outputs, split_25_1; an unnamed operand, cast_46_dtype_0.
        self._numbered = re.compile(rf"({'|'.join(sorted({*op_types, 'coreml_update_state'}))})_\d+(_[a-z_]+)?(_\d+)?")
        self._count = 0

    def compact(self, block: Any, names: Names, constants: Constants) -> None:
        """Compact a block and its nested blocks."""
        repeated = []
        for index, operation in enumerate(block.operations):
            for argument in operation.inputs.values():
                for binding in argument.arguments:
                    if binding.WhichOneof("binding") == "name":
                        binding.name = names.get(binding.name, binding.name)
            for inner in operation.blocks:
                self.compact(inner, names.new_child(), constants.new_child())
            if operation.type == CONST and self._is_repeated(operation, names, constants):
                repeated.append(index)
            else:
                self._rename(operation, names)
        for index in reversed(repeated):
            del block.operations[index]
        block.outputs[:] = [names.get(name, name) for name in block.outputs]

    def _is_repeated(self, operation: Any, names: Names, constants: Constants) -> bool:
        (output,) = operation.outputs
        if output.name in self._public or not self._numbered.fullmatch(output.name):
            return False
        key = tuple(item.SerializeToString(deterministic=True) for item in (output.type, operation.attributes["val"]))
        known = constants.get(key)
        if known is None:
            constants[key] = self._short(output.name)
            names[output.name] = constants[key]
            return False
        names[output.name] = known
        return True

    def _rename(self, operation: Any, names: Names) -> None:
        before = [output.name for output in operation.outputs]
        for output in operation.outputs:
            if output.name not in names.maps[0]:
                names[output.name] = self._short(output.name)
            output.name = names[output.name]
        if "name" not in operation.attributes:
            return
        label = operation.attributes["name"].immediateValue.tensor.strings
        if operation.type == CONST or operation.blocks:
            label.values[:] = [operation.outputs[0].name]
        elif not before:
            label.values[:] = [self._short(label.values[0])]
        elif before[0] in (label.values[0], f"{label.values[0]}_0"):
            del operation.attributes["name"]

    def _short(self, name: str) -> str:
        if name in self._public or not self._numbered.fullmatch(name):
            return name
        self._count += 1
        return f"v{self._count - 1}"
