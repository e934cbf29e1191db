"""Every op of the case table, in core ops, lowered and run, against torch; attention, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.common.errors import LoweringError
from moec.compiler.ir.program import ATTENTION
from moec.compiler.ir.stages import CORE, SIZES
from moec.targets.tflite.lowerings.table import TABLE
from tests.support.one_op import OneOp
from tests.support.op_cases import cases, distinct, whole, x

aten = torch.ops.aten
MADE_WHILE_LOWERING = {aten.full.default, aten.arange.start_step, *SIZES} - set(TABLE)
"""Core ops of numbers alone, which are constants where all sizes are."""
REFUSED = {"aten.conv1d.default-2"}
"""Cases that are not supported: see `test_what_is_not_supported_is_refused`."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, np.ndarray]]:
    """Id of a case -> what LiteRT gives and what torch gives."""
    from .conftest import Build  # noqa: TID252 - tests are no package with a name of its own

    sizes = (2, 5)
    chosen = {str(case.id): OneOp(*case.values) for case in cases() if case.id not in REFUSED}
    found = Build(tmp_path_factory.mktemp("ops")).one_ops(chosen, sizes)
    return {name: (found[name], one.expected(*sizes).numpy()) for name, one in chosen.items()}


@pytest.mark.parametrize("case", [str(case.id) for case in cases() if case.id not in REFUSED])
def test_op(case: str, results: dict[str, tuple[Any, np.ndarray]]) -> None:
    found, want = results[case]
    if isinstance(found, Exception):
        raise found
    (got,) = found
    assert got.shape == want.shape
    scale = float(np.nan_to_num(np.abs(want.astype(np.float64)), posinf=0).max(initial=1))
    np.testing.assert_allclose(got, want, rtol=5e-6, atol=2e-6 * scale)


def test_the_table_holds_the_core_ops() -> None:
    assert set(TABLE) == set(CORE) - MADE_WHILE_LOWERING


@pytest.mark.parametrize(
    "case",
    [
        (aten.bitwise_and.Tensor, whole(2, 8), whole(2, 8)),
        (aten.gather.default, x(3, 6), 0, distinct(1, 2, 3)),
        (aten.scatter.value, x(3, 6), 0, distinct(1, 2, 3), 1.0),
        (aten.layer_norm.default, x(2, 3, 8), [3, 8]),
        (aten.linalg_vector_norm.default, x(2, 9), 3, [-1]),
        (aten.slice_scatter.default, x(2, 8), x(2, 4), 1, 0, 8, 2),
        (aten.constant_pad_nd.default, x(2, 3), [-1, 0]),
        (aten.conv1d.default, x(1, 6, 9), x(6, 3, 2), None, [1], [0], [1], 2),
        (aten.erf.default, x(2)),
    ],
    ids=lambda case: str(case[0]),
)
def test_what_is_not_supported_is_refused(build: Any, case: tuple[Any, ...]) -> None:
    with pytest.raises(LoweringError, match=r"(is|are) not supported|no lowering"):
        build.calls({"case": case})


def attention(kind: str, length: int, *, sinks: bool = False, softcap: float = 0.0, first: int = 9) -> tuple[Any, ...]:
    """A call on a cache of 24 slots of which `first` hold tokens, and garbage lies behind them."""
    heads, groups, depth, width, capacity = 4, 2, 8, 6, 24
    position = torch.arange(first, first + length)
    return (
        ATTENTION,
        x(1, heads, length, depth),
        x(1, groups, length, depth, seed=1),
        x(1, groups, length, width, seed=2),
        x(1, groups, capacity, depth, seed=3),
        x(1, groups, capacity, width, seed=4),
        position,
        None,
        x(heads) if sinks else None,
        0.35,
        kind,
        0 if kind == "causal" else 5,
        softcap,
    )


def test_attention_sees_the_slots_that_hold_tokens_and_nothing_behind(build: Any) -> None:
    calls = {
        f"{kind}_{length}": attention(kind, length) for kind in ("causal", "sliding", "chunked") for length in (1, 3)
    }
    calls |= {"sinks": attention("sliding", 3, sinks=True), "softcap": attention("causal", 3, softcap=2.0)}
    calls["first"] = attention("causal", 3, first=0)
    # The trace has a past of capacity - length slots, the file one of `capacity`: hence the shapes of the fake call.
    results = build.calls(calls, capacity=24)
    for name, case in calls.items():
        target, *arguments = case
        first, length = int(arguments[5][0]), arguments[5].numel()
        grown = [*arguments]
        grown[3], grown[4] = (cache[:, :, :first] for cache in arguments[3:5])
        out, keys, values = target(*grown)
        np.testing.assert_allclose(results[name][0], out, atol=2e-6, err_msg=name)
        for got, new, old in zip(results[name][1:], (keys, values), arguments[3:5], strict=True):
            np.testing.assert_array_equal(got[:, :, : first + length], new)
            np.testing.assert_array_equal(got[:, :, first + length :], old[:, :, first + length :])
