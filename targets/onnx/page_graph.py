"""The graph of an artifact as a web page runs it: it also returns the routing, and its budget must be fed.

Nodes and weights are those of the artifact. ONNX Runtime web cannot feed an input that has a default (its sessions list
only inputs without one), so the default of a scalar input is taken out of the graph.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from moec.compiler.common.errors import UsageError
from moec.targets.onnx.experts import EXTERNAL_DATA, LAYERS
from moec.targets.onnx.files import model_path
from moec.targets.onnx.runner import session_options
from moec.targets.onnx.states import GrowingStates, zeros
from moec.targets.onnx.web import DATA_LIMIT


class PageGraph:
    """The graph of one artifact for a page; see `moec.targets.base.BrowserModel`.

    Args:
        directory: The artifact.

    Raises:
        UsageError: Its caches are buffers of onnxruntime-genai, or a data file is too large for a browser.
    """

    def __init__(self, directory: Path) -> None:
        path = model_path(directory)
        model = onnx.load(path, load_external_data=False)
        entries = {item.key: item.value for item in model.metadata_props}
        if entries.get("moec.attention") == "GroupQueryAttention":
            raise UsageError(
                f"{directory}: its caches have the form of onnxruntime-genai", hint="export with --flavor web"
            )
        self.path = path.relative_to(directory).as_posix()
        self.data = tuple(
            sorted((self._folder(name) for name in _data_files(model)), key=lambda name: (len(name), name))
        )
        for name in self.data:
            if (directory / name).stat().st_size > DATA_LIMIT:
                raise UsageError(f"{directory / name}: too large for a browser", hint="export with --flavor web")
        self.decoded_bytes = _decoded_bytes(model)
        self.routing = _add_routing(model, json.loads(entries[LAYERS]))
        self.scalars: Mapping[str, float] = _require_scalars(model)
        self.graph = model.SerializeToString()
        self._directory = path.parent

    def _folder(self, name: str) -> str:
        return (Path(self.path).parent / name).as_posix()

    def kept_shares(self, ids: Sequence[int], name: str) -> Callable[[float], float]:
        """See `moec.targets.base.BrowserModel`."""
        options = session_options(0)
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry(EXTERNAL_DATA, str(self._directory))
        session = ort.InferenceSession(self.graph, options, providers=["CPUExecutionProvider"])
        feeds = _prefill(session, ids)
        outputs = [weights for _, weights in self.routing]

        def share(value: float) -> float:
            scalars = {**self.scalars, name: value}
            found = session.run(outputs, feeds | {key: np.asarray(item, np.float32) for key, item in scalars.items()})
            used = sum(int(np.count_nonzero(row)) for row in found)
            return used / sum(int(row.size) for row in found)

        return share


def _data_files(model: onnx.ModelProto) -> set[str]:
    locations = (entry for item in model.graph.initializer for entry in item.external_data)
    return {entry.value for entry in locations if entry.key == "location"}


def _decoded_bytes(model: onnx.ModelProto) -> int:
    sizes = {item.name: math.prod(item.dims) for item in model.graph.initializer}
    decoded = (node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear")
    return sum(4 * sizes[name] for name in decoded if name in sizes)


def _add_routing(model: onnx.ModelProto, layers: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    """Make the indices and weights of every MoE layer outputs, and return their names."""
    known = {output.name for output in model.graph.output}
    names = []
    for layer in layers:
        for role in ("indices", "weights"):
            name, kind = layer[role]
            if name not in known:
                known.add(name)
                model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
        names.append((str(layer["indices"][0]), str(layer["weights"][0])))
    return tuple(names)


def _require_scalars(model: onnx.ModelProto) -> dict[str, float]:
    """Remove the defaults of scalar inputs in floating point, and return them by name."""
    kinds = {item.name: item.type.tensor_type for item in model.graph.input}
    scalars = {name for name, kind in kinds.items() if not kind.shape.dim and kind.elem_type == onnx.TensorProto.FLOAT}
    found = {
        item.name: float(onnx.numpy_helper.to_array(item)) for item in model.graph.initializer if item.name in scalars
    }
    kept = [item for item in model.graph.initializer if item.name not in found]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return found


def _prefill(session: ort.InferenceSession, ids: Sequence[int]) -> dict[str, Any]:
    """Feeds of a prefill of one sequence of token ids."""
    line = np.asarray([list(ids)], np.int64)
    feeds: dict[str, Any] = {
        "input_ids": line,
        "attention_mask": np.ones_like(line),
        "position_ids": np.arange(line.size, dtype=np.int64)[None],
    }
    names = {spec.name for spec in session.get_inputs()}
    states = {spec.name: zeros(spec, 1, 0) for spec in GrowingStates(session).specs}
    return {name: value for name, value in feeds.items() if name in names} | states
