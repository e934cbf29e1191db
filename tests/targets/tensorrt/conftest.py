"""Tiny models lowered to the TensorRT dialect, their ONNX twin opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import Program
from moec.targets.tensorrt.target import TensorrtOptions, TensorrtTarget
from tests.support.lowered import Model

Lower = Callable[..., Model]


def lower_program(program: Program, directory: Path, **options: Any) -> Model:
    directory.mkdir()
    target = TensorrtTarget()
    chosen = TensorrtOptions(**{"engine": False, **options})
    assert not target.lint(program, chosen)
    lowered = target.lower(program, chosen, directory, lambda *_: None)
    return Model(program, lowered, target.open(directory, threads=1), directory)


@pytest.fixture
def lower(tmp_path: Path) -> Lower:
    """Program and options -> Model, without an engine unless it is asked for."""
    count = iter(range(100))
    return lambda program, **options: lower_program(program, tmp_path / f"artifact{next(count)}", **options)


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """The twin computes what the interpreter computes: prefill, one token, several tokens."""

    def check(model: Model, limit: float, batch: int = 2) -> None:
        ids = np.random.default_rng(3).integers(3, model.program.vocab_size, (batch, 9))
        reference = ProgramRunner(model.program)
        model.runner.reset()
        for step in (ids[:, :6], ids[:, 6:7], ids[:, 7:]):
            want, got = reference.decode(step), model.runner.decode(step)
            assert np.abs(got - want).max() <= limit * np.abs(want).max()

    return check
