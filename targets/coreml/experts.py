"""Runs the experts of one layer alone, by moec's executor on the operations of the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moec.compiler.common.errors import ArtifactError
from moec.targets.coreml.executor import MilModel
from moec.targets.coreml.metadata import LayerValues, read_metadata
from moec.targets.coreml.package import PACKAGE

CACHE_BYTES = 0  # a weight is used once


class CoremlExperts:
    """Runs the experts of one function, layer by layer; see `moec.targets.base.ExpertsRunner`.

    Args:
        model: The package.
        function: Name of the function.
        layers: For each MoE layer, the names of the inputs and the output of its experts.
        tokens: Maximum number of tokens per call.
    """

    def __init__(self, model: MilModel, function: str, layers: Sequence[LayerValues], tokens: int) -> None:
        self._model, self._function, self._layers, self._tokens = model, function, layers, tokens

    def __call__(self, layer: int, hidden: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """hidden_states [T, H], indices [T, k], weights [T, k] -> [T, H] float32."""
        *names, output = self._layers[layer]
        session = self._model.part(self._function, names, output)
        results = []
        for start in range(0, len(hidden), self._tokens):
            piece = slice(start, start + self._tokens)
            feeds = dict(zip(names, (hidden[piece], indices[piece], weights[piece]), strict=True))
            results.append(session.predict(feeds)[output].astype(np.float32, copy=False))
        return np.concatenate(results)


def open_experts(directory: Path) -> Mapping[str, CoremlExperts]:
    """The experts of every function of a package.

    Raises:
        ArtifactError: The package's metadata does not name the inputs and outputs of its layers.
    """
    metadata = read_metadata(directory)
    if not metadata.layers:
        raise ArtifactError(f"{directory / PACKAGE}: no MoE layers in its metadata", hint="export the model again")
    model = MilModel.open(directory / PACKAGE, cache_bytes=CACHE_BYTES)
    lengths = {name: 1 if name == "decode" else metadata.chunk for name in metadata.layers}
    return {name: CoremlExperts(model, name, metadata.layers[name], tokens) for name, tokens in lengths.items()}
