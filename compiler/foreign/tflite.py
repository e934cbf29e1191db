"""TFLite files of litert-torch and others in LiteRT: signatures for prompts of fixed lengths and for one token.

A prompt is cut into the lengths that there are signatures for, and the rest is fed token by token. Signatures without
logits, which only fill the caches, are left out, and the report says so.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from moec.compiler.common.errors import ArtifactError, UsageError, first_line
from moec.compiler.common.threads import threads_for
from moec.compiler.foreign.binding import Binding, Bindings, bind
from moec.compiler.foreign.cost import per_layer
from moec.compiler.foreign.model import Choices, Cost, ForeignModel, Unseen
from moec.compiler.foreign.precision import EXPERTS, class_of
from moec.compiler.foreign.stepping import Call, Feeds, SteppingRunner, feeds
from moec.compiler.ir.program import Program
from moec.targets.model_files import Operator, Port, StoredTensor
from moec.targets.runners import Runner

_PLAIN: Mapping[str, tuple[str, float, str]] = {"FLOAT32": ("fp32", 32, "<f4"), "FLOAT16": ("fp16", 16, "<f2")}
_CODES: Mapping[str, int] = {"INT8": 8, "INT4": 4}
_LOOKUPS = frozenset({"GATHER", "GATHER_ND", "EMBEDDING_LOOKUP"})
_PRODUCTS = frozenset({"FULLY_CONNECTED", "BATCH_MATMUL"})
_MOVES = frozenset({"RESHAPE", "TRANSPOSE", "DEQUANTIZE", "SLICE", "STRIDED_SLICE", "SPLIT", "CAST"})


@dataclass(frozen=True)
class _Node:
    """An operator: its type, the graph it is in, and the indices of its inputs and outputs there."""

    kind: str
    graph: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class TfliteModel(ForeignModel):
    """A TFLite file.

    Args:
        path: The file.

    Raises:
        ArtifactError: It is damaged.
    """

    format: ClassVar[str] = "TFLite"

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, (path,)
        self._schema = importlib.import_module("ai_edge_litert.schema_py_generated")
        try:
            self._model = self._schema.ModelT.InitFromObj(self._schema.Model.GetRootAs(path.read_bytes(), 0))
        except Exception as error:  # the reader of flatbuffers raises what struct and numpy raise
            raise ArtifactError(f"{path}: not a readable TFLite file: {first_line(error)}") from error
        self.producer = (self._model.description or b"").decode(errors="replace").strip()
        self.runtime = f"ai-edge-litert {importlib.metadata.version('ai-edge-litert')}, CPU"

    def _name(self, table: str, value: int) -> str:
        names = vars(getattr(self._schema, table))
        return next((name for name, own in names.items() if own == value and not name.startswith("_")), str(value))

    def tensors(self) -> Sequence[StoredTensor]:
        """Every constant of floats or codes, once."""
        return tuple(self._constants.values())

    @cached_property
    def _constants(self) -> Mapping[int, StoredTensor]:
        """Index of a buffer -> the tensor that it holds."""
        found: dict[int, StoredTensor] = {}
        for graph in self._model.subgraphs:
            for tensor in graph.tensors:
                data = self._data(tensor.buffer)
                if not len(data) or tensor.buffer in found:
                    continue
                if (own := self._stored(tensor, data)) is not None:
                    found[tensor.buffer] = own
        return found

    def _data(self, index: int) -> np.ndarray:
        """The bytes of a buffer; large files have them behind the graph."""
        buffer = self._model.buffers[index]
        if buffer.offset > 1:
            return np.memmap(self.path, np.uint8, "r", offset=buffer.offset, shape=(buffer.size,))
        return np.zeros(0, np.uint8) if buffer.data is None else np.asarray(buffer.data, np.uint8)

    def _stored(self, tensor: Any, data: np.ndarray) -> StoredTensor | None:
        kind, shape = self._name("TensorType", tensor.type), tuple(int(size) for size in tensor.shape)
        name = (tensor.name or b"").decode(errors="replace") or f"buffer {tensor.buffer}"
        if kind in _PLAIN:
            precision, bits, dtype = _PLAIN[kind]
            return StoredTensor(name, shape, precision, bits, len(data), read=partial(_floats, data, dtype, shape))
        quantization = tensor.quantization
        if kind not in _CODES or quantization is None or quantization.scale is None or len(quantization.scale) == 0:
            return None
        scales = np.asarray(quantization.scale, dtype=np.float32)
        points = np.asarray(quantization.zeroPoint if quantization.zeroPoint is not None else [0])
        read = partial(_decoded, data, _CODES[kind], shape, scales, points, int(quantization.quantizedDimension or 0))
        return StoredTensor(name, shape, f"int{_CODES[kind]}", _CODES[kind], len(data) + scales.nbytes, read=read)

    def operators(self) -> Sequence[Operator]:
        """The nodes of all graphs; those after the graphs of the signatures are bodies of conditions and loops."""
        main = {signature.subgraphIndex for signature in self._model.signatureDefs or ()} or {0}
        return tuple(Operator(node.kind, node.kind, branch=node.graph not in main) for node in self._nodes())

    def _nodes(self) -> Iterator[_Node]:
        kinds = [
            self._name("BuiltinOperator", max(code.builtinCode, code.deprecatedBuiltinCode))
            for code in self._model.operatorCodes
        ]
        for index, graph in enumerate(self._model.subgraphs):
            for own in graph.operators:
                inputs, outputs = (tuple(int(at) for at in ports) for ports in (own.inputs, own.outputs))
                yield _Node(kinds[own.opcodeIndex], index, inputs, outputs)

    def _interpreter(self, threads: int, *, all_tensors: bool = False) -> Any:
        module = importlib.import_module("ai_edge_litert.interpreter")
        kinds = module.OpResolverType
        plain = {
            "experimental_preserve_all_tensors": True,
            "experimental_op_resolver_type": kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        }
        try:
            return module.Interpreter(
                model_path=str(self.path), num_threads=threads_for(threads) or None, **(plain if all_tensors else {})
            )
        except (RuntimeError, ValueError) as error:
            raise ArtifactError(f"{self.path}: {self.runtime} cannot load it: {first_line(error)}") from error

    def open(self, program: Program, bindings: Bindings, *, threads: int = 0) -> Runner:
        """See `ForeignModel.open`."""
        interpreter = self._interpreter(threads)
        steps, silent = dict[int, tuple[Call, Binding]](), list[str]()
        for name in interpreter.get_signature_list():
            call, inputs, outputs = _signature(interpreter, name)
            if not any(port.shape[-1:] == (program.vocab_size,) for port in outputs):
                silent.append(name)
                continue
            binding = bind(inputs, outputs, program, bindings, f"{self.path}, {name}")
            steps[binding.ids.shape[-1] or 1] = (call, binding)
        if 1 not in steps:
            raise UsageError(
                f"{self.path}: no signature takes one token and returns logits over {program.vocab_size} tokens",
                hint=f"signatures: {', '.join(interpreter.get_signature_list())}; is it the model of this checkpoint?",
            )
        facts = {"format": self.format, "runtime": self.runtime, "threads": threads, "prompts": sorted(steps)}
        return _TfliteRunner(steps, facts | ({"without_logits": silent} if silent else {}))

    def choices(self, program: Program, bindings: Bindings) -> Choices | Unseen:
        """The indices of every TOPK_V2 in the signature of one token, whose tensors are all kept."""
        interpreter = self._interpreter(1, all_tensors=True)
        for signature in self._model.signatureDefs or ():
            call, inputs, outputs = _signature(interpreter, signature.signatureKey.decode())
            if not any(port.shape[-1:] == (program.vocab_size,) for port in outputs):
                continue
            binding = bind(inputs, outputs, program, bindings, str(self.path))
            if binding.ids.shape[-1] == 1:
                return self._chosen(interpreter, signature.subgraphIndex, call, binding, program)
        return Unseen("no signature takes one token")

    def _chosen(self, interpreter: Any, graph: int, call: Call, binding: Binding, program: Program) -> Choices | Unseen:
        tensors = self._model.subgraphs[graph].tensors
        counts = {layer.num_experts for layer in program.layers}
        tops = [
            node.outputs[1]
            for node in self._nodes()
            if node.graph == graph and node.kind == "TOPK_V2" and int(tensors[node.inputs[0]].shape[-1]) in counts
        ]
        if len(tops) != len(program.layers):
            return Unseen(f"{len(tops)} routers were found in the graph, and the checkpoint has {len(program.layers)}")

        def chosen(ids: np.ndarray) -> Mapping[int, np.ndarray]:
            states = {own.input: np.zeros(own.shape, own.dtype) for own in binding.states}
            found: dict[int, list[np.ndarray]] = {layer: [] for layer in range(len(tops))}
            for position in range(ids.shape[1]):
                results = call(feeds(binding, ids[:, position : position + 1], position) | states)
                states = {own.input: results[own.output] for own in binding.states}
                for layer, at in enumerate(tops):
                    found[layer].append(np.array(interpreter.get_tensor(at, graph)).reshape(-1))
            return {layer: np.stack(rows) for layer, rows in found.items()}

        return chosen

    def cost(self, program: Program, bindings: Bindings) -> Cost | Unseen:  # noqa: ARG002
        """Whether weights of experts are looked up, in bodies of conditions, or factors of products of all tokens."""
        main = {signature.subgraphIndex for signature in self._model.signatureDefs or ()} or {0}
        held = {at for at, tensor in self._constants.items() if class_of(tensor, program) == EXPERTS}
        chosen, every = per_layer(program)
        kinds = set[str]()
        for index, graph in enumerate(self._model.subgraphs):
            carried = {at for at, tensor in enumerate(graph.tensors) if tensor.buffer in held}
            for node in (own for own in self._nodes() if own.graph == index and carried & set(own.inputs)):
                if node.kind in _MOVES:
                    carried |= set(node.outputs)
                elif node.kind in _LOOKUPS:
                    kinds.add("looked up")
                elif node.kind in _PRODUCTS:
                    kinds.add("whole" if index in main else "branch")
        if kinds == {"looked up"}:
            return Cost(chosen, "the weights of the chosen experts are looked up")
        if kinds == {"branch"}:
            return Cost(chosen, "the experts are in branches that run if a token chose them")
        if "whole" in kinds:
            return Cost(every, "products of all tokens with the weights of all experts")
        return Unseen("its weights of experts are read in a way that is not understood")


class _TfliteRunner(SteppingRunner):
    """Runs the signatures of a file.

    Args:
        steps: Number of tokens -> the signature that takes so many, and what its inputs and outputs are.
        facts: For the report.
    """

    def __init__(self, steps: Mapping[int, tuple[Call, Binding]], facts: Mapping[str, Any]) -> None:
        self._steps = dict(sorted(steps.items(), reverse=True))
        super().__init__(*steps[1], facts)

    def _step(self, ids: np.ndarray, states: Feeds, past: int) -> tuple[np.ndarray, Feeds]:
        found, start = list[np.ndarray](), 0
        while start < ids.shape[1]:
            size = next(length for length in self._steps if length <= ids.shape[1] - start)
            self._call, self._binding = self._steps[size]
            logits, states = super()._step(ids[:, start : start + size], states, past + start)
            found.append(logits)
            start += size
        return np.concatenate(found, axis=1), states


def _signature(interpreter: Any, name: str) -> tuple[Call, list[Port], list[Port]]:
    """What runs a signature, and its inputs and outputs."""
    runner = interpreter.get_signature_runner(name)
    inputs, outputs = (
        [Port(key, _shape(own), np.dtype(own["dtype"])) for key, own in details.items()]
        for details in (runner.get_input_details(), runner.get_output_details())
    )

    def call(given: Feeds) -> Mapping[str, np.ndarray]:
        return {key: np.array(value) for key, value in runner(**given).items()}

    return call, inputs, outputs


def _shape(details: Mapping[str, Any]) -> tuple[int | None, ...]:
    sizes = details.get("shape_signature", details["shape"])
    return tuple(None if size < 0 else int(size) for size in (sizes if len(sizes) else details["shape"]))


def _floats(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    values: np.ndarray = np.frombuffer(bytes(data), dtype).astype(np.float32).reshape(shape)
    return values


def _decoded(
    data: np.ndarray, bits: int, shape: tuple[int, ...], scales: np.ndarray, points: np.ndarray, axis: int
) -> np.ndarray:
    """(code - zero point) * scale; one scale for the tensor or for each index along `axis`."""
    codes = np.frombuffer(bytes(data), np.int8)
    if bits == 4:
        low, high = (codes << 4).astype(np.int8) >> 4, codes >> 4
        codes = np.stack([low, high], axis=-1).reshape(-1)[: math.prod(shape)]
    along = [1] * len(shape)
    if scales.size > 1:
        along[axis] = scales.size
    values: np.ndarray = codes.astype(np.float32).reshape(shape)
    shift = points.astype(np.float32) if points.size == 1 else points.astype(np.float32).reshape(along)
    decoded: np.ndarray = (values - shift) * scales.reshape(along if scales.size > 1 else ())
    return decoded
