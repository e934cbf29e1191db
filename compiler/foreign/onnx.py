"""ONNX models: of onnxruntime-genai's builder, transformers' exporter, optimum, mobius and others.

They run in ONNX Runtime on CPU. Routers are seen by making the results of TopK outputs of a copy of the graph; the
weights stay where they are. The cost of experts is counted in a profile of ONNX Runtime, which has the shapes of every
product that was run.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.threads import should_spin, threads_for
from moec.compiler.foreign.binding import Binding, Bindings, bind
from moec.compiler.foreign.cost import computed_experts, per_layer
from moec.compiler.foreign.model import Choices, Cost, ForeignModel, Unseen
from moec.compiler.foreign.onnx_tensors import stored_tensors
from moec.compiler.foreign.routing import chosen_per_layer
from moec.compiler.foreign.stepping import Call, Feeds, SteppingRunner, feeds
from moec.compiler.ir.program import Program
from moec.targets.model_files import Operator, Port, Product, StoredTensor
from moec.targets.runners import Runner

_NUMPY: Mapping[str, str] = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}
_FUSED = frozenset({"MoE", "QMoE"})
"""Kernels that compute the chosen experts alone."""
_PRODUCTS = frozenset(
    {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulNBits", "MatMulInteger", "DynamicQuantizeMatMul"}
)


class OnnxModel(ForeignModel):
    """A model in ONNX.

    Args:
        path: The `.onnx` file.

    Raises:
        ArtifactError: It is damaged.
    """

    format: ClassVar[str] = "ONNX"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._model = ir.load(path)
        except Exception as error:  # parsers raise exceptions without a narrower common base class
            raise ArtifactError(f"{path}: not a readable ONNX model: {str(error).splitlines()[0]}") from error
        folder = path.parent
        data = {str(tensor.location) for tensor in self._external()}
        self.files = (path, *(folder / name for name in sorted(data)))
        if missing := [file.name for file in self.files if not file.is_file()]:
            raise ArtifactError(f"{path}: its data file {missing[0]} is missing")
        self.producer = " ".join(filter(None, (self._model.producer_name, self._model.producer_version)))
        self.runtime = f"onnxruntime {ort.__version__}, CPU"
        if any(tensor.precision == "fp16" and len(tensor.shape) > 1 for tensor in self.tensors()):
            self.float_precision = "fp16"

    def _external(self) -> Iterator[ir.ExternalTensor]:
        for value in self._model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value

    def tensors(self) -> Sequence[StoredTensor]:
        """The initializers; codes with their scales."""
        return self._tensors

    @cached_property
    def _tensors(self) -> tuple[StoredTensor, ...]:
        return tuple(stored_tensors(self._model.graph))

    def operators(self) -> Sequence[Operator]:
        """The nodes, those of branches and loops included."""
        return tuple(_operators(self._model.graph, branch=False))

    def open(self, program: Program, bindings: Bindings, *, threads: int = 0) -> Runner:
        """See `ForeignModel.open`."""
        session = self._session(_options(threads))
        facts = {"format": self.format, "runtime": self.runtime, "threads": threads}
        return SteppingRunner(_caller(session), self._bound(session, program, bindings), facts)

    def _session(self, options: ort.SessionOptions, model: bytes | None = None) -> ort.InferenceSession:
        if model is not None:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(self.path.parent.resolve())
            )
        try:
            return ort.InferenceSession(model or str(self.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the only common base class of ONNX Runtime's exceptions
            raise ArtifactError(
                f"{self.path}: {self.runtime} cannot load it: {str(error).splitlines()[0]}",
                hint="is the file for another runtime, device or version?",
            ) from error

    def _bound(self, session: Any, program: Program, bindings: Bindings) -> Binding:
        inputs, outputs = ([_port(spec) for spec in own] for own in (session.get_inputs(), session.get_outputs()))
        return bind(inputs, outputs, program, bindings, str(self.path))

    def choices(self, program: Program, bindings: Bindings) -> Choices | Unseen:
        """The indices of every TopK over the experts, or the largest inputs of fused experts."""
        candidates = list(_routers(self._model.graph))
        if not candidates:
            return Unseen("the graph has no TopK and no fused experts in which a router could be seen")
        copy = onnx.load(self.path, load_external_data=False)
        known = {value.name for value in copy.graph.output}
        wanted = dict.fromkeys(name for pair in candidates for name in pair if name)
        copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in wanted if name not in known)
        session = self._session(_options(1), copy.SerializeToString())
        binding, call = self._bound(session, program, bindings), _caller(session)

        def chosen(ids: np.ndarray) -> Mapping[int, np.ndarray]:
            results = call(
                feeds(binding, ids, 0) | {own.input: np.zeros(own.shape, own.dtype) for own in binding.states}
            )
            return chosen_per_layer(candidates, results, program, ids.shape[1])

        found = chosen(np.zeros((1, 1), np.int64))
        if len(found) != len(program.layers):
            return Unseen(f"{len(found)} routers were found in the graph, and the checkpoint has {len(program.layers)}")
        return chosen

    def cost(self, program: Program, bindings: Bindings) -> Cost | Unseen:
        """The products of one token in a profile of ONNX Runtime."""
        with tempfile.TemporaryDirectory() as folder:
            options = _options(1)
            options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
            session = self._session(options)
            SteppingRunner(_caller(session), self._bound(session, program, bindings), {"format": self.format}).prefill(
                np.zeros((1, 1), np.int64)
            )
            events = json.loads(Path(session.end_profiling()).read_text())
        run = [
            event["args"] for event in events if event["name"].endswith("_kernel_time") and "op_name" in event["args"]
        ]
        fused = sum(own["op_name"] in _FUSED for own in run)
        if fused == len(program.layers):
            return Cost(per_layer(program)[0], "one kernel computes the chosen experts alone")
        products = [product for own in run if own["op_name"] in _PRODUCTS for product in _products(own)]
        return Cost(computed_experts(products, program), "the products of one token in a profile")


def _options(threads: int) -> ort.SessionOptions:
    ort.set_default_logger_severity(3)  # kernels print warnings through the default logger
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads_for(threads)
    if not should_spin():
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def _caller(session: ort.InferenceSession) -> Call:
    names = [spec.name for spec in session.get_outputs()]

    def call(given: Feeds) -> Mapping[str, np.ndarray]:
        return dict(zip(names, session.run(names, given), strict=True))

    return call


def _port(spec: Any) -> Port:
    sizes = (int(size) if str(size).isdigit() else None for size in spec.shape or ())
    return Port(spec.name, tuple(sizes), np.dtype(_NUMPY.get(spec.type, "O")))


def _operators(graph: ir.Graph | ir.Function, *, branch: bool) -> Iterator[Operator]:
    for node in graph:
        values = {name: own.value for name, own in node.attributes.items()}
        bodies = [value for value in values.values() if isinstance(value, ir.Graph)]
        plain = {name: value for name, value in values.items() if not isinstance(value, ir.Graph)}
        yield Operator(node.op_type, node.name or "", plain, branch)
        for body in bodies:
            yield from _operators(body, branch=True)


def _routers(graph: ir.Graph) -> Iterator[tuple[str, str]]:
    """For each place that may be a router, the names of its indices (or empty) and of its scores."""
    top = [
        (str(node.outputs[1].name), str(node.inputs[0].name))
        for node in graph
        if node.op_type == "TopK" and node.inputs[0]
    ]
    if top:
        yield from top
        return
    for node in graph:
        if node.op_type in _FUSED and node.inputs[1] is not None:
            yield "", str(node.inputs[1].name)


def _products(event: Mapping[str, Any]) -> Iterator[Product]:
    """The product that a kernel computed, by the shapes of its first operand and its result.

    A profile does not list weights that a kernel has packed.
    """
    taken, made = (
        [tuple(shape) for own in event.get(key, ()) for shape in own.values()]
        for key in ("input_type_shape", "output_type_shape")
    )
    if taken and made and taken[0] and made[0]:
        yield Product(math.prod(made[0][:-1]), taken[0][-1], made[0][-1])
