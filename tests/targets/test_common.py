"""What targets share: tables of ops, the limits of a step, and the gate of an expert."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from moec.compiler.common.errors import UsageError
from moec.compiler.ir.experts import ACTIVATIONS, Gate
from moec.targets.common.gate import gated
from moec.targets.common.table import joined, named
from moec.targets.runners import RunnerLimits

aten = torch.ops.aten


def test_joined_tables_share_no_op() -> None:
    assert joined({aten.abs.default: 1}, {aten.exp.default: 2}) == {aten.abs.default: 1, aten.exp.default: 2}
    with pytest.raises(AssertionError, match="abs"):
        joined({aten.abs.default: 1}, {aten.exp.default: 2}, {aten.abs.default: 3})


def test_ops_that_have_torchs_name() -> None:
    assert named("abs exp", str.capitalize) == {aten.abs.default: "Abs", aten.exp.default: "Exp"}


@pytest.mark.parametrize(
    ("ids", "mask", "past", "said"),
    [
        (np.zeros((2, 3)), None, 0, "2 sequences at once: the toy target runs at most 1"),
        (np.zeros((1, 3)), np.array([[0, 1, 1]]), 0, "the toy target does not support padding"),
        (np.zeros((1, 3)), None, 6, "9 tokens exceed the 8 that the KV cache holds"),
    ],
)
def test_a_step_beyond_the_limits_is_refused(ids: np.ndarray, mask: np.ndarray | None, past: int, said: str) -> None:
    RunnerLimits().check("toy", ids, mask, past)
    limits = RunnerLimits(max_batch=1, padding=False, max_sequence=8)
    limits.check("toy", ids[:1], None if mask is None else np.ones_like(mask), 5)
    with pytest.raises(UsageError, match=said):
        limits.check("toy", ids, mask, past)


class Torch:
    """The functions of torch, for the gate of an expert."""

    def unary(self, name: str, x: Tensor) -> Tensor:
        return ACTIVATIONS[name](x)

    def binary(self, name: str, x: Tensor, y: Tensor | float) -> Tensor:
        if name == "clip":
            assert isinstance(y, float)
            return x.clamp(-y, y)
        other = torch.as_tensor(y)
        return {"add": torch.add, "mul": torch.mul, "min": torch.minimum}[name](x, other)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(
    "gate",
    [
        Gate("", gated=False),
        Gate(""),
        Gate("", interleaved=True, alpha=1.702, limit=0.7, up_offset=1.0),
        Gate("", limit=0.4, limit_activated=True),
    ],
    ids=["no gate", "plain", "gpt-oss", "limit of what is activated"],
)
def test_the_gate_is_that_of_the_reference(activation: str, gate: Gate) -> None:
    own = replace(gate, activation=activation)
    projected = torch.linspace(-2, 2, 48).reshape(4, 12)
    parts = own.split(projected) if own.gated else (projected,)
    torch.testing.assert_close(gated(Torch(), own, parts), own(projected), rtol=1e-6, atol=1e-7)
