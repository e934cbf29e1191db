"""Runs `model.onnx`, from which the engine was built, with ONNX Runtime on CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moec.targets.common.added_inputs import rows
from moec.targets.onnx.runner import OnnxRunner
from moec.targets.tensorrt.settings import ADDED_INPUTS


class TwinRunner(OnnxRunner):
    """The Runner of the TensorRT target without a GPU.

    Args:
        directory: The artifact.
        threads: Intra-op threads; 0 is ONNX Runtime's default.

    Raises:
        ArtifactError: ONNX Runtime cannot load the model.
    """

    def __init__(self, directory: Path, *, threads: int = 0) -> None:
        super().__init__(directory, threads=threads)
        added = json.loads(self.session.get_modelmeta().custom_metadata_map[ADDED_INPUTS])
        self.limits = replace(self.limits, stands_in="ONNX Runtime for TensorRT")
        self._widths: Mapping[str, int] = added["token_inputs"]
        shapes = {spec.name: spec.shape for spec in self.session.get_inputs()}
        self._defaults = {
            name: np.asarray(values, np.float32).reshape(shapes[name])
            for name, values in added["input_defaults"].items()
        }

    def added_inputs(self, batch: int, tokens: int) -> Mapping[str, np.ndarray]:
        """Arrays for all inputs that passes added, which have no defaults in this model."""
        return {**self._defaults, **self.overrides, **rows(self._widths, self.overrides, batch, tokens)}

    def facts(self) -> Mapping[str, Any]:
        """As in `OnnxRunner`, with a note that the model ran and not the engine."""
        return {**super().facts(), "executes": "model.onnx, from which the engine was built"}
