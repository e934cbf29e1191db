"""Faults of the files of an artifact, whatever their format: the bytes of a weight are found by their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from faults.edits import weight_name
from faults.fault import Fault
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.program import EXPERTS, Program

Change = Callable[[Path, Program], None]


def stored_forms(value: np.ndarray) -> Iterator[np.ndarray]:
    """The forms in which a file may hold a matrix: either way round, in float32 or float16."""
    for form in (value, value.T):
        for dtype in (np.float32, np.float16):
            yield np.ascontiguousarray(form).astype(dtype)


def replace_bytes(directory: Path, changes: dict[bytes, bytes]) -> None:
    """Replace each key by its value, in all files; at least one must occur.

    Raises:
        ValueError: No file holds any of them.
    """
    found = 0
    for path in (path for path in directory.rglob("*") if path.is_file()):
        data = path.read_bytes()
        places = {place: old for old in changes if (place := data.find(old)) >= 0}
        for place, old in places.items():
            data = data[:place] + changes[old] + data[place + len(old) :]
        if places:
            path.write_bytes(data)
        found += len(places)
    if not found:
        raise ValueError(f"{directory}: no file holds these weights")


def expert_down(program: Program, layer: int, expert: int) -> np.ndarray:
    name = str(Experts.of(program.nodes(EXPERTS)[layer]).down_proj.target)
    return program.weights.read(name)[expert].numpy()


def matrix(program: Program, ending: str) -> np.ndarray:
    return program.weights.read(weight_name(program, ending)).numpy()


def changed(value: Callable[[Program], np.ndarray], change: Callable[[bytes], bytes]) -> Change:
    """The bytes of a weight are replaced by what `change` makes of them."""

    def put(directory: Path, program: Program) -> None:
        replace_bytes(directory, {form.tobytes(): change(form.tobytes()) for form in stored_forms(value(program))})

    return put


def exchanged(first: Callable[[Program], np.ndarray], second: Callable[[Program], np.ndarray]) -> Change:
    """The bytes of two weights of the same shape are exchanged."""

    def put(directory: Path, program: Program) -> None:
        pairs = zip(stored_forms(first(program)), stored_forms(second(program)), strict=True)
        one_way = {one.tobytes(): other.tobytes() for one, other in pairs}
        replace_bytes(directory, one_way | {other: one for one, other in one_way.items()})

    return put


def flip(place: int, bits: int) -> Callable[[bytes], bytes]:
    """Flip bits of one byte."""
    return lambda data: data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]


def cut_off(directory: Path, program: Program) -> None:  # noqa: ARG001
    """The largest model file lacks its second half."""
    path = max(
        (path for path in directory.rglob("*") if path.suffix != ".engine"), key=lambda path: path.stat().st_size
    )
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def missing(directory: Path, program: Program) -> None:  # noqa: ARG001
    """The largest model file is missing."""
    max(
        (path for path in directory.rglob("*") if path.suffix != ".engine"), key=lambda path: path.stat().st_size
    ).unlink()


def offsets_exchanged(directory: Path, program: Program) -> None:  # noqa: ARG001
    """Two tensors of the same size exchange their places in the data file."""
    import onnx

    model = onnx.load(directory / "model.onnx", load_external_data=False)
    first, second = [
        item
        for item in model.graph.initializer
        if (item.external_data and "k_proj" in item.name) or "v_proj" in item.name
    ][:2]
    one, two = ({entry.key: entry for entry in item.external_data}["offset"] for item in (first, second))
    one.value, two.value = two.value, one.value
    onnx.save(model, directory / "model.onnx")


def neighbour_read(directory: Path, program: Program) -> None:
    """The node of one expert reads the weight of the next one; the file holds both."""
    import onnx

    own = str(Experts.of(program.nodes(EXPERTS)[1]).down_proj.target)
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    (node,) = [node for node in model.graph.node if f"{own}.4" in node.input]
    node.input[1] = f"{own}.5"
    onnx.save(model, directory / "model.onnx")


ONNX = ("onnx", "tensorrt")

FAULTS = (
    Fault(
        "files",
        "one bit of an expert flipped, the lowest",
        "mixtral",
        files=changed(lambda program: expert_down(program, 1, 6), flip(400, 1)),
    ),
    Fault(
        "files",
        "one bit of an attention matrix flipped, of the exponent",
        "mixtral",
        files=changed(lambda program: matrix(program, "0.self_attn.o_proj.weight"), flip(401 * 4 + 3, 8)),
    ),
    Fault(
        "files",
        "two experts exchanged",
        "mixtral",
        files=exchanged(lambda program: expert_down(program, 0, 2), lambda program: expert_down(program, 0, 3)),
    ),
    Fault(
        "files",
        "one expert is zero",
        "mixtral",
        files=changed(lambda program: expert_down(program, 1, 7), lambda data: bytes(len(data))),
    ),
    Fault(
        "files",
        "output projections of two layers exchanged",
        "mixtral",
        files=exchanged(
            lambda program: matrix(program, "0.self_attn.o_proj.weight"),
            lambda program: matrix(program, "1.self_attn.o_proj.weight"),
        ),
    ),
    Fault(
        "files",
        "two rows of the embedding exchanged",
        "large vocabulary",
        files=exchanged(
            lambda program: matrix(program, "embed_tokens.weight")[17_000:17_001],
            lambda program: matrix(program, "embed_tokens.weight")[17_001:17_002],
        ),
    ),
    Fault("files", "second half of a file missing", "mixtral", files=cut_off),
    Fault("files", "a file missing", "mixtral", files=missing),
    Fault("files", "offsets of two tensors exchanged", "mixtral", files=offsets_exchanged, targets=ONNX),
    Fault("files", "a node reads the neighbouring expert", "mixtral", files=neighbour_read, targets=("onnx",)),
)
