"""The formats of other exporters, found by what is in a file and not by its name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from moec.compiler.common.errors import MissingExtraError, UsageError
from moec.compiler.foreign.model import ForeignModel
from moec.targets import get_target, target_names
from moec.targets.model_files import FileFormat, ModelFile

HEAD = 4096
"""Bytes at the start of a file by which it is recognised."""


def _open(form: FileFormat[ForeignModel], path: Path) -> ForeignModel:
    """Open a file.

    Raises:
        MissingExtraError: Its runtime is not installed.
        ArtifactError: It is damaged.
    """
    module, extra = form.needs
    if module and importlib.util.find_spec(module) is None:
        raise MissingExtraError(
            f"{path}: {form.name} needs {module}, which is not installed", hint=f"pip install 'moec[{extra}]'"
        )
    return form.open(path)


def _opener(place: str, name: str) -> Callable[[Path], ForeignModel]:
    """The class `name` of a module of this package, which is imported when a file is opened."""

    def opened(path: Path) -> ForeignModel:
        model: ForeignModel = getattr(importlib.import_module(f"moec.compiler.foreign.{place}"), name)(path)
        return model

    return opened


def _is_onnx(path: Path, head: bytes) -> bool:
    """Whether a file is a protobuf that starts with a version and holds a graph with nodes."""
    if head[:1] != b"\x08":
        return False
    import onnx

    try:
        return bool(onnx.load(path, load_external_data=False).graph.node)
    except Exception:  # noqa: BLE001 - protobuf's exceptions have no narrower common base class
        return False


def _is_openvino(path: Path, head: bytes) -> bool:  # noqa: ARG001
    return head.lstrip()[:5] == b"<?xml" and b"<net " in head


def _is_tflite(path: Path, head: bytes) -> bool:  # noqa: ARG001
    return head[4:8] == b"TFL3"


def _is_gguf(path: Path, head: bytes) -> bool:  # noqa: ARG001
    return head[:4] == b"GGUF"


FORMATS: tuple[FileFormat[ForeignModel], ...] = (
    FileFormat("ONNX", "a protobuf with a graph", _is_onnx, _opener("onnx", "OnnxModel")),
    FileFormat(
        "OpenVINO", "XML with a net", _is_openvino, _opener("openvino", "OpenvinoModel"), ("openvino", "openvino")
    ),
    FileFormat(
        "TFLite", "the letters TFL3", _is_tflite, _opener("tflite", "TfliteModel"), ("ai_edge_litert", "tflite")
    ),
    FileFormat("GGUF", "the letters GGUF", _is_gguf, _opener("gguf", "GgufModel"), ("llama_cpp", "gguf")),
)
"""The formats whose runtimes are known here."""


def formats() -> tuple[FileFormat[ForeignModel], ...]:
    """Every format that can be judged, those of targets included."""
    offered = (form for name in target_names() if (form := get_target(name).file_format()) is not None)
    return (
        *FORMATS,
        *(FileFormat(own.name, own.sign, own.matches, partial(_by_target, own), own.needs) for own in offered),
    )


def _by_target(form: FileFormat[ModelFile], path: Path) -> ForeignModel:
    from moec.compiler.foreign.by_target import TargetFile

    return TargetFile(path, form)


def recognise(path: Path) -> ForeignModel:
    """Open a file or directory of another exporter.

    Raises:
        UsageError: It does not exist, no format fits, or a directory holds several models.
        MissingExtraError: Its runtime is not installed.
        ArtifactError: It is damaged.
    """
    if not path.exists():
        raise UsageError(f"{path}: there is no such file or directory", hint="give a model file, or its directory")
    found = [(own, form) for own in (path, *_inside(path)) if (form := _format(own)) is not None]
    if not found:
        signs = "; ".join(f"{form.name}: {form.sign}" for form in formats())
        raise UsageError(
            f"{path}: no artifact of moec (it has no moec.json), and no model of a known format",
            hint=f"looked for {signs}",
        )
    chosen = found if len(found) == 1 else [(own, form) for own, form in found if own.stem in MAIN]
    if len(chosen) != 1:
        names = ", ".join(own.name for own, _ in found)
        raise UsageError(f"{path}: it holds several models: {names}", hint="give one of these files")
    location, form = chosen[0]
    return _open(form, location)


MAIN = ("model", "openvino_model", "decoder_model_merged")
"""Stems of the model itself where tokenizers and other parts are models too."""


def _inside(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from sorted(own for own in path.iterdir() if not own.name.startswith("."))


def _format(path: Path) -> FileFormat[ForeignModel] | None:
    head = b""
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(HEAD)
    return next((form for form in formats() if form.matches(path, head)), None)
