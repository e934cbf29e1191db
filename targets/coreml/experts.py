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
        # Models that give every slot of a token a row of its own have more rows than tokens.
        fixed = (session.inputs[names[0]].type.shape or (None,))[0]
        rows = fixed or self._tokens
        results: list[np.ndarray] = []
        for start in range(0, len(hidden), rows):
            pieces = [value[start : start + rows] for value in (hidden, indices, weights)]
            if fixed:  # the last call is filled up with rows of weight 0
                pieces = [np.pad(piece, [(0, fixed - len(piece)), (0, 0)]) for piece in pieces]
            found = session.predict(dict(zip(names, pieces, strict=True)))[output]
            results.append(found.astype(np.float32, copy=False))
        return np.concatenate(results)[: len(hidden)]


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
