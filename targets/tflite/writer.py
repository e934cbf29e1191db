"""Writes a `.tflite` file: the flatbuffer, then the weights, with one slice of one weight in memory at a time.

The schema allows buffers outside the flatbuffer, at an offset from the start of the file, so that files may exceed the
2 GB that a flatbuffer can address. All weights are stored there, so nothing large is copied. Scales and offsets, which
are known last, are patched into the flatbuffer, which is then written to the start of the file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.common.errors import LoweringError
from moec.compiler.common.progress import Progress, in_megabytes
from moec.targets.tflite.library import module, schema
from moec.targets.tflite.model import Graph, Model, Operator, Tensor, Weight

S: Any = schema()
flatbuffers: Any = module("flatbuffers")

ALIGNMENT = 64
"""Alignment of weights in the file, for vector loads; LiteRT requires 16."""

IDENTIFIER = b"TFL3"
FLATBUFFER_LIMIT = 2**31 - 1
_VERSION = 3
_PENDING = 2  # any offset above 1 marks a buffer outside the flatbuffer; the real one is patched in

OPTIONS = {
    "ADD": "AddOptions",
    "ARG_MAX": "ArgMaxOptions",
    "ARG_MIN": "ArgMinOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "CAST": "CastOptions",
    "CONCATENATION": "ConcatenationOptions",
    "CONV_2D": "Conv2DOptions",
    "CUMSUM": "CumsumOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "DIV": "DivOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "GATHER": "GatherOptions",
    "GELU": "GeluOptions",
    "IF": "IfOptions",
    "MEAN": "ReducerOptions",
    "MUL": "MulOptions",
    "PACK": "PackOptions",
    "REDUCE_ALL": "ReducerOptions",
    "REDUCE_ANY": "ReducerOptions",
    "REDUCE_MAX": "ReducerOptions",
    "REDUCE_MIN": "ReducerOptions",
    "RESHAPE": "ReshapeOptions",
    "SOFTMAX": "SoftmaxOptions",
    "SPLIT": "SplitOptions",
    "SPLIT_V": "SplitVOptions",
    "STRIDED_SLICE": "StridedSliceOptions",
    "SUB": "SubOptions",
    "SUM": "ReducerOptions",
    "TRANSPOSE": "TransposeOptions",
    "UNPACK": "UnpackOptions",
    "WHILE": "WhileOptions",
}
"""Operator -> class of its options table, for operators with options."""

_SUBGRAPHS = {
    "IF": ("thenSubgraphIndex", "elseSubgraphIndex"),
    "WHILE": ("condSubgraphIndex", "bodySubgraphIndex"),
}
"""Operator -> the option fields with the indices of its two subgraphs."""

VERSIONS = {
    # The lowest version of each operator with the types and options that moec uses.
    "BATCH_MATMUL": 2,
    "BROADCAST_TO": 3,
    "CONCATENATION": 1,
    "DEPTHWISE_CONV_2D": 2,
    "DEQUANTIZE": 3,
    "EMBEDDING_LOOKUP": 1,
    "FULLY_CONNECTED": 6,
    "GATHER": 4,
    "PACK": 1,
    "SELECT_V2": 1,
    "SLICE": 1,
    "STRIDED_SLICE": 4,
    "TRANSPOSE": 1,
    "UNPACK": 4,
}


QUANTIZED_VERSIONS = {"DEQUANTIZE": 5, "EMBEDDING_LOOKUP": 4, "FULLY_CONNECTED": 12}
"""The same, for operators with a weight that has one scale per row."""


def write(model: Model, path: Path, progress: Progress) -> int:
    """Write `model` to `path`; the same model gives the same bytes.

    Returns:
        Bytes written.

    Raises:
        LoweringError: The graph without weights exceeds the maximum size of a flatbuffer.
    """
    packed = _Packer(model)
    header = packed.pack()
    weights = model.weights()
    total, done, told = sum(weight.nbytes for weight in weights), 0, in_megabytes(progress, "weights")
    offset = _aligned(len(header))
    with path.open("wb") as file:
        for weight in weights:
            told(done, total)
            done += weight.nbytes
            file.seek(offset)
            scales = _stream(weight, file.write)
            packed.place(header, weight, offset)
            offset = _aligned(offset + weight.nbytes)
            if weight.blockwise:
                file.seek(offset)
                file.write(scales.astype("<f2").tobytes())
                packed.place_scales(header, weight, offset)
                offset = _aligned(offset + 2 * weight.scale_count)
            elif weight.block:
                packed.fill_scales(header, weight, scales)
        file.truncate(offset)
        file.seek(0)
        file.write(header)
    told(done, total)
    return offset


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _stream(weight: Weight, write: Callable[[bytes], int]) -> np.ndarray:
    """Write the values of `weight` and return its scales, concatenated."""
    scales: list[np.ndarray] = []
    written = 0
    for data, own in weight.chunks():
        written += write(data.tobytes())
        if own is not None:
            scales.append(own.reshape(-1))
    found = sum(part.size for part in scales)
    if (written, found) != (weight.nbytes, weight.scale_count):
        raise LoweringError(
            f"{weight.name}: {written} bytes and {found} scales were written, but "
            f"{weight.nbytes} and {weight.scale_count} were planned"
        )
    return np.concatenate(scales) if scales else np.zeros(0, np.float32)


def _version(operator: Operator, graph: Graph) -> int:
    weights = (graph.tensors[index].weight for index in operator.inputs if index >= 0)
    plain = VERSIONS.get(operator.name, 1)
    return QUANTIZED_VERSIONS.get(operator.name, plain) if any(w is not None and w.block for w in weights) else plain


class _Packer:
    """Packs a model into a flatbuffer and records where to patch in the weights' offsets and scales."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._graphs = {graph: index for index, graph in enumerate(model.graphs())}
        self._builder = flatbuffers.Builder(1 << 20)
        self._shared: dict[Hashable, int] = {}
        self._buffers: list[int] = []
        self._buffer_of: dict[Hashable, int] = {}
        self._codes: dict[tuple[str, int], int] = {}
        self._offset_places: dict[Hashable, int] = {}
        self._scale_places: dict[Weight, int] = {}

    def pack(self) -> bytearray:
        """The flatbuffer, with placeholders for the weights' offsets and scales."""
        b = self._builder
        self._empty_buffer()
        graphs = [self._graph(graph) for graph in self._graphs]
        signatures = [self._signature(name, graph) for name, graph in self._model.signatures.items()]
        metadata = [self._metadata(name, data) for name, data in self._model.metadata.items()]
        codes = [self._operator_code(*code) for code in self._codes]
        description = b.CreateString(self._model.description)
        vectors = [self._table_vector(items) for items in (codes, graphs, self._buffers, metadata, signatures)]
        S.ModelStart(b)
        S.ModelAddVersion(b, _VERSION)
        S.ModelAddOperatorCodes(b, vectors[0])
        S.ModelAddSubgraphs(b, vectors[1])
        S.ModelAddDescription(b, description)
        S.ModelAddBuffers(b, vectors[2])
        S.ModelAddMetadata(b, vectors[3])
        S.ModelAddSignatureDefs(b, vectors[4])
        b.Finish(S.ModelEnd(b), IDENTIFIER)
        header: bytearray = bytearray(b.Output())
        if len(header) > FLATBUFFER_LIMIT:
            raise LoweringError(
                f"the graph without weights has {len(header)} bytes, but a flatbuffer holds at most {FLATBUFFER_LIMIT}",
                hint="build fewer prefill signatures (--prefill)",
            )
        # flatbuffers builds from the end, so positions were counted from there.
        for places in (self._offset_places, self._scale_places):
            for key in places:
                places[key] = len(header) - places[key]  # type: ignore[index]
        return header

    def place(self, header: bytearray, weight: Weight, offset: int) -> None:
        """Patch in the file offset of the values of `weight`."""
        struct.pack_into("<Q", header, self._offset_places[weight], offset)

    def place_scales(self, header: bytearray, weight: Weight, offset: int) -> None:
        """Patch in the file offset of the scale tensor of a blockwise `weight`."""
        struct.pack_into("<Q", header, self._offset_places["scales", weight], offset)

    def fill_scales(self, header: bytearray, weight: Weight, scales: np.ndarray) -> None:
        """Patch in the scales of a `weight` with one scale per row."""
        start = self._scale_places[weight]
        header[start : start + 4 * scales.size] = scales.astype("<f4").tobytes()

    # Buffers ----------------------------------------------------------------------------------------------------

    def _empty_buffer(self) -> None:
        S.BufferStart(self._builder)
        self._buffers.append(S.BufferEnd(self._builder))

    def _inline(self, data: bytes) -> int:
        if data not in self._buffer_of:
            b = self._builder
            b.StartVector(1, len(data), 16)
            b.head = b.head - len(data)
            b.Bytes[b.head : b.head + len(data)] = data
            vector = b.EndVector()
            S.BufferStart(b)
            S.BufferAddData(b, vector)
            self._buffer_of[data] = len(self._buffers)
            self._buffers.append(S.BufferEnd(b))
        return self._buffer_of[data]

    def _outside(self, key: Hashable, nbytes: int) -> int:
        if key not in self._buffer_of:
            b = self._builder
            S.BufferStart(b)
            S.BufferAddOffset(b, _PENDING)
            self._offset_places[key] = b.Offset()
            S.BufferAddSize(b, nbytes)
            self._buffer_of[key] = len(self._buffers)
            self._buffers.append(S.BufferEnd(b))
        return self._buffer_of[key]

    # Tables -----------------------------------------------------------------------------------------------------

    def _once(self, key: Hashable, make: Callable[[], int]) -> int:
        """The offset from `make()`, called once for each `key`: equal tables are stored once and shared."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _ints(self, values: Sequence[int]) -> int:
        array = np.asarray(values, np.int32)
        return self._once(("ints", array.tobytes()), lambda: int(self._builder.CreateNumpyVector(array)))

    def _table_vector(self, offsets: Sequence[int]) -> int:
        self._builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self._builder.PrependUOffsetTRelative(offset)
        return int(self._builder.EndVector())

    def _string(self, text: str) -> int:
        return self._once(("text", text), lambda: int(self._builder.CreateString(text)))

    def _graph(self, graph: Graph) -> int:
        b = self._builder
        tensors = self._table_vector([self._tensor(tensor, place) for place, tensor in enumerate(graph.tensors)])
        operators = self._table_vector([self._operator(operator, graph) for operator in graph.operators])
        inputs = self._ints([value.index for _, value in graph.inputs])
        outputs = self._ints([value.index for _, value in graph.outputs])
        name = self._string(graph.name)
        S.SubGraphStart(b)
        S.SubGraphAddTensors(b, tensors)
        S.SubGraphAddInputs(b, inputs)
        S.SubGraphAddOutputs(b, outputs)
        S.SubGraphAddOperators(b, operators)
        S.SubGraphAddName(b, name)
        return int(S.SubGraphEnd(b))

    def _tensor(self, tensor: Tensor, place: int) -> int:
        b = self._builder
        buffer = self._buffer(tensor)
        shape = self._ints(tensor.shape)
        name = self._string(tensor.name) if tensor.name else 0
        quantization = self._quantization(tensor.weight, place) if tensor.weight is not None else 0
        S.TensorStart(b)
        S.TensorAddShape(b, shape)
        S.TensorAddType(b, getattr(S.TensorType, tensor.dtype))
        S.TensorAddBuffer(b, buffer)
        if name:
            S.TensorAddName(b, name)
        if quantization:
            S.TensorAddQuantization(b, quantization)
        S.TensorAddHasRank(b, True)
        return int(S.TensorEnd(b))

    def _buffer(self, tensor: Tensor) -> int:
        if tensor.weight is not None:
            return self._outside(tensor.weight, tensor.weight.nbytes)
        if tensor.scales_of is not None:
            return self._outside(("scales", tensor.scales_of), 2 * tensor.scales_of.scale_count)
        return 0 if tensor.data is None else self._inline(tensor.data)

    def _quantization(self, weight: Weight, place: int) -> int:
        if not weight.block:
            return 0
        if weight.blockwise:
            # The scales are the next tensor of the same subgraph.
            return self._once(("blockwise", weight, place), lambda: self._blockwise(weight, place + 1))
        return self._once(("per row", weight), lambda: self._per_row(weight))

    def _per_row(self, weight: Weight) -> int:
        b, count = self._builder, weight.scale_count
        scales = b.CreateNumpyVector(np.zeros(count, np.float32))
        self._scale_places[weight] = scales - 4  # after the length of the vector
        zeros = self._once(("zeros", count), lambda: int(b.CreateNumpyVector(np.zeros(count, np.int64))))
        S.QuantizationParametersStart(b)
        S.QuantizationParametersAddScale(b, scales)
        S.QuantizationParametersAddZeroPoint(b, zeros)
        S.QuantizationParametersAddQuantizedDimension(b, 0)
        return int(S.QuantizationParametersEnd(b))

    def _blockwise(self, weight: Weight, scales: int) -> int:
        b = self._builder
        S.BlockwiseQuantizationStart(b)
        S.BlockwiseQuantizationAddScales(b, scales)
        S.BlockwiseQuantizationAddZeroPoints(b, -1)
        S.BlockwiseQuantizationAddBlockSize(b, weight.block)
        details = S.BlockwiseQuantizationEnd(b)
        S.QuantizationParametersStart(b)
        S.QuantizationParametersAddDetailsType(b, S.QuantizationDetails.BlockwiseQuantization)
        S.QuantizationParametersAddDetails(b, details)
        S.QuantizationParametersAddQuantizedDimension(b, 0)
        return int(S.QuantizationParametersEnd(b))

    def _operator(self, operator: Operator, graph: Graph) -> int:
        b = self._builder
        code = self._codes.setdefault((operator.name, _version(operator, graph)), len(self._codes))
        inputs, outputs = self._ints(operator.inputs), self._ints(operator.outputs)
        kind = OPTIONS.get(operator.name)
        options = self._options(kind, operator) if kind else 0
        S.OperatorStart(b)
        S.OperatorAddOpcodeIndex(b, code)
        S.OperatorAddInputs(b, inputs)
        S.OperatorAddOutputs(b, outputs)
        if kind:
            S.OperatorAddBuiltinOptionsType(b, getattr(S.BuiltinOptions, kind))
            S.OperatorAddBuiltinOptions(b, options)
        return int(S.OperatorEnd(b))

    def _options(self, kind: str, operator: Operator) -> int:
        fields = dict(operator.options)
        if operator.branches is not None:
            names = _SUBGRAPHS[operator.name]
            fields |= dict(zip(names, (self._graphs[branch] for branch in operator.branches), strict=True))
        key = (kind, tuple(sorted((name, str(value)) for name, value in fields.items())))
        return self._once(key, lambda: int(getattr(S, f"{kind}T")(**fields).Pack(self._builder)))

    def _operator_code(self, name: str, version: int) -> int:
        b, code = self._builder, getattr(S.BuiltinOperator, name)
        S.OperatorCodeStart(b)
        S.OperatorCodeAddDeprecatedBuiltinCode(b, min(code, 127))
        S.OperatorCodeAddVersion(b, version)
        S.OperatorCodeAddBuiltinCode(b, code)
        return int(S.OperatorCodeEnd(b))

    def _signature(self, key: str, graph: Graph) -> int:
        b = self._builder
        inputs = self._table_vector([self._tensor_map(name, value.index) for name, value in graph.inputs])
        outputs = self._table_vector([self._tensor_map(name, value.index) for name, value in graph.outputs])
        name = self._string(key)
        S.SignatureDefStart(b)
        S.SignatureDefAddInputs(b, inputs)
        S.SignatureDefAddOutputs(b, outputs)
        S.SignatureDefAddSignatureKey(b, name)
        S.SignatureDefAddSubgraphIndex(b, self._graphs[graph])
        return int(S.SignatureDefEnd(b))

    def _tensor_map(self, name: str, index: int) -> int:
        text = self._string(name)
        S.TensorMapStart(self._builder)
        S.TensorMapAddName(self._builder, text)
        S.TensorMapAddTensorIndex(self._builder, index)
        return int(S.TensorMapEnd(self._builder))

    def _metadata(self, name: str, data: bytes) -> int:
        buffer, text = self._inline(data), self._string(name)
        S.MetadataStart(self._builder)
        S.MetadataAddName(self._builder, text)
        S.MetadataAddBuffer(self._builder, buffer)
        return int(S.MetadataEnd(self._builder))
