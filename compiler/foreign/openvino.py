"""OpenVINO models: of transformers' and optimum's exporters, `ovc` and others, with states as inputs or inside.

They run on the CPU in float32. By default OpenVINO computes a float32 model in bfloat16 where the processor can, which
is the choice of a machine and not of the file; the report says which precision would be used here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import openvino as ov

from moec.compiler.common.errors import ArtifactError, CheckpointError, first_line
from moec.compiler.common.threads import threads_for
from moec.compiler.foreign.binding import Binding, Bindings, bind
from moec.compiler.foreign.cost import per_layer
from moec.compiler.foreign.model import Choices, Cost, ForeignModel, Unseen
from moec.compiler.foreign.stepping import Call, Feeds, SteppingRunner
from moec.compiler.ir.program import Program
from moec.targets.model_files import Operator, Port, StoredTensor
from moec.targets.runners import Runner

_FLOATS: Mapping[str, tuple[str, float]] = {"f32": ("fp32", 32), "f16": ("fp16", 16), "bf16": ("bf16", 16)}
_CODES: Mapping[str, int] = {"u8": 8, "i8": 8, "u4": 4, "i4": 4, "u2": 2}
_PRECISION = "INFERENCE_PRECISION_HINT"
_SKIPPED = frozenset({"Convert", "Subtract", "Multiply", "Reshape"})
"""Operators between codes and the product that reads their values."""


class OpenvinoModel(ForeignModel):
    """A model in OpenVINO's IR.

    Args:
        path: The `.xml` file; its weights are in the `.bin` beside it.

    Raises:
        ArtifactError: It is damaged.
    """

    format: ClassVar[str] = "OpenVINO"

    def __init__(self, path: Path) -> None:
        weights = path.with_suffix(".bin")
        self.path, self.files = path, (path, weights)
        if not weights.is_file():
            raise ArtifactError(f"{path}: its weights {weights.name} are missing")
        self._core = ov.Core()
        self._model = self._read()
        framework = dict(self._model.get_rt_info()).get("Runtime_version")
        self.producer = "OpenVINO " + (str(framework.value) if framework is not None else "of unknown release")
        self.runtime = f"OpenVINO {ov.__version__.split('-')[0]}, CPU"

    def _read(self) -> Any:
        try:
            return self._core.read_model(self.path)
        except RuntimeError as error:
            raise ArtifactError(f"{self.path}: not a readable OpenVINO model: {first_line(error)}") from error

    def tensors(self) -> Sequence[StoredTensor]:
        """The constants, in the order of the graph; codes with their scales."""
        return self._tensors

    @cached_property
    def _tensors(self) -> tuple[StoredTensor, ...]:
        constants = [node for node in self._model.get_ordered_ops() if node.get_type_name() == "Constant"]
        found = (_stored(index, node) for index, node in enumerate(constants))
        return tuple(tensor for tensor in found if tensor is not None)

    def operators(self) -> Sequence[Operator]:
        """The nodes, those of branches and loops included."""
        return tuple(_operators(self._model, branch=False))

    def _compiled(self, model: Any, threads: int) -> Any:
        settings: dict[str, Any] = {_PRECISION: "f32"}
        if wanted := threads_for(threads):
            settings["INFERENCE_NUM_THREADS"] = wanted
        try:
            return self._core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise ArtifactError(f"{self.path}: {self.runtime} cannot compile it: {first_line(error)}") from error

    def open(self, program: Program, bindings: Bindings, *, threads: int = 0) -> Runner:
        """See `ForeignModel.open`."""
        return self._runner(self._model, program, bindings, threads)

    def _runner(self, model: Any, program: Program, bindings: Bindings, threads: int) -> _OpenvinoRunner:
        if (count := len(model.get_variables())) not in (0, len(program.states)):
            raise CheckpointError(
                f"{self.path}: it keeps {count} states, the checkpoint {len(program.states)}",
                hint="give the checkpoint that the file was made from",
            )
        inputs, outputs = ([_port(own) for own in ports] for ports in (model.inputs, model.outputs))
        binding = bind(inputs, outputs, program, bindings, str(self.path), inside=count > 0)
        request = self._compiled(model, threads).create_infer_request()
        facts = {"format": self.format, "runtime": self.runtime, "threads": threads, **self._precision}
        return _OpenvinoRunner(request, binding, facts)

    @cached_property
    def _precision(self) -> Mapping[str, str]:
        """The precision that is used here, and the one that OpenVINO would choose on this machine."""
        usual = self._core.get_property("CPU", _PRECISION)
        return {"precision": "f32", "default_precision": getattr(usual, "type_name", str(usual))}

    def choices(self, program: Program, bindings: Bindings) -> Choices | Unseen:
        """The indices of every TopK over the experts, as outputs of a copy of the model."""
        copy = self._read()
        tops = [
            node for node in copy.get_ordered_ops() if node.get_type_name() == "TopK" and _over_experts(node, program)
        ]
        if len(tops) != len(program.layers):
            return Unseen(f"{len(tops)} routers were found in the graph, and the checkpoint has {len(program.layers)}")
        for number, node in enumerate(tops):
            copy.add_outputs(node.output(1)).pop().get_tensor().set_names({_chosen(number)})
        runner = self._runner(copy, program, bindings, 1)

        def chosen(ids: np.ndarray) -> Mapping[int, np.ndarray]:
            runner.prefill(ids)
            return {
                number: np.asarray(runner.last[_chosen(number)]).reshape(ids.shape[1], -1)
                for number in range(len(tops))
            }

        return chosen

    def cost(self, program: Program, bindings: Bindings) -> Cost | Unseen:  # noqa: ARG002
        """What OpenVINO made of the products with stacks of experts when it compiled the model."""
        nodes = self._compiled(self._model, 1).get_runtime_model().get_ops()
        kinds = Counter(str(_plain(node.get_rt_info()["layerType"])) for node in nodes)
        chosen, every = per_layer(program)
        if kinds["GatherMatmul"] >= 2 * len(program.layers):
            return Cost(chosen, "OpenVINO compiles the products to GatherMatmul, which takes the chosen experts alone")
        counts = {layer.num_experts for layer in program.layers}
        stacks = [node for node in self._model.get_ops() if node.get_type_name() == "MatMul" and _first(node) in counts]
        if len(stacks) >= 2 * len(program.layers):
            return Cost(every, "products of all tokens with the stack of all experts")
        return Unseen("its products have numbers of rows that are not in the file")


class _OpenvinoRunner(SteppingRunner):
    """Runs a model whose states are inputs, or inside it.

    Args:
        request: The request that keeps the states that are inside.
        binding: What its inputs and outputs are.
        facts: For the report.
    """

    def __init__(self, request: Any, binding: Binding, facts: Mapping[str, Any]) -> None:
        self._request, self.last = request, dict[str, np.ndarray]()
        call: Call = self._infer
        super().__init__(call, binding, facts)

    def reset(self) -> None:
        """Drop the sequence and its states."""
        self._request.reset_state()
        super().reset()

    def _infer(self, given: Feeds) -> Mapping[str, np.ndarray]:
        found = self._request.infer(given)
        self.last = {name: np.array(value) for port, value in found.items() for name in port.get_names()}
        return self.last


def _chosen(number: int) -> str:
    return f"moec.chosen.{number}"


def _port(own: Any) -> Port:
    sizes = tuple(size.get_length() if size.is_static else None for size in own.get_partial_shape())
    return Port(own.get_any_name(), sizes, np.dtype(own.get_element_type().to_dtype()))


def _first(node: Any) -> int | None:
    """Length of the first axis of a product of three axes."""
    shape = node.output(0).get_partial_shape()
    return shape[0].get_length() if len(shape) == 3 and shape[0].is_static else None


def _over_experts(node: Any, program: Program) -> bool:
    shape = node.input_value(0).get_partial_shape()
    size = shape[len(shape) - 1]
    counts = {layer.num_experts for layer in program.layers}
    return len(node.outputs()) == 2 and size.is_static and size.get_length() in counts


def _operators(model: Any, *, branch: bool) -> Iterator[Operator]:
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        yield Operator(kind, node.get_friendly_name(), _attributes(node) if kind not in {"If", "Loop"} else {}, branch)
        if kind in {"If", "Loop", "TensorIterator"}:
            bodies = [node.get_function(0), node.get_function(1)] if kind == "If" else [node.get_function()]
            for body in bodies:
                yield from _operators(body, branch=True)


def _attributes(node: Any) -> Mapping[str, Any]:
    return {name: _plain(value) for name, value in node.get_attributes().items()}


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _stored(index: int, node: Any) -> StoredTensor | None:
    """A constant with at least two axes of floats or codes; None for indices, shapes and scales."""
    kind, shape = node.get_element_type().get_type_name(), tuple(int(size) for size in node.get_output_shape(0))
    name = f"{index}.{node.get_friendly_name()}"
    if math.prod(shape) < 2:
        return None
    if kind in _FLOATS:
        if _is_scale(node):
            return None
        return StoredTensor(name, shape, *_FLOATS[kind], node.get_byte_size(), read=partial(_floats, node))
    if kind not in _CODES or len(shape) < 2 or _is_zero_point(node):
        return None
    chain = list(_values_of(node))
    whole = tuple(int(size) for size in chain[-1].get_output_shape(0)) if chain else shape
    block = shape[-1] if whole != shape else None
    beside = sum(other.get_byte_size() for own in chain for other in _constants(own) if other != node)
    label = f"int{_CODES[kind]}" + ("" if block is None else f", block {block}")
    read: Callable[[], np.ndarray] | None = partial(_decoded, node, chain) if chain else None
    return StoredTensor(name, whole, label, _CODES[kind], node.get_byte_size() + beside, block, read)


def _values_of(node: Any) -> Iterator[Any]:
    """The operators that make values of codes, in order."""
    while len(users := list(node.output(0).get_target_inputs())) == 1:
        node = users[0].get_node()
        if node.get_type_name() not in _SKIPPED:
            return
        yield node


def _constants(node: Any) -> list[Any]:
    """The constants that an operator reads, through conversions of their type."""
    found = []
    for own in node.input_values():
        other = own.get_node()
        while other.get_type_name() == "Convert":
            other = other.input_value(0).get_node()
        if other.get_type_name() == "Constant":
            found.append(other)
    return found


def _is_zero_point(node: Any) -> bool:
    """Whether a constant is subtracted from codes, after a conversion of its type."""
    for user in node.output(0).get_target_inputs():
        own, place = user.get_node(), user.get_index()
        while own.get_type_name() == "Convert":
            after = next(iter(own.output(0).get_target_inputs()))
            own, place = after.get_node(), after.get_index()
        if own.get_type_name() == "Subtract" and place == 1:
            return True
    return False


def _is_scale(node: Any) -> bool:
    """Whether a constant of floats scales codes or shifts them."""
    for user in node.output(0).get_target_inputs():
        own = user.get_node()
        others = [value.get_node() for value in own.input_values() if value.get_node() != node]
        while others and others[0].get_type_name() in _SKIPPED:
            others = [others[0].input_value(0).get_node()]
        if own.get_type_name() in {"Multiply", "Subtract"} and others and others[0].get_type_name() == "Constant":
            return others[0].get_element_type().get_type_name() in _CODES
    return False


def _floats(node: Any) -> np.ndarray:
    values: np.ndarray = node.get_data(dtype=np.float32)
    return values


def _decoded(node: Any, chain: Sequence[Any]) -> np.ndarray:
    """The values of codes: what the operators after them compute, with scales and zero points of the file."""
    values: np.ndarray = node.get_data(dtype=np.float32)
    for own in chain:
        kind = own.get_type_name()
        if kind == "Reshape":
            values = values.reshape(tuple(own.get_output_shape(0)))
        elif kind in {"Subtract", "Multiply"}:
            other = next(each for each in _constants(own) if each.get_friendly_name() != node.get_friendly_name())
            operand = other.get_data(dtype=np.float32)
            values = values - operand if kind == "Subtract" else values * operand
    return values
