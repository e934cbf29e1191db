"""Writes a model with its weights as the kernels of this machine read them, which ONNX Runtime then maps into memory.

`QMoE`, `MatMulNBits` and `MatMul` pack their constant weights when a model is opened, into private memory. ONNX Runtime
can write what it packed beside the original weights. When it opens that model it packs each tensor once more, compares
a digest, and takes the stored copy, whose pages it maps. So a file of another processor or version does no harm: the
digests differ and the weights are private memory again. The original weights must be there for this; they are read when
a model is opened and never again.

ONNX Runtime packs all constants of a model, and holds them all while it does. So it is given the graph several times,
each time with other weights as constants and the rest as inputs, and what it packed is gathered into one file.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnxruntime as ort

from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.files import partial_prefix
from moec.targets.onnx.experts import EXTERNAL_DATA, LAYERS
from moec.targets.onnx.files import MODEL, PACKED, WEB_FOLDER, data_name, model_path
from moec.targets.onnx.runner import OnnxRunner, session_options

TOGETHER = 256 << 20
"""Bytes of weights that are packed at a time, but those of one node at least."""
PAGE = 4096
"""Offsets of packed weights are multiples of this, as ONNX Runtime writes them, so that they can be mapped."""
PIECE = 1 << 24
"""Bytes that are copied at a time."""
DATA = "packed.data"
"""Name of ONNX Runtime's file for one group of weights."""
LARGE = 1 << 29
"""Bytes of weights from which gates open a packed copy: it costs 6 s of CPU time and 2 GB of disk for each GB, and the
weights of an artifact as it is would all be private memory."""
COPIES = 2.5
"""Free space that this takes at most, relative to the artifact."""


def pack(directory: Path, output: Path) -> OnnxRunner:
    """Write the model and its data files into `output`.

    Args:
        directory: The artifact.
        output: An empty directory.

    Returns:
        A runner of the artifact's own weights, on one thread.

    Raises:
        ArtifactError: ONNX Runtime cannot load the model, or cannot write the packed one.
    """
    if model_path(directory).parent.name == WEB_FOLDER:
        return _write_decoded(directory, output)
    write_packed(directory, output)
    return OnnxRunner(directory, threads=1)


def _write_decoded(directory: Path, output: Path) -> OnnxRunner:
    """`pack` for a model whose weights ONNX Runtime decodes when it opens it: it writes them with the whole model."""
    options = session_options(1)
    _write_what_is_packed(options, output / MODEL, data_name(MODEL, 0), smallest=1024)
    runner = OnnxRunner(directory, threads=1, options=options)
    if not (output / MODEL).is_file():
        raise ArtifactError(f"{directory}: ONNX Runtime {ort.__version__} did not write the packed model")
    return runner


def _write_what_is_packed(options: ort.SessionOptions, path: Path, data: str, *, smallest: int) -> None:
    """Let a session write its model at `path`, with constants of at least `smallest` bytes in the file `data`."""
    options.optimized_model_filepath = str(path)
    for key, value in {
        "session.optimized_model_external_initializers_file_name": data,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(smallest),
        "session.save_external_prepacked_constant_initializers": "1",
    }.items():
        options.add_session_config_entry(key, value)


def open_with_little_memory(directory: Path, threads: int) -> OnnxRunner:
    """Open an artifact; if it has `LARGE` weights, from a packed copy that only this runner uses.

    The copy has no name any more when the runner is returned, and its space is free when the runner is gone.

    Raises:
        ArtifactError: ONNX Runtime cannot load the model.
    """
    path = model_path(directory)
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}_data*"))
    room = shutil.disk_usage(directory.parent).free
    if size < LARGE or path.parent.name == WEB_FOLDER or room < COPIES * size:
        return OnnxRunner(directory, threads=threads)
    # A name by which the next export removes what a killed one left behind.
    prefix = f"{directory.name}-" if directory.name.startswith(".") else partial_prefix(directory)
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=directory.parent) as copy:
            write_packed(directory, Path(copy))
            return OnnxRunner(Path(copy), threads=threads)
    except OSError:  # the place is read-only, or full after all
        return OnnxRunner(directory, threads=threads)


def write_packed(directory: Path, output: Path) -> None:
    """Write the model and its data files into `output`; memory holds a few weights at a time.

    Raises:
        ArtifactError: ONNX Runtime cannot load the model, or cannot write the packed one.
    """
    path = model_path(directory)
    model = onnx.load(path, load_external_data=False)
    weights = {item.name: item for item in model.graph.initializer if item.external_data}
    for name in {external(item)["location"] for item in weights.values()}:
        shutil.copyfile(path.parent / name, output / name)
    for names in _groups(model, weights):
        with tempfile.TemporaryDirectory(dir=output) as temporary:
            for item in _packed_constants(path, model, names, Path(temporary)):
                _append(item, Path(temporary), weights[item.name], output)
    for name in _half_scales(model, weights):
        _widen(weights[name], path.parent, output)
    (output / MODEL).write_bytes(model.SerializeToString())


def _half_scales(model: onnx.ModelProto, weights: dict[str, onnx.TensorProto]) -> list[str]:
    """Names of the scales in half precision of kernels of experts that compute in float32."""
    described = [json.loads(item.value) for item in model.metadata_props if item.key == LAYERS]
    kinds = {name: kind for layers in described for layer in layers for name, kind in layer.values()}
    float32 = {name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT}
    names = [
        name for node in model.graph.node if node.op_type == "QMoE" and float32 & set(node.input) for name in node.input
    ]
    half = onnx.TensorProto.FLOAT16
    return [name for name in dict.fromkeys(names) if name in weights and weights[name].data_type == half]


def _widen(item: onnx.TensorProto, source: Path, output: Path) -> None:
    """Store a constant in float32, at the end of its data file. The values stay the same.

    The kernel of experts computes with scales in float32, and ONNX Runtime would convert them into private memory.
    """
    entries = external(item)
    name, offset, count = entries["location"], int(entries.get("offset", 0)), int(entries["length"]) // 2
    values = np.fromfile(source / name, np.float16, count, offset=offset).astype(np.float32)
    with (output / name).open("r+b") as data:
        start = -(-data.seek(0, 2) // PAGE) * PAGE
        data.seek(start)
        data.write(values.data)
    item.data_type = onnx.TensorProto.FLOAT
    del item.external_data[:]
    for key, value in {"location": name, "offset": start, "length": values.nbytes}.items():
        item.external_data.add(key=key, value=str(value))


def _groups(model: onnx.ModelProto, weights: dict[str, onnx.TensorProto]) -> Iterator[frozenset[str]]:
    """Names of the weights to pack together: all of a node, and of as many nodes as `TOGETHER` allows."""
    group, size, seen = set[str](), 0, set[str]()
    for node in model.graph.node:
        own = set(node.input) & weights.keys() - seen
        needed = sum(int(external(weights[name])["length"]) for name in own)
        if group and size + needed > TOGETHER:
            yield frozenset(group)
            group, size = set(), 0
        group |= own
        seen |= own
        size += needed
    if group:
        yield frozenset(group)


def _packed_constants(
    path: Path, model: onnx.ModelProto, names: frozenset[str], output: Path
) -> Iterator[onnx.TensorProto]:
    """Let ONNX Runtime pack the constants `names` of `model` and write them into `output`; yields those it packed."""
    partial = onnx.ModelProto()
    partial.CopyFrom(model)
    del partial.graph.initializer[:]
    for item in model.graph.initializer:
        if item.name in names or not item.external_data:
            partial.graph.initializer.append(item)
        else:
            partial.graph.input.append(onnx.helper.make_tensor_value_info(item.name, item.data_type, item.dims))
    options = session_options(1)
    options.add_session_config_entry(EXTERNAL_DATA, str(path.parent))
    _write_what_is_packed(options, output / MODEL, DATA, smallest=0)
    try:
        ort.InferenceSession(partial.SerializeToString(), options, providers=["CPUExecutionProvider"])
        written = onnx.load(output / MODEL, load_external_data=False)
    except Exception as error:  # the only common base class of ONNX Runtime's exceptions
        raise ArtifactError(
            f"{path}: ONNX Runtime {ort.__version__} cannot pack its weights: {str(error).splitlines()[0]}",
            hint="`moec verify` checks whether the files are still as they were built",
        ) from error
    for item in written.graph.initializer:
        if item.name in names and any(entry.key.startswith(PACKED) for entry in item.external_data):
            yield item


def _append(item: onnx.TensorProto, source: Path, weight: onnx.TensorProto, output: Path) -> None:
    """Append what kernels packed of `item`, from the data file in `source`, to the data file of `weight`."""
    with (source / DATA).open("rb") as given, (output / external(weight)["location"]).open("r+b") as data:
        for entry in item.external_data:
            if not entry.key.startswith(PACKED):
                continue
            kernel, *blobs = entry.value.split("|")
            places = []
            for blob in blobs:
                offset, length, checksum = blob.split(";")
                start = -(-data.seek(0, 2) // PAGE) * PAGE
                given.seek(int(offset))
                data.seek(start)
                _copy(given, data, int(length))
                places.append(f"{start};{length};{checksum}")
            weight.external_data.add(key=entry.key, value="|".join([kernel, *places]))


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        piece = source.read(min(count, PIECE))
        if not piece:
            raise ArtifactError("ONNX Runtime wrote less than it says of what its kernels packed")
        target.write(piece)
        count -= len(piece)


def external(item: onnx.TensorProto) -> dict[str, str]:
    """Where the values of `item` are: `location`, `offset` and `length`."""
    return {entry.key: entry.value for entry in item.external_data}
