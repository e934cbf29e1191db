"""A model file that no one would know to be moec's own: its ONNX graph alone, without moec.json and metadata."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import moec


@pytest.fixture(scope="session")
def foreign_onnx(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Quantization (None: float32) -> directory with the model.onnx of a tiny OLMoE."""
    made: dict[str | None, Path] = {}

    def make(quantize: str | None = None) -> Path:
        if quantize not in made:
            folder = tmp_path_factory.mktemp("foreign")
            settings = {} if quantize is None else {"quantize": {"format": quantize, "rounding": "rtn"}}
            moec.export(str(tiny_checkpoint("olmoe")), target="onnx", output=folder / "out", gates=False, **settings)
            model = onnx.load(folder / "out" / "model.onnx")
            del model.metadata_props[:]
            model.producer_name = "someone else"
            (folder / "file").mkdir()
            onnx.save(model, folder / "file" / "model.onnx")
            made[quantize] = folder / "file"
        return made[quantize]

    return make
