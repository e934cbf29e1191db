"""Names and places of the files of an ONNX artifact. Imports neither torch nor onnx."""

from __future__ import annotations

from pathlib import Path

MODEL = "model.onnx"
"""Name of the graph that optimum and transformers.js look for; that of its data has `_data` after it."""
WEB_FOLDER = "onnx"
"""Folder in which transformers.js looks for models, unless it is told another one."""

PACKED = "prepacked_"
"""Beginning of the keys under which a constant names what kernels packed, in its file:
`KERNEL+DIGEST|OFFSET;BYTES;CHECKSUM|...`."""


def is_packed(path: Path) -> bool:
    """Whether the graph at `path` names constants that kernels packed; such constants are never in the graph itself."""
    return PACKED.encode() in path.read_bytes()


def model_path(directory: Path) -> Path:
    """The graph of the artifact in `directory`: `model.onnx`, or with `--flavor web` the one in the folder `onnx`."""
    path = directory / MODEL
    if not path.is_file() and (found := sorted((directory / WEB_FOLDER).glob("model*.onnx"))):
        return found[0]
    return path


def data_name(model: str, number: int) -> str:
    """Name of the data file of `number`, counted from 0, as transformers.js numbers them."""
    return f"{model}_data" + (f"_{number}" if number else "")
