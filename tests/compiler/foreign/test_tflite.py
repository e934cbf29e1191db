"""A TFLite file whose table of moec is not read: the runner, its tensors, its routers and what its experts cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import moec
from moec.compiler.common.errors import ArtifactError, UsageError
from moec.compiler.foreign.binding import Bindings
from moec.compiler.foreign.cost import sentence
from moec.compiler.foreign.formats import recognise
from moec.compiler.foreign.weights import FileRows, locate
from moec.compiler.ir.interpreter import ProgramRunner
from moec.targets.runners import limits_of


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Format of the weights -> file."""
    folder, made = tmp_path_factory.mktemp("tflite"), {}
    for name in ("none", "int8"):
        quantize = {"format": name, "rounding": "rtn"}
        out = folder / name
        moec.export(str(tiny_checkpoint("olmoe")), target="tflite", output=out, gates=False, quantize=quantize)
        made[name] = out / "model.tflite"
    return made


def test_it_runs_as_the_checkpoint(
    files: dict[str, Path], program_of: Callable[..., object], tiny_checkpoint: Callable[[str], Path]
) -> None:
    program, model = program_of(tiny_checkpoint("olmoe")), recognise(files["none"])
    assert model.format == "TFLite"
    runner, reference = model.open(program, Bindings()), ProgramRunner(program)
    ids = np.random.default_rng(0).integers(0, 128, (1, 21))
    np.testing.assert_allclose(runner.prefill(ids), reference.prefill(ids), atol=1e-4)
    np.testing.assert_allclose(runner.decode(ids[:, :1]), reference.decode(ids[:, :1]), atol=1e-4)
    assert limits_of(runner).max_sequence == 512
    assert "nothing" in sentence(model.cost(program, Bindings()), program)
    chosen = model.choices(program, Bindings())(ids)
    assert {layer: rows.shape for layer, rows in chosen.items()} == {0: (21, 2), 1: (21, 2)}


def test_codes_are_read_back(
    files: dict[str, Path], program_of: Callable[..., object], tiny_checkpoint: Callable[[str], Path]
) -> None:
    program, model = program_of(tiny_checkpoint("olmoe")), recognise(files["int8"])
    assert {"int8", "fp32"} <= {tensor.precision for tensor in model.tensors()}
    assert locate(program, FileRows(model.tensors())).understood


def test_a_model_of_another_vocabulary(files: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="logits over 160 tokens"):
        recognise(files["none"]).open(SimpleNamespace(vocab_size=160), Bindings())


def test_a_damaged_file(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(files["none"].read_bytes()[:64])
    with pytest.raises(ArtifactError, match="not a readable TFLite file"):
        recognise(tmp_path / "short")
