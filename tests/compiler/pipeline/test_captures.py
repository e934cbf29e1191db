"""Builds of one checkpoint share what is captured from it, and only as long as it is the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.program import Program, TensorSpec
from moec.compiler.ir.weights import WeightStore
from moec.compiler.pipeline import captures as module
from moec.compiler.pipeline.captures import Captures
from moec.passes.canonical.dead_code import DeadCode
from moec.passes.canonical.normalize import Normalize


def small_program(dtype: torch.dtype) -> Program:
    """One input with a dynamic axis, returned."""
    graph, mode = fx.Graph(), FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])  # type: ignore[arg-type, var-annotated]
    node = graph.placeholder("x")
    node.meta["val"] = mode.from_tensor(torch.zeros(3, dtype=dtype), symbolic_context=context)
    graph.output((node,))
    dims = {"batch": node.meta["val"].shape[0]}
    return Program(graph, WeightStore({}), (TensorSpec("x", ("batch",), dtype),), (), (), dtype, {}, dims)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of every capture."""
    found: list[torch.dtype] = []

    def capture(checkpoint: Checkpoint, *, dtype: torch.dtype) -> Program:
        assert checkpoint.opened
        found.append(dtype)
        return small_program(dtype)

    monkeypatch.setattr(module, "capture", capture)
    return found


@pytest.fixture
def directory(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    for path in tiny_checkpoint("olmoe").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_one_capture_for_each_dtype(traced: list[torch.dtype], directory: Path) -> None:
    captures = Captures()
    first = captures.of(Checkpoint.open(directory), torch.float32)
    half = captures.of(Checkpoint.open(directory), torch.float16)
    assert captures.of(Checkpoint.open(directory), torch.float32) is first
    assert captures.of(Checkpoint.open(directory), torch.float16) is half
    assert traced == [torch.float32, torch.float16]
    assert Captures().of(Checkpoint.open(directory), torch.float32) is not first


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_other_files_are_captured_anew(name: str, traced: list[torch.dtype], directory: Path) -> None:
    captures = Captures()
    first = captures.of(Checkpoint.open(directory), torch.float32)
    data = (directory / name).read_bytes()
    (directory / name).unlink()
    (directory / name).write_bytes(data + b" " if name == "config.json" else data[:-1] + bytes([data[-1] ^ 1]))
    second = captures.of(Checkpoint.open(directory), torch.float32)
    assert second is not first
    assert captures.of(Checkpoint.open(directory), torch.float32) is second
    assert len(traced) == 2


def test_trust_is_not_shared(traced: list[torch.dtype], directory: Path) -> None:
    captures = Captures()
    captures.of(Checkpoint.open(directory, trust_remote_code=True), torch.float32)
    captures.of(Checkpoint.open(directory), torch.float32)
    assert len(traced) == 2


def test_where_a_build_fixed_a_dynamic_axis_it_is_captured_anew(traced: list[torch.dtype], directory: Path) -> None:
    captures, checkpoint = Captures(), Checkpoint.open(directory)
    first = captures.of(checkpoint, torch.float32)
    (size,) = first.graph.find_nodes(op="placeholder")[0].meta["val"].shape
    assert int(size) == 3  # so says the trace, and keeps to it
    assert captures.of(checkpoint, torch.float32) is not first
    assert len(traced) == 2


@pytest.mark.usefixtures("traced")
def test_passes_run_once(directory: Path) -> None:
    captures, checkpoint = Captures(), Checkpoint.open(directory)
    program, told = captures.of(checkpoint, torch.float32), list[str]()
    first = captures.after(program, [Normalize(), DeadCode()], lambda record: told.append(record.name))
    assert [record.name for record in first[1]] == told == ["normalize", "dead-code"]
    assert captures.after(program, (Normalize(), DeadCode())) is first
    assert captures.after(program, (Normalize(),)) is not first
    (directory / "config.json").write_text((directory / "config.json").read_text() + " ")
    again = captures.of(Checkpoint.open(directory), torch.float32)
    assert captures.after(again, (Normalize(), DeadCode())) is not first
