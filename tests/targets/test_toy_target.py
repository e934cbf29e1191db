"""A target of one file is built, judged and run like the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moec
from moec import targets
from moec.compiler.common.verdict import Status

from .toy import ToyTarget  # noqa: TID252 - tests are no package with a name of its own


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy target as one that another package brings."""

    class Entry:
        dist = None

        def load(self) -> type[ToyTarget]:
            return ToyTarget

    table = {**targets._table(), "toy": Entry()}
    monkeypatch.setattr(targets, "_table", lambda: table)


@pytest.mark.usefixtures("toy")
def test_a_target_of_one_file_goes_through_the_gates(tiny_checkpoint: Any, tmp_path: Path) -> None:
    routing = {"policy": "top-p", "parameters": {"mass": 0.6}}
    result = moec.export(tiny_checkpoint("qwen2_moe"), output=tmp_path / "out", target="toy", routing=routing)
    judged = {verdict.gate: verdict.status for verdict in result.verdicts}
    passed = ("parity: capture", "parity: artifact", "integrity", "repeatability")
    assert all(judged[gate] is Status.PASS for gate in passed), judged
    assert judged["coverage"] is Status.NOT_RUN, "a target that cannot be entered at its experts is not covered"


@pytest.mark.usefixtures("toy")
def test_a_wrong_row_of_its_table_is_found(
    tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from . import toy  # noqa: TID252

    monkeypatch.setitem(toy.OPS, "aten.silu.default", torch.ops.aten.gelu.default)
    monkeypatch.setitem(toy.OPS, "aten.mul.Tensor", torch.ops.aten.add.Tensor)
    with pytest.raises(moec.compiler.pipeline.export.GateError, match="parity: artifact"):
        moec.export(tiny_checkpoint("qwen2_moe"), output=tmp_path / "out", target="toy")
