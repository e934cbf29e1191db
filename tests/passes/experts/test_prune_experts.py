import operator
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from moec import passes
from moec.compiler.common.errors import UsageError
from moec.compiler.ir.interpreter import Interpreter
from moec.compiler.ir.invariants import check_invariants
from moec.compiler.ir.program import EXPERTS, Program
from moec.passes.experts.prune_experts import PruneExperts, choose_removed
from moec.passes.routing.calibrate.traces import RoutingTrace

aten = torch.ops.aten
COUNT, HIDDEN, INNER, TOP_K = 6, 5, 4, 2


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (COUNT, HIDDEN), "bias": (COUNT,), "scale": (COUNT,), "up": (COUNT, 2 * INNER, HIDDEN)}
    shapes["down"] = (COUNT, HIDDEN, INNER)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def layer(build: Any, values: Mapping[str, Tensor], *, across: bool = False) -> Program:
    """Sigmoid routing with a selection bias, renormalisation and a scale per expert; `across` sorts all experts."""
    hidden = build.input("hidden", 7, HIDDEN)
    scores = build.call(
        aten.sigmoid.default, build.call(aten.linear.default, hidden, build.weight("gate", values["gate"]))
    )
    biased = build.call(aten.add.Tensor, scores, build.weight("bias", values["bias"]))
    if across:
        biased = build.call(aten.cumsum.default, biased, -1)
    chosen = build.call(operator.getitem, build.call(aten.topk.default, biased, TOP_K), 1)
    picked = build.call(aten.gather.default, scores, 1, chosen)
    normal = build.call(aten.div.Tensor, picked, build.call(aten.sum.dim_IntList, picked, [-1], True))
    scale = build.call(aten.index.Tensor, build.weight("scale", values["scale"]), [chosen])
    gate = ("silu", True, False, False, 1.0, 0.0, 0.0)
    stacks = (build.weight("up", values["up"]), None, build.weight("down", values["down"]), None)
    return build.program(
        build.call(EXPERTS, hidden, chosen, build.call(aten.mul.Tensor, normal, scale), *stacks, *gate)
    )


def test_pruned_is_a_model_that_never_had_them(build: Any) -> None:
    values, kept = weights(), [0, 2, 3, 5]
    found = PruneExperts(((1, 4),)).run(layer(build, values))
    check_invariants(found.program)
    assert found.modified
    assert not found.rejections
    assert found.program.layers[0].num_experts == len(kept)
    smaller = layer(type(build)(), {name: value[kept] for name, value in values.items()})
    want, got = (Interpreter(program).run(build.feeds)["logits"] for program in (smaller, found.program))
    assert torch.equal(got, want)
    assert torch.equal(found.program.weights["up"].rows(1, 3), values["up"][[2, 3]])


def test_a_router_that_works_across_experts_is_left_alone(build: Any) -> None:
    program = layer(build, weights(), across=True)
    found = PruneExperts(((1,),)).run(program)
    assert found.program is program
    assert "cumsum" in found.rejections[0].reason


def test_a_router_with_more_choices_than_experts_is_left_alone(build: Any) -> None:
    """Such as one that may choose to skip the layer: its choices are no experts, and their number stays as it is."""
    values = weights()
    more = {**values, "gate": torch.randn(COUNT + 1, HIDDEN), "bias": torch.randn(COUNT + 1)}
    found = PruneExperts(((1,),)).run(layer(build, more))
    assert not found.modified
    assert f"does not choose among the {COUNT} experts alone" in found.rejections[0].reason


def test_group_limited_routing_is_left_alone(captured: Mapping[str, Program]) -> None:
    program, _ = passes.run_passes(captured["deepseek_v2"], passes.default_passes())
    found = PruneExperts(tuple((0,) for _ in program.layers)).run(program)
    assert not found.modified
    assert len(found.rejections) == len(program.layers)
    assert all("does not treat experts independently" in rejection.reason for rejection in found.rejections)


def test_a_whole_model_runs_with_fewer_experts(captured: Mapping[str, Program], feeds: Any) -> None:
    program, _ = passes.run_passes(captured["mixtral"], passes.default_passes())
    found = PruneExperts(((0, 3), (1,))).run(program)
    check_invariants(found.program)
    assert [row.num_experts for row in found.program.layers] == [6, 7]
    assert torch.isfinite(Interpreter(found.program).run(feeds(program, 2, 5, 3))["logits"]).all()


def test_nothing_to_prune_changes_nothing(build: Any) -> None:
    program = layer(build, weights())
    assert PruneExperts(((),)).run(program).program is program


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (((0,), (0,)), "listed for 2 MoE layers"),
        (((9,),), "are to be pruned"),
        (((0, 1, 2, 3, 4),), "leaves 1 experts"),
    ],
)
def test_lists_that_do_not_fit(build: Any, removed: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PruneExperts(removed).run(layer(build, weights()))


def test_the_least_salient_go_and_super_experts_stay(build: Any) -> None:
    program = layer(build, weights())
    indices = torch.arange(COUNT).repeat(2)[:, None]
    norms = torch.tensor([1.0, 9.0, 2.0, 3.0, 8.0, 7.0]).repeat(2)[:, None]
    trace = RoutingTrace(torch.ones(12, 1), indices, torch.ones(12), norms)
    peaks = torch.tensor([500.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert choose_removed(program, [trace], [peaks], 0.4) == ((2, 3),)
    assert choose_removed(program, [trace], [peaks], 0.9) == ((2, 3, 4, 5),)
    with pytest.raises(UsageError, match="between 0 and 1"):
        choose_removed(program, [trace], [peaks], 1.0)
