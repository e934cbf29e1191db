"""Files that only a target's runtime runs: Core ML packages whose metadata of moec is not read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moec
from moec.compiler.common.errors import ArtifactError, CheckpointError, LoweringError
from moec.compiler.families.tiny_models import write_tiny_checkpoint
from moec.compiler.foreign.binding import Bindings
from moec.compiler.foreign.cost import sentence
from moec.compiler.foreign.formats import recognise
from moec.compiler.foreign.weights import FileRows, locate
from moec.compiler.ir.interpreter import ProgramRunner
from moec.targets.coreml.executor.registry import KERNELS
from moec.targets.runners import limits_of


@pytest.fixture(scope="module")
def packages(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Format of the weights -> a package in the convention of swift-transformers, with caches inside it."""
    folder, made = tmp_path_factory.mktemp("coreml"), {}
    options = {"flavor": "swift-transformers", "context": 40}
    for name in ("none", "palettize4"):
        given: dict[str, Any] = {"quantize": {"format": name, "rounding": "rtn"}} if name != "none" else {}
        out = folder / name
        checkpoint = str(tiny_checkpoint("olmoe"))
        moec.export(checkpoint, target="coreml", output=out, gates=False, options=options, dtype="fp32", **given)
        made[name] = Path(shutil.move(out / "model.mlpackage", folder / f"{name}.mlpackage"))
    return made


def test_it_runs_as_the_checkpoint(
    packages: dict[str, Path], program_of: Callable[..., Any], tiny_checkpoint: Callable[[str], Path]
) -> None:
    program, model = program_of(tiny_checkpoint("olmoe")), recognise(packages["none"])
    assert (model.format, model.float_precision) == ("Core ML", "fp32")
    runner, reference = model.open(program, Bindings()), ProgramRunner(program)
    ids = np.random.default_rng(0).integers(0, 128, (1, 21))
    for _ in range(2):  # a new sequence forgets the old one
        np.testing.assert_allclose(runner.prefill(ids), reference.prefill(ids), atol=1e-4)
        np.testing.assert_allclose(runner.decode(ids[:, :1]), reference.decode(ids[:, :1]), atol=1e-4)
    limits = limits_of(runner)
    assert limits.max_sequence == 40
    assert limits.stands_in == "moec's executor for Core ML"
    assert "nothing: one token computes 2 of 8" in sentence(model.cost(program, Bindings()), program)
    choices = model.choices(program, Bindings())
    assert callable(choices)
    assert {layer: rows.shape for layer, rows in choices(ids).items()} == {0: (21, 2), 1: (21, 2)}


def test_codes_are_read_back(
    packages: dict[str, Path], program_of: Callable[..., Any], tiny_checkpoint: Callable[[str], Path]
) -> None:
    program, model = program_of(tiny_checkpoint("olmoe")), recognise(packages["palettize4"])
    assert {tensor.precision for tensor in model.tensors()} == {"palette of 16", "int8", "fp32"}
    assert locate(program, FileRows(model.tensors())).understood


def test_operators_of_branches_are_known(packages: dict[str, Path]) -> None:
    kinds = {own.kind for own in recognise(packages["none"]).operators()}
    assert {"topk", "gather"} <= kinds


def test_a_package_of_another_model(packages: dict[str, Path], program_of: Callable[..., Any], tmp_path: Path) -> None:
    other = program_of(write_tiny_checkpoint("olmoe", tmp_path, vocab_size=160))
    with pytest.raises(CheckpointError, match="vocabulary 160"):
        recognise(packages["none"]).open(other, Bindings())


def test_a_damaged_package(packages: dict[str, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.mlpackage"
    shutil.copytree(packages["none"], damaged)
    (damaged / "Manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match="names no root model"):
        recognise(damaged)


def test_an_operation_without_a_kernel(packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(KERNELS, "topk")
    with pytest.raises(LoweringError, match="no kernel for op topk") as found:
        recognise(packages["none"]).tensors()
    assert "macOS" in (found.value.hint or "")
