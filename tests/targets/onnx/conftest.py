"""Programs of one op, and Programs of whole tiny models, lowered and run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from moec.compiler.ir.program import Program
from moec.targets.onnx import lower
from moec.targets.onnx.files import MODEL
from moec.targets.onnx.lowerings.table import onnx_dialect
from moec.targets.onnx.target import OnnxOptions, OnnxTarget
from tests.support.lowered import Model
from tests.support.one_op import SIZES, Arguments, OneOp


class Session:
    """ONNX Runtime over a Program that was lowered."""

    def __init__(self, program: Program, directory: Path, *, contrib: bool = True) -> None:
        model, self.context = lower.build(program, onnx_dialect(contrib=contrib))
        lower.write(model, self.context, directory / MODEL, lambda *_: None)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.op_types = [node.op_type for node in model.graph.all_nodes()]
        self._session = ort.InferenceSession(str(directory / MODEL), options, providers=["CPUExecutionProvider"])
        self._names = {spec.name for spec in self._session.get_inputs()}

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        (result,) = self._session.run(["logits"], {name: feeds[name] for name in self._names})
        return np.asarray(result)


@pytest.fixture
def check_op(tmp_path: Path) -> Callable[..., Session]:
    """Lower one op, run it at several sizes and compare with torch."""

    def check(
        target: Callable[..., Any], arguments: Arguments, output: int | None = None, *, contrib: bool = True
    ) -> Session:
        one = OneOp(target, arguments, output)
        session = Session(one.core, tmp_path, contrib=contrib)
        for sizes in SIZES:
            want = one.expected(*sizes).to(torch.float32).numpy()
            got = session(one.feeds(*sizes))
            assert got.shape == want.shape, sizes
            scale = float(np.nan_to_num(np.abs(want), posinf=0).max(initial=1))
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * scale, err_msg=str(sizes))
        return session

    return check


Lower = Callable[..., Model]


@pytest.fixture
def lower_checkpoint(tmp_path: Path, program_of: Callable[..., Program]) -> Lower:
    """Checkpoint directory -> Model."""

    def run(checkpoint: Path, *, dtype: torch.dtype = torch.float32, **options: str) -> Model:
        directory = tmp_path / "-".join([checkpoint.name, str(dtype), *options.values()])
        return lower_program(program_of(checkpoint, dtype), directory, **options)

    return run


def lower_program(program: Program, directory: Path, **options: str) -> Model:
    directory.mkdir()
    target = OnnxTarget()
    lowered = target.lower(program, OnnxOptions.model_validate(options), directory, lambda *_: None)
    return Model(program, lowered, target.open(directory, threads=1), directory)


@pytest.fixture
def one_op() -> type[OneOp]:
    """A Program of one op."""
    return OneOp
