"""Runs the experts of one layer alone, as a subgraph of `model.onnx` with the same nodes and weights.

The weights stay in the data file of the artifact, and one layer is loaded at a time. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from moec.compiler.common.errors import ArtifactError
from moec.targets.onnx.files import model_path
from moec.targets.onnx.runner import failed, session_options

LAYERS = "moec.layers"
"""Metadata key: for each MoE layer, the names and types of the values between which its experts lie."""

EXTERNAL_DATA = "session.model_external_initializers_file_folder_path"
NO_PREPACKING = "session.disable_prepacking"
PACKED = frozenset({"QMoE", "MatMulNBits"})
"""Kernels that always compute with prepacked weights: without prepacking, another kernel would be tested."""


class OnnxExperts:
    """Runs the experts of one layer; see `moec.targets.base.ExpertsRunner`.

    Args:
        directory: The artifact.
        threads: Intra-op threads; 0 is ONNX Runtime's default.

    Raises:
        ArtifactError: The model's metadata does not name the inputs and outputs of its layers.
    """

    def __init__(self, directory: Path, *, threads: int = 0) -> None:
        self._path, self._threads = model_path(directory), threads
        self._model = onnx.load(self._path, load_external_data=False)
        entries = {item.key: item.value for item in self._model.metadata_props}
        if LAYERS not in entries:
            raise ArtifactError(f"{self._path}: no MoE layers in its metadata", hint="export the model again")
        self._layers: list[dict[str, Any]] = json.loads(entries[LAYERS])
        self._makers = {name: node for node in self._model.graph.node for name in node.output}
        self._initializers = {item.name: item for item in self._model.graph.initializer}
        self._open: tuple[int, ort.InferenceSession] | None = None

    def __call__(self, layer: int, hidden: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Hidden states [T, H], indices [T, k], weights [T, k] -> [T, H] float32.

        Raises:
            ArtifactError: ONNX Runtime cannot load or run the experts.
        """
        if self._open is None or self._open[0] != layer:
            self._open = None  # one layer is open at a time
            self._open = (layer, self._session(layer))
        session = self._open[1]
        given = {"hidden_states": hidden, "indices": indices, "weights": weights}
        given["weight_sums"] = weights.sum(-1, keepdims=True)
        entry = self._layers[layer]
        feeds = {
            name: given[role].astype(onnx.helper.tensor_dtype_to_np_dtype(kind))
            for role, (name, kind) in entry.items()
            if role in given
        }
        wanted = {spec.name for spec in session.get_inputs()}
        try:
            (result,) = session.run(None, {name: value for name, value in feeds.items() if name in wanted})
        except Exception as error:  # the only common base class of ONNX Runtime's exceptions
            raise failed(error) from error
        return np.asarray(result).astype(np.float32, copy=False)

    def _session(self, layer: int) -> ort.InferenceSession:
        cut = self._cut(self._layers[layer])
        options = session_options(self._threads)
        options.add_session_config_entry(EXTERNAL_DATA, str(self._path.parent))
        if not any(node.op_type in PACKED for node in cut.graph.node):
            # Weights are used once, so a packed copy would only cost memory.
            options.add_session_config_entry(NO_PREPACKING, "1")
        try:
            return ort.InferenceSession(cut.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the only common base class of ONNX Runtime's exceptions
            raise ArtifactError(
                f"{self._path}: layer {layer}: ONNX Runtime cannot load its experts: {str(error).splitlines()[0]}"
            ) from error

    def _cut(self, entry: Mapping[str, tuple[str, int]]) -> onnx.ModelProto:
        """The subgraph between the operands of a layer's experts and their output."""
        operands = {name: kind for role, (name, kind) in entry.items() if role != "output"}
        result, kind = entry["output"]
        nodes: dict[int, onnx.NodeProto] = {}
        initializers: dict[str, onnx.TensorProto] = {}
        used: dict[str, int] = {}
        pending = [result]
        while pending:
            name = pending.pop()
            if name in operands:
                used[name] = operands[name]
            elif name in self._initializers:
                initializers[name] = self._initializers[name]
            elif name not in self._makers:
                raise ArtifactError(f"{self._path}: experts read {name}, which is not one of their inputs")
            elif id(self._makers[name]) not in nodes:
                node = self._makers[name]
                nodes[id(node)] = node
                pending += _reads(node)
        ordered = [node for node in self._model.graph.node if id(node) in nodes]
        info = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            ordered,
            "experts",
            [info(name, own, None) for name, own in used.items()],
            [info(result, kind, None)],
            list(initializers.values()),
        )
        return onnx.helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version, producer_name="moec"
        )


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names of the values that a node reads, including outer values that its branches and loop bodies read."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            body = attribute.g
            own = {value.name for value in body.input} | {item.name for item in body.initializer}
            own |= {name for inner in body.node for name in inner.output}
            reads = {name for inner in body.node for name in _reads(inner)} | {value.name for value in body.output}
            yield from sorted(reads - own)
