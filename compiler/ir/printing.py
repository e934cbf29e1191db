"""The text of a Program, one line per node with named axes, for golden graphs, documents and debugging."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from moec.compiler.ir.program import Program

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.bool: "bool",
    torch.complex64: "c64",
}


def format_graph(program: Program) -> str:
    """Print the graph of `program`.

    A line reads `%name: dtype[shape] = op(arguments)`. A weight is written as `@name` where it is used; inputs come
    first and outputs last. Different graphs have different texts.
    """
    axes = {str(_expression(symbol)): axis for axis, symbol in reversed(list(program.dims.items()))}
    lines = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            lines.append(f"%{node.name}: {_type(node.meta['val'], axes)} = input")
        elif node.op == "get_attr" and not node.users:
            lines.append(f"unused @{node.target}")
        elif node.op == "call_function":
            arguments = [_argument(item) for item in node.args]
            arguments += [f"{key}={_argument(item)}" for key, item in node.kwargs.items()]
            lines.append(f"%{node.name}: {_type(node.meta['val'], axes)} = {target_name(node)}({', '.join(arguments)})")
        elif node.op == "output":
            lines.append(f"return {_argument(node.args[0])}")
    return "\n".join(lines) + "\n"


def target_name(node: fx.Node) -> str:
    """Short name of the op that `node` calls: "aten.add.Tensor", "moec.experts", "getitem"."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target))


def _argument(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return f"@{argument.target}" if argument.op == "get_attr" else f"%{argument.name}"
    if isinstance(argument, list | tuple):
        return f"[{', '.join(_argument(item) for item in argument)}]"
    if isinstance(argument, torch.dtype):
        return _DTYPES.get(argument, str(argument))
    return repr(argument) if isinstance(argument, str) else str(argument)


def _type(value: Any, axes: dict[str, str]) -> str:
    if isinstance(value, Tensor):
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{', '.join(_size(size, axes) for size in value.shape)}]"
    if isinstance(value, list | tuple):
        return f"({', '.join(_type(item, axes) for item in value)})"
    return f"size {_size(value, axes)}" if isinstance(value, torch.SymInt | int) else type(value).__name__


def _size(size: Any, axes: dict[str, str]) -> str:
    expression = _expression(size)
    symbols = getattr(expression, "free_symbols", ())
    text = str(expression)
    # Longest first, so that s1 is not replaced in s12.
    for symbol in sorted(map(str, symbols), key=len, reverse=True):
        text = text.replace(symbol, axes.get(symbol, symbol))
    return text


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
