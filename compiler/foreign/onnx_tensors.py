"""The weights in an ONNX graph, and which of them are codes of quantized weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from moec.targets.model_files import StoredTensor

_FLOATS: Mapping[str, tuple[str, float]] = {
    "FLOAT": ("fp32", 32),
    "DOUBLE": ("fp64", 64),
    "FLOAT16": ("fp16", 16),
    "BFLOAT16": ("bf16", 16),
}
_INTEGERS: Mapping[str, float] = {"INT8": 8, "UINT8": 8, "INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}


@dataclass(frozen=True, slots=True)
class _Codes:
    """How an operator reads an initializer.

    Attributes:
        bits: Bits of a code.
        block: Values of the last axis that share a scale; None: one scale for a row.
        shape: Shape of the values.
        scales: Name of the scales.
        points: Name of the zero points, or empty.
    """

    bits: int
    block: int | None
    shape: tuple[int, ...]
    scales: str
    points: str = ""


Values = Mapping[str, ir.TensorProtocol]
Found = Iterator[tuple[str, _Codes]]


def stored_tensors(graph: ir.Graph) -> Iterator[StoredTensor]:
    """Every float or code in `graph`, its branches included; scales and zero points count with their codes."""
    codes, values = dict[str, _Codes](), dict[str, ir.TensorProtocol]()
    for part in _graphs(graph):
        held = {name: value.const_value for name, value in part.initializers.items()}
        values |= {name: tensor for name, tensor in held.items() if tensor is not None}
    for part in _graphs(graph):
        for node in part:
            if node.op_type in _READERS:
                codes |= dict(_READERS[node.op_type](node, values))
    taken = {name for own in codes.values() for name in (own.scales, own.points)}
    for name, tensor in values.items():
        if name in codes:
            own = codes[name]
            size = tensor.nbytes + sum(values[other].nbytes for other in (own.scales, own.points) if other in values)
            block = "" if own.block is None else f", block {own.block}"
            read = partial(_decoded, own, tensor, values[own.scales], values.get(own.points))
            yield StoredTensor(name, own.shape, f"int{own.bits}{block}", own.bits, size, own.block, read)
        elif name not in taken and (found := _plain(name, tensor)) is not None:
            yield found


def _plain(name: str, tensor: ir.TensorProtocol) -> StoredTensor | None:
    """A tensor that no operator reads as codes; None for indices and shapes."""
    shape, kind = tuple(int(size) for size in tensor.shape.numpy()), tensor.dtype.name
    if kind in _FLOATS:
        precision, bits = _FLOATS[kind]
        return StoredTensor(name, shape, precision, bits, tensor.nbytes, read=partial(_floats, tensor))
    if kind in _INTEGERS and len(shape) > 1:
        return StoredTensor(name, shape, kind.lower(), _INTEGERS[kind], tensor.nbytes)
    return None


def _floats(tensor: ir.TensorProtocol) -> np.ndarray:
    return tensor.numpy().astype(np.float32)


def _decoded(
    own: _Codes, codes: ir.TensorProtocol, scales: ir.TensorProtocol, points: ir.TensorProtocol | None
) -> np.ndarray:
    """(code - zero point) * scale, [..., K] float32."""
    signed = codes.dtype.name.startswith("INT")
    values = _unpacked(codes.numpy(), own.bits, own.shape)
    groups = -(-own.shape[-1] // (own.block or own.shape[-1]))
    scale = scales.numpy().astype(np.float32).reshape(*own.shape[:-1], groups)
    zero = np.float32(0 if signed else 1 << (own.bits - 1))
    zeros = zero if points is None else _points(points.numpy(), own, groups)
    spread = partial(np.repeat, repeats=own.block or own.shape[-1], axis=-1)
    shift = zeros if np.ndim(zeros) == 0 else spread(zeros)[..., : own.shape[-1]]
    decoded: np.ndarray = (values - shift) * spread(scale)[..., : own.shape[-1]]
    return decoded


def _points(points: np.ndarray, own: _Codes, groups: int) -> np.ndarray:
    if points.size == math.prod(own.shape[:-1]) * groups:
        return points.astype(np.float32).reshape(*own.shape[:-1], groups)
    return _unpacked(points, own.bits, (*own.shape[:-1], groups))


def _unpacked(codes: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Codes [..., K] as float32; several to a byte, the lowest bits first, where an array of bytes is too short."""
    if codes.size == math.prod(shape):
        return codes.astype(np.float32).reshape(shape)
    raw = codes.view(np.uint8).reshape(*shape[:-1], -1)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    split = (raw[..., None] >> shifts) & ((1 << bits) - 1)
    found: np.ndarray = split.reshape(*shape[:-1], -1)[..., : shape[-1]].astype(np.float32)
    return found


def _graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    yield graph
    for node in graph:
        for own in node.attributes.values():
            if isinstance(own.value, ir.Graph):
                yield from _graphs(own.value)


def _number(node: ir.Node, name: str, default: int) -> int:
    own = node.attributes.get(name)
    return default if own is None else int(own.value)


def _name(node: ir.Node, place: int) -> str:
    value = node.inputs[place] if place < len(node.inputs) else None
    return "" if value is None else str(value.name)


def _shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor.shape.numpy())


def _experts(node: ir.Node, values: Values) -> Found:
    """`QMoE`: three stacks, each followed by its scales; zero points come last."""
    bits, block = _number(node, "expert_weight_bits", 4), _number(node, "block_size", 0)
    for place, points in ((2, 11), (5, 12), (8, 13)):
        if (name := _name(node, place)) in values:
            shape = _shape(values[name])
            whole = (*shape[:-1], shape[-1] * 8 // bits)
            yield name, _Codes(bits, block or None, whole, _name(node, place + 1), _name(node, points))


def _matrix(node: ir.Node, values: Values) -> Found:
    """`MatMulNBits`: codes of [N, K]."""
    if (name := _name(node, 1)) in values:
        shape, block = (_number(node, "N", 0), _number(node, "K", 0)), _number(node, "block_size", 0)
        yield name, _Codes(_number(node, "bits", 4), block or None, shape, _name(node, 2), _name(node, 3))


def _rows(node: ir.Node, values: Values) -> Found:
    """`GatherBlockQuantized`: codes of an embedding."""
    bits, block = _number(node, "bits", 4), _number(node, "block_size", 128)
    if (name := _name(node, 0)) in values:
        shape = _shape(values[name])
        packed = 8 // bits if values[name].dtype.name in {"UINT8", "INT8"} else 1
        yield name, _Codes(bits, block, (*shape[:-1], shape[-1] * packed), _name(node, 2), _name(node, 3))


def _dequantized(node: ir.Node, values: Values) -> Found:
    """`DequantizeLinear` of an initializer."""
    if (name := _name(node, 0)) in values and (bits := int(_INTEGERS.get(values[name].dtype.name, 0))):
        shape = _shape(values[name])
        if math.prod(shape) > 1:
            yield name, _Codes(bits, _number(node, "block_size", 0) or None, shape, _name(node, 1), _name(node, 2))


_READERS: Mapping[str, Callable[[ir.Node, Values], Found]] = {
    "QMoE": _experts,
    "MatMulNBits": _matrix,
    "GatherBlockQuantized": _rows,
    "DequantizeLinear": _dequantized,
}
