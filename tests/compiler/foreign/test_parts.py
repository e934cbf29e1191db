"""Classes of tensors, weights found by their values, decisions, probes and the cost of experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.compiler.common.verdict import Status
from moec.compiler.foreign import integrity, routing
from moec.compiler.foreign.cost import computed_experts, sentence
from moec.compiler.foreign.model import Cost, Unseen
from moec.compiler.foreign.precision import Row, class_of, remarks, rounded_like
from moec.compiler.foreign.probes import Probe
from moec.compiler.foreign.weights import FileRows, locate, own_rows, pieces
from moec.compiler.gates.reference import Trace
from moec.quantize.lazy import Coded
from moec.quantize.plan import TensorClass
from moec.targets.model_files import Product, StoredTensor


@pytest.fixture
def program(program_of: Callable[..., Any], tiny_checkpoint: Callable[[str], Path]) -> Any:
    return program_of(tiny_checkpoint("olmoe"))


def tensor(shape: tuple[int, ...], bits: float = 32, values: np.ndarray | None = None, name: str = "t") -> StoredTensor:
    read = None if values is None else lambda: values
    return StoredTensor(
        name, shape, "fp32" if bits == 32 else f"int{bits}", bits, int(np.prod(shape) * bits) // 8, 32, read
    )


def test_remarks_on_precisions() -> None:
    rows = [Row("experts", "fp32", 4, 600), Row("other matrices", "int8", 8, 300), Row("router", "int8", 2, 100)]
    assert [where for where, _ in remarks(rows)] == ["router", "experts"]
    assert "60%" in remarks(rows)[1][1]
    assert not remarks([Row("experts", "Q4_0", 4, 600), Row("router", "fp32", 2, 100)])


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((8, 96, 64), "experts"),
        ((8, 64, 96), "experts"),
        ((48, 64), "experts"),
        ((8 * 96, 64), "experts"),
        ((8, 64), "router"),
        ((64, 8), "router"),
        ((128, 64), "embedding and head"),
        ((64, 64), "other matrices"),
        ((64,), "the rest"),
    ],
)
def test_classes_by_shape(program: Any, shape: tuple[int, ...], kind: str) -> None:
    assert class_of(tensor(shape), program) == kind


def test_the_reference_is_rounded_as_the_file(program: Any) -> None:
    assert rounded_like([tensor((8, 96, 64))], program) is None
    rounded = rounded_like([tensor((8, 96, 64), 4)], program)
    assert rounded is not None
    coded = {name for name in rounded.weight_names() if isinstance(rounded.weights[name], Coded)}
    assert len(coded) == 4
    assert all("experts" in name for name in coded)


def file_of(program: Any, change: Callable[[str, int | None, np.ndarray], np.ndarray]) -> FileRows:
    """A file with one tensor per matrix, the projections of experts transposed and interleaved."""
    held: dict[tuple[str, int | None], list[np.ndarray]] = {}
    for piece, _ in pieces(program):
        values = change(piece.weight, piece.expert, own_rows(program, piece))
        held.setdefault((piece.weight, piece.expert), []).append(values)
    made = []
    for (weight, expert), parts in held.items():
        joined = parts[0] if len(parts) == 1 else np.stack(parts, axis=1).reshape(-1, parts[0].shape[-1])
        turned = np.ascontiguousarray(joined.T)
        made.append(tensor(turned.shape, values=turned, name=f"{weight}.{'' if expert is None else expert}"))
    return FileRows(made)


def test_weights_are_found_whatever_their_layout(program: Any) -> None:
    held = file_of(program, lambda _w, _e, values: values)
    found = locate(program, held)
    assert not found.missing
    findings = integrity.compare(program, held, found)
    assert findings.worst == 0
    assert integrity.judge(findings, found, proven=False, quantized=False).status is Status.PASS


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda values: 0 * values, "no tensor holds"),
        (lambda values: 0.5 * values, "multiplied"),
        (lambda values: values + 0.01 * np.roll(values, 1, axis=1), "too far from the checkpoint"),
    ],
)
def test_a_wrong_expert_is_named(program: Any, change: Callable[[np.ndarray], np.ndarray], what: str) -> None:
    name = next(piece.weight for piece, kind in pieces(program) if kind is TensorClass.EXPERTS_DOWN)
    held = file_of(program, lambda w, e, values: change(values) if (w, e) == (name, 5) else values)
    found = locate(program, held)
    verdict = integrity.judge(integrity.compare(program, held, found), found, proven=False, quantized=False)
    assert verdict.status is Status.FAIL
    assert f"{what}: {name}[5]" in verdict.summary
    proven = integrity.judge(integrity.compare(program, held, found), found, proven=True, quantized=False)
    assert proven.status is Status.NOT_RUN


def test_a_file_that_is_not_understood_proves_nothing(program: Any) -> None:
    random = np.random.default_rng(0)
    held = file_of(program, lambda _w, _e, values: random.standard_normal(values.shape).astype(np.float32))
    found = locate(program, held)
    verdict = integrity.judge(integrity.compare(program, held, found), found, proven=False, quantized=False)
    assert verdict.status is Status.NOT_RUN


def probe(slots: list[list[int]], tied: list[bool]) -> Probe:
    length = len(tied)
    trace = Trace(np.zeros((1, length, 4)), np.array([tied]), {0: np.array([slots])})
    return Probe(np.zeros((1, length), np.int64), trace)


def test_decisions() -> None:
    """The order of experts does not matter, and a tie excuses its own and every later position."""
    probes = [probe([[0, 1], [2, -1], [3, 1], [0, 2]], [False, False, True, False])]
    right = {0: np.array([[1, 0], [2, 2], [5, 6], [5, 6]])}
    assert routing.verdict(probes, [right], None).status is Status.PASS
    wrong = {0: np.array([[1, 0], [2, 3], [3, 1], [0, 2]])}
    assert routing.counted(probes, [wrong]) == (2, {0: 1})
    assert routing.verdict(probes, [wrong], None).status is Status.FAIL
    assert routing.verdict(probes, [wrong], 0.25).status is Status.PASS
    assert routing.judge(Unseen("no graph"), None, None).status is Status.NOT_RUN  # type: ignore[arg-type]


def test_the_cost_of_experts(program: Any) -> None:
    """Two layers, of which each computes `n` experts with two products."""

    def products(count: int) -> list[Product]:
        attention = [Product(1, 64, 64)] * 8
        return [*attention, *[Product(count, 64, 96), Product(count, 48, 64)] * 2]

    assert computed_experts(products(2), program) == 2
    assert sentence(Cost(2, "here"), program).startswith("nothing: one token computes 2 of 8")
    assert sentence(Cost(computed_experts(products(8), program), "here"), program).startswith("as much as one")
    assert sentence(Cost(5, "here"), program).startswith("something")
    assert sentence(Cost(0, "here"), program).startswith("not known")
    assert sentence(Unseen("no graph"), program) == "not known: no graph"


def test_other_weights_with_the_widths_of_an_expert(
    program_of: Callable[..., Any], tiny_checkpoint: Callable[[str], Path]
) -> None:
    """The first layer of this model is dense, and as wide as the two projections of an expert's gate."""
    dense = [Product(1, 64, 96), Product(1, 64, 96), Product(1, 96, 64)]
    experts = [Product(2, 64, 48), Product(2, 64, 48), Product(2, 48, 64)] * 2
    assert computed_experts([*dense, *experts], program_of(tiny_checkpoint("qwen3_moe"))) == 2
