"""Runs `model.onnx`, from which the engine was built, with ONNX Runtime on CPU: the twin that proves it anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moec.targets.base import RunnerLimits
from moec.targets.onnx.runner import OnnxRunner

DEFAULTS = "moec.input_defaults"
"""Metadata of the model: values of the inputs that a pass has added. An engine has no inputs with defaults."""


class TwinRunner(OnnxRunner):
    """The Runner of the TensorRT target where there is no GPU.

    Args:
        directory: The artifact.
        threads: Intra-op threads; 0 is ONNX Runtime's default.

    Raises:
        ArtifactError: ONNX Runtime cannot load the model.
    """

    def __init__(self, directory: Path, *, threads: int = 0) -> None:
        super().__init__(directory, threads=threads)
        defaults = json.loads(self.session.get_modelmeta().custom_metadata_map.get(DEFAULTS, "{}"))
        self.limits = RunnerLimits(stands_in="ONNX Runtime for TensorRT")
        for name, value in defaults.items():
            self.overrides[name] = np.asarray(value, np.float32)

    def facts(self) -> Mapping[str, Any]:
        """Runtime, and that it is not the engine that ran."""
        return {**super().facts(), "executes": "model.onnx, from which the engine was built"}
