"""Runs the experts of one layer alone, as a separate `.tflite` file with the layer's operators and buffers.

LiteRT only runs whole subgraphs. The part of a signature between the inputs and the output of a layer's experts is
therefore written as a model of its own, with the branches that it calls and copies of their buffers. One layer is
written and loaded at a time. Imports no torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.threads import threads_for
from moec.targets.tflite.engine import cannot_load
from moec.targets.tflite.library import module, schema
from moec.targets.tflite.reader import TfliteFile

SIGNATURE = "experts"
ROLES = ("hidden_states", "indices", "weights", "output")
ALIGNMENT = 64
_OUTSIDE = 2  # any offset above 1 marks a buffer outside the flatbuffer; the real one is set after packing


class TfliteExperts:
    """Runs the experts of one signature, layer by layer; see `moec.targets.base.ExpertsRunner`.

    Args:
        file: The model.
        signature: "decode" or "prefill_N".
        threads: Threads; 0 is the runtime's default.
    """

    def __init__(self, file: TfliteFile, signature: str, threads: int) -> None:
        self._file, self._signature, self._threads = file, signature, threads
        self._layers: list[list[int]] = file.facts["layers"][signature]
        self._open: tuple[int, Any] | None = None

    def __call__(self, layer: int, hidden: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """hidden_states [T, H], indices [T, k], weights [T, k] -> [T, H] float32, in steps of the rows of the graph."""
        if self._open is None or self._open[0] != layer:
            self._open = None  # one layer is open at a time
            self._open = (layer, self._interpreter(layer))
        run = self._open[1].get_signature_runner(SIGNATURE)
        kinds = {name: item["dtype"] for name, item in run.get_input_details().items()}
        given = dict(zip(ROLES, (hidden, indices, weights), strict=False))
        # Models that give every slot of a token a row of its own have more rows than tokens.
        rows = int(run.get_input_details()["hidden_states"]["shape"][0])
        results = []
        for start in range(0, len(hidden), rows):
            feeds = {}
            for role, kind in kinds.items():
                piece = given[role][start : start + rows]
                padding = [(0, rows - len(piece)), (0, 0)]  # rows of weight 0
                feeds[role] = np.pad(piece.astype(kind), padding)
            results.append(np.array(run(**feeds)["output"]))
        return np.concatenate(results)[: len(hidden)]

    def _interpreter(self, layer: int) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "experts.tflite"
            write_layer(self._file, self._signature, self._layers[layer], path)
            try:
                interpreter = module("ai_edge_litert.interpreter").Interpreter(
                    model_path=str(path), num_threads=threads_for(self._threads) or None
                )
                interpreter.allocate_tensors()
            except (ValueError, RuntimeError, OSError) as error:
                raise cannot_load(path, "LiteRT", error) from error
            return interpreter  # the file is memory-mapped, so it may be deleted


def open_experts(path: Path, threads: int) -> Mapping[str, TfliteExperts]:
    """The experts of every signature of a model.

    Raises:
        ArtifactError: The model's metadata does not name the inputs and outputs of its layers.
    """
    file = TfliteFile(path)
    if "layers" not in file.facts:
        raise ArtifactError(f"{path}: no MoE layers in its metadata", hint="export the model again")
    return {name: TfliteExperts(file, name, threads) for name in file.facts["layers"]}


def write_layer(file: TfliteFile, signature: str, operands: list[int], path: Path) -> None:
    """Write the part of a signature that computes the fourth of `operands` from the other three, as a model."""
    part = _Submodel(file, signature, operands)
    header = part.pack()
    offset = -(-len(header) // ALIGNMENT) * ALIGNMENT
    for buffer, data in part.outside:
        buffer.offset, offset = offset, -(-(offset + len(data)) // ALIGNMENT) * ALIGNMENT
    placed = part.pack()
    if len(placed) != len(header):
        raise ArtifactError(f"{path}: the size of the flatbuffer changed when offsets were filled in")
    with path.open("wb") as out:
        out.write(placed)
        for buffer, data in part.outside:
            out.seek(buffer.offset)
            out.write(data.data)
        out.truncate(max(offset, len(placed)))


class _Submodel:
    """Part of a model, as objects of the schema's classes that can be packed into a flatbuffer.

    Args:
        file: The model.
        signature: The signature that the part is taken from.
        operands: Tensor indices in its subgraph, one for each of `ROLES`.
    """

    def __init__(self, file: TfliteFile, signature: str, operands: list[int]) -> None:
        self._s, self._file = schema(), file
        self.outside: list[tuple[Any, np.ndarray]] = []
        self._buffers: dict[int, int] = {0: 0}
        self._graphs: dict[int, int] = {}
        self._model = self._s.ModelT()
        self._model.version, self._model.buffers = 3, [self._s.BufferT()]
        source = file.model
        codes = (source.OperatorCodes(index) for index in range(source.OperatorCodesLength()))
        self._model.operatorCodes = [self._s.OperatorCodeT.InitFromObj(code) for code in codes]
        self._model.subgraphs = []
        place = next(
            source.SignatureDefs(index).SubgraphIndex()
            for index in range(source.SignatureDefsLength())
            if source.SignatureDefs(index).SignatureKey().decode() == signature
        )
        main = self._s.SubGraphT.InitFromObj(source.Subgraphs(place))
        *inputs, output = operands
        main.operators = _between(main, inputs, output)
        used = {int(index) for operator in main.operators for index in operator.inputs}
        kept = [(role, index) for role, index in zip(ROLES, inputs, strict=False) if index in used]
        main.inputs, main.outputs = [index for _, index in kept], [output]
        for index in main.inputs:
            # An operand may be a constant of the model. As an input it must have no buffer: LiteRT would write to it.
            main.tensors[index].buffer = 0
        self._model.subgraphs.append(main)
        self._adopt(main)
        self._model.signatureDefs = [self._definition(kept, main)]

    def pack(self) -> bytearray:
        """The packed flatbuffer."""
        builder = module("flatbuffers").Builder(1 << 16)
        builder.Finish(self._model.Pack(builder), b"TFL3")
        return bytearray(builder.Output())

    def _definition(self, kept: list[tuple[str, int]], main: Any) -> Any:
        definition = self._s.SignatureDefT()
        definition.signatureKey, definition.subgraphIndex = SIGNATURE, 0
        places = zip((role for role, _ in kept), main.inputs, strict=True)
        definition.inputs = [self._named(role, index) for role, index in places]
        definition.outputs = [self._named(ROLES[-1], main.outputs[0])]
        return definition

    def _named(self, name: str, index: int) -> Any:
        entry = self._s.TensorMapT()
        entry.name, entry.tensorIndex = name, index
        return entry

    def _adopt(self, graph: Any) -> None:
        """Renumber what a subgraph uses: its tensors, their buffers, and the subgraphs that it calls."""
        wanted = {int(index) for index in (*graph.inputs, *graph.outputs)}
        wanted |= {int(i) for operator in graph.operators for i in (*operator.inputs, *operator.outputs) if i >= 0}
        wanted |= {found for index in wanted if (found := _scales_of(graph.tensors[index])) is not None}
        order = sorted(wanted)
        number = {old: new for new, old in enumerate(order)}
        graph.tensors = [graph.tensors[index] for index in order]
        for tensor in graph.tensors:
            tensor.buffer = self._buffer(int(tensor.buffer))
            if (scales := _scales_of(tensor)) is not None:
                tensor.quantization.details.scales = number[scales]
        graph.inputs, graph.outputs = ([number[int(i)] for i in own] for own in (graph.inputs, graph.outputs))
        for operator in graph.operators:
            operator.inputs = [number.get(int(index), -1) for index in operator.inputs]
            operator.outputs = [number[int(index)] for index in operator.outputs]
            options = operator.builtinOptions
            if isinstance(options, self._s.IfOptionsT):
                options.thenSubgraphIndex = self._graph(options.thenSubgraphIndex)
                options.elseSubgraphIndex = self._graph(options.elseSubgraphIndex)

    def _graph(self, place: int) -> int:
        if place not in self._graphs:
            graph = self._s.SubGraphT.InitFromObj(self._file.model.Subgraphs(place))
            self._graphs[place] = len(self._model.subgraphs)
            self._model.subgraphs.append(graph)
            self._adopt(graph)
        return self._graphs[place]

    def _buffer(self, place: int) -> int:
        if place not in self._buffers:
            source, buffer = self._file.model.Buffers(place), self._s.BufferT()
            if source.Offset() > 1:
                buffer.offset, buffer.size = _OUTSIDE, source.Size()
                self.outside.append((buffer, self._file.buffer(place)))
            else:
                buffer.data = self._file.buffer(place)
            self._buffers[place] = len(self._model.buffers)
            self._model.buffers.append(buffer)
        return self._buffers[place]


def _between(graph: Any, inputs: list[int], output: int) -> list[Any]:
    """The operators that compute `output` from `inputs`, in order."""
    makers = {int(index): operator for operator in graph.operators for index in operator.outputs}
    found: dict[int, Any] = {}
    pending = [output]
    while pending:
        index = pending.pop()
        operator = makers.get(index)
        if index in inputs or operator is None or id(operator) in found:
            continue
        found[id(operator)] = operator
        pending += [int(own) for own in operator.inputs if own >= 0]
    return [operator for operator in graph.operators if id(operator) in found]


def _scales_of(tensor: Any) -> int | None:
    """Index of the tensor with the scales of a blockwise quantized weight; None for other tensors."""
    details = getattr(tensor.quantization, "details", None)
    return None if details is None or not hasattr(details, "scales") else int(details.scales)
