"""Integrity reads every expert back and believes no figure that it was not given."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.verdict import Status
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates import integrity
from moec.compiler.gates.integrity import Comparisons, expert_weights, other_weights
from moec.compiler.gates.tolerance import Precision, precision_of
from moec.compiler.ir.program import EXPERTS, Program
from moec.compiler.ir.weights import Constant, LazyTensor
from moec.quantize.formats import IntegerFormat
from moec.quantize.lazy import Coded
from moec.targets.stored_weights import StoredWeight

Captured = tuple[Checkpoint, Program]


def _stored(program: Program, bits: int | None = None) -> dict[str, StoredWeight]:
    def stored(name: str) -> StoredWeight:
        return StoredWeight(bits, lambda start, stop: program.weights[name].rows(start, stop).numpy())

    return {name: stored(name) for name in (*expert_weights(program), *other_weights(program))}


def _of_each(change: Callable[[int, np.ndarray], np.ndarray], right: StoredWeight) -> StoredWeight:
    """A weight with what `change` makes of each expert."""

    def rows(start: int, stop: int) -> np.ndarray:
        return np.stack([change(index, right.values(index, index + 1)[0]) for index in range(start, stop)])

    return replace(right, rows=rows)


def test_every_expert_is_compared(gpt_oss: Captured) -> None:
    program = gpt_oss[1]
    verdict = Comparisons(program, _stored(program)).judge()
    assert verdict.status is Status.PASS
    biases = sum("bias" in tensor["name"] for tensor in verdict.figures["tensors"])
    assert biases == 2 * len(program.layers)
    assert [tensor["experts"] for tensor in verdict.figures["tensors"]] == [8] * 4 * len(program.layers) + [0]
    assert verdict.summary == "96 experts in 12 tensors and 1 other weight equal the plan's"


def test_what_was_compared_is_not_made_again(mixtral: Captured) -> None:
    program = mixtral[1]
    name = program.layers[0].down_proj
    reads: list[int] = []

    class Counted(LazyTensor):
        shape, dtype = program.weights[name].shape, program.weights[name].dtype

        def rows(self, start: int, stop: int) -> torch.Tensor:
            reads.append(start)
            return program.weights[name].rows(start, stop)

    counted = program.replace(weights=program.weights.with_tensors({name: Counted()}))
    comparisons = Comparisons(counted, _stored(program))
    for index in (2, 5):
        comparisons.compare(name, index, program.weights[name].rows(index, index + 1)[0] + (index == 5))
    comparisons.compare("lm_head.weight", 0, torch.zeros(1))
    verdict = comparisons.judge()
    assert reads == [0, 1, 3, 4, 6, 7]
    assert f"different: {name} experts 5" in verdict.summary
    assert verdict.figures["tensors"][1]["experts"] == 8


@pytest.mark.parametrize("value", [np.nan, 1e-3])
def test_one_changed_value_of_one_expert_is_found(mixtral: Captured, value: float) -> None:
    program = mixtral[1]
    stored = _stored(program)
    name = program.layers[1].down_proj
    right = stored[name]

    def wrong(index: int, values: np.ndarray) -> np.ndarray:
        if index == 6:
            values[-1, -1] += value
        return values

    verdict = Comparisons(program, {**stored, name: _of_each(wrong, right)}).judge()
    assert verdict.status is Status.FAIL
    assert verdict.exit_code == 5
    assert f"{name} experts 6" in verdict.summary


def test_swapped_experts_wrong_shapes_and_missing_tensors_are_found(mixtral: Captured) -> None:
    program = mixtral[1]
    stored = _stored(program)
    name = program.layers[0].gate_up_proj
    right = stored[name]
    order = (1, 0, *range(2, 8))
    swapped = {**stored, name: _of_each(lambda index, _: right.values(order[index], order[index] + 1)[0], right)}
    assert "experts 0, 1" in Comparisons(program, swapped).judge().summary
    turned = {**stored, name: _of_each(lambda _, value: value.T, right)}
    assert Comparisons(program, turned).judge().status is Status.FAIL
    stored.pop(name)
    verdict = Comparisons(program, stored).judge()
    assert verdict.status is Status.FAIL
    assert f"missing from the artifact: {name}" in verdict.summary


def _with_row(right: StoredWeight, row: int, change: Callable[[np.ndarray], object]) -> StoredWeight:
    """A matrix with one row changed in place."""

    def rows(start: int, stop: int) -> np.ndarray:
        values = right.values(start, stop).copy()
        if start <= row < stop:
            change(values[row - start])
        return values

    return replace(right, rows=rows)


def test_a_row_of_an_embedding_that_no_text_reaches_is_compared(
    mixtral: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, stored, name = mixtral[1], _stored(mixtral[1]), "model.embed_tokens.weight"
    monkeypatch.setattr(integrity, "ROWS_BYTES", 20 * 64 * 4)
    spoiled = {**stored, name: _with_row(stored[name], 53, lambda row: row.__setitem__(5, np.nextafter(row[5], 9)))}
    assert Comparisons(program, spoiled).judge().summary == f"different: {name} from row 40"
    del stored[name]
    assert Comparisons(program, stored).judge().summary == f"missing from the artifact: {name}"


def test_every_quantized_weight_is_compared(mixtral: Captured) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    planned = {name: _Planned(mixtral[1].weights[name], IntegerFormat(8, "channel"))}
    program = mixtral[1].replace(weights=mixtral[1].weights.with_tensors(planned))
    stored = _stored(mixtral[1])
    assert f"missing from the artifact: {name}" in Comparisons(program, stored).judge().summary
    right = StoredWeight(8, lambda start, stop: program.weights[name].rows(start, stop).numpy())
    assert Comparisons(program, {**stored, name: right}).judge().status is Status.PASS
    spoiled = _with_row(right, 7, lambda row: row.__imul__(1.1))
    assert Comparisons(program, {**stored, name: spoiled}).judge().summary == f"different: {name} from row 0"


def test_weights_computed_in_the_graph_are_an_error(mixtral: Captured) -> None:
    program = mixtral[1]
    graph = program.copy_graph()
    experts = graph.find_nodes(op="call_function", target=EXPERTS)[0]
    with graph.inserting_before(experts):
        computed = graph.call_function(torch.ops.aten.neg.default, (experts.args[3],))
    experts.update_arg(3, computed)
    with pytest.raises(ArtifactError, match="computed in the graph"):
        Comparisons(program.replace(graph=graph), {}).judge()


@dataclass(frozen=True)
class _Planned(Coded):
    source: LazyTensor
    format: IntegerFormat

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.source.rows(start, stop)

    def errors(self) -> list[float]:
        return []


def _quantized(program: Program) -> Program:
    planned = {name: _Planned(program.weights[name], IntegerFormat(4, "channel")) for name in expert_weights(program)}
    return program.replace(weights=program.weights.with_tensors(planned))


def test_quantized_experts_must_be_stored_as_codes_of_the_planned_width(mixtral: Captured) -> None:
    program = _quantized(mixtral[1])
    assert precision_of(program) is Precision.INT4
    stored = _stored(program, bits=4)
    assert Comparisons(program, stored).judge().status is Status.PASS
    name = program.layers[0].down_proj
    for bits, said in ((None, "floats"), (8, "8 bits")):
        verdict = Comparisons(program, {**stored, name: replace(stored[name], bits=bits)}).judge()
        assert verdict.status is Status.FAIL
        assert f"in another format than planned: {name} ({said})" in verdict.summary


def test_rounding_is_allowed_to_quantized_experts_alone(mixtral: Captured) -> None:
    program = _quantized(mixtral[1])
    own = expert_weights(program)
    rounded = {name: _of_each(_next, item) if name in own else item for name, item in _stored(program, bits=4).items()}
    assert Comparisons(program, rounded).judge().status is Status.PASS
    assert Comparisons(mixtral[1], rounded).judge().status is Status.FAIL


def _next(_: int, value: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.nextafter(value, np.float32(np.inf))
    return found


def test_a_weight_that_the_artifact_offers_is_compared_too(mixtral: Captured) -> None:
    program, name = mixtral[1], "model.norm.weight"
    value = program.weights.read(name).numpy()
    offered = {name: StoredWeight(None, lambda start, stop: value[start:stop])}
    assert name not in other_weights(program)
    assert Comparisons(program, _stored(program) | offered).judge().status is Status.PASS
    changed = value * np.where(np.arange(len(value)) == 3, np.float32(1.001), np.float32(1))
    offered = {name: StoredWeight(None, lambda start, stop: changed[start:stop])}
    verdict = Comparisons(program, _stored(program) | offered).judge()
    assert verdict.status is Status.FAIL
    assert f"different: {name} from row 0" in verdict.summary


def test_a_number_without_rows_is_left_to_parity(mixtral: Captured) -> None:
    program, name = mixtral[1], "model.norm.weight"
    changed = program.replace(weights=program.weights.with_tensors({name: Constant(torch.tensor(1.0))}))
    assert name in other_weights(program, [name])
    assert name not in other_weights(changed, [name])
