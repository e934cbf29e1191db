"""Dynamic routing inserted into programs: numbers, contract, form of the graph, refusals."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from syrupy.assertion import SnapshotAssertion
from torch import Tensor, fx

from moec import passes
from moec.compiler.common.errors import UsageError
from moec.compiler.ir.interpreter import Interpreter, ProgramRunner
from moec.compiler.ir.invariants import check_invariants
from moec.compiler.ir.printing import format_graph
from moec.compiler.ir.program import EXPERTS, SELECT, Program
from moec.passes.routing.dynamic_routing import BUDGET_INPUT, DynamicRouting
from moec.passes.routing.policies.base import Policy, select
from moec.passes.routing.policies.random_drop import RandomDrop
from moec.passes.routing.policies.table import policy
from moec.passes.routing.policies.top_p import TopP
from moec.passes.routing.routing_weights import descending, non_negative
from tests.support.policies import POLICIES

aten = torch.ops.aten
HIDDEN, EXPERTS_COUNT, INNER = 6, 8, 4
every_policy = pytest.mark.parametrize("chosen", POLICIES.values(), ids=POLICIES.keys())


def layer(build: Any, tokens: int, top_k: int, *, broken_expert: int | None = None) -> Program:
    """One MoE layer whose routing is an input: unsorted, of unknown sign."""
    hidden = build.input("hidden", tokens, HIDDEN)
    indices = build.input("indices", tokens, top_k, dtype=torch.int64)
    weights = build.input("weights", tokens, top_k)
    generator = torch.Generator().manual_seed(3)
    up = torch.randn(EXPERTS_COUNT, 2 * INNER, HIDDEN, generator=generator)
    if broken_expert is not None:
        up[broken_expert] = torch.nan
    down = build.weight("down", torch.randn(EXPERTS_COUNT, HIDDEN, INNER, generator=generator))
    gate = ("silu", True, False, False, 1.0, 0.0, 0.0)
    return build.program(build.call(EXPERTS, hidden, indices, weights, build.weight("up", up), None, down, None, *gate))


def routed(program: Program, chosen: Policy, *, runtime: bool = False) -> Program:
    found = DynamicRouting(chosen, runtime).run(program)
    check_invariants(found.program)
    return found.program


def slots(seed: int, tokens: int, top_k: int, weights: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(EXPERTS_COUNT, generator=generator)[:top_k] for _ in range(tokens)])
    return {"hidden": torch.randn(tokens, HIDDEN, generator=generator), "indices": indices, "weights": weights}


def reference(program: Program, chosen: Policy, feeds: Mapping[str, Tensor], budget: Tensor | None = None) -> Tensor:
    weights = select(chosen, 0, feeds["hidden"], feeds["indices"], feeds["weights"], budget=budget)
    return Interpreter(program).run({**feeds, "weights": weights})["logits"]


TOKENS, TOP_K = 3, 4
rows = st.lists(st.lists(st.integers(0, 20), min_size=TOP_K, max_size=TOP_K), min_size=TOKENS, max_size=TOKENS)
"""Weights as multiples of 1/64: unsorted, with ties and zeros, and with exact sums."""
property_test = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@every_policy
@pytest.mark.parametrize("fed", [False, True])
def test_the_graph_computes_what_select_says(build: Any, chosen: Policy, fed: bool) -> None:
    if fed and chosen.knob is None:
        return
    program = layer(build, TOKENS, TOP_K)
    after = routed(program, chosen, runtime=fed)

    @property_test
    @given(numbers=rows, seed=st.integers(0, 999))
    def check(numbers: list[list[int]], seed: int) -> None:
        weights = torch.tensor(numbers, dtype=torch.float32) / 64
        ties = any(len(set(row)) < TOP_K for row in numbers)
        if ties and chosen.name == "random-drop":
            return  # which of two equal largest slots is always kept is not said
        feeds = slots(seed, TOKENS, TOP_K, weights)
        knob = torch.tensor(float(getattr(chosen, chosen.knob or "renormalize")))
        found = Interpreter(after).run({**feeds, BUDGET_INPUT: knob})["logits"]
        if ties and chosen.name not in ("ratio", "threshold"):
            # Which of two equal slots goes is left open: as many stay, with the same sum.
            kept = executed(after, {**feeds, BUDGET_INPUT: knob})
            want = select(chosen, 0, feeds["hidden"], feeds["indices"], weights)
            torch.testing.assert_close(kept.sort(-1).values, want.sort(-1).values, rtol=1e-5, atol=1e-7)
        else:
            torch.testing.assert_close(found, reference(program, chosen, feeds), rtol=1e-4, atol=1e-5)

    check()


def executed(program: Program, feeds: Mapping[str, Tensor]) -> Tensor:
    """The weights that reach the experts."""
    seen: list[Tensor] = []

    def observe(node: fx.Node, args: tuple[Any, ...], _result: Any) -> None:
        if node.target is EXPERTS:
            seen.append(args[2])

    Interpreter(program, observer=observe).run(feeds)
    return seen[0]


@every_policy
def test_the_largest_stays_and_the_sum_is_preserved(build: Any, chosen: Policy) -> None:
    after = routed(layer(build, TOKENS, TOP_K), chosen)

    @property_test
    @given(numbers=rows)
    def check(numbers: list[list[int]]) -> None:
        weights = torch.tensor(numbers, dtype=torch.float32) / 64
        kept = executed(after, slots(0, TOKENS, TOP_K, weights))
        torch.testing.assert_close(kept.sum(-1), weights.sum(-1), rtol=1e-6, atol=0)
        assert bool(((kept.amax(-1) >= weights.amax(-1)) | (weights.amax(-1) == 0)).all())

    check()


def test_a_dropped_expert_may_be_nan(build: Any) -> None:
    program = routed(layer(build, 1, 3, broken_expert=5), TopP(mass=0.9))
    weights = torch.tensor([[0.05, 0.8, 0.15]])
    feeds = {"hidden": torch.ones(1, HIDDEN), "indices": torch.tensor([[5, 1, 2]]), "weights": weights}
    assert torch.isfinite(Interpreter(program).run(feeds)["logits"]).all()
    feeds["weights"] = torch.tensor([[0.5, 0.3, 0.2]])
    assert torch.isnan(Interpreter(program).run(feeds)["logits"]).any()


def test_one_slot_per_token_is_left_alone(build: Any) -> None:
    program = layer(build, 2, 1)
    found = DynamicRouting(TopP(mass=0.1)).run(program)
    assert found.program is program
    assert not found.modified
    assert "one expert each" in found.rejections[0].reason
    assert found.rejections[0].where == "block"


def test_a_policy_that_keeps_everything_inserts_nothing(build: Any) -> None:
    program = layer(build, 2, 3)
    found = DynamicRouting(policy("uniform-k", k=3)).run(program)
    assert found.program is program
    assert not found.modified


def test_an_operand_at_run_time_needs_a_knob(build: Any) -> None:
    with pytest.raises(UsageError, match="layer-k has no parameter"):
        DynamicRouting(policy("layer-k", ks=[1]), runtime_budget=True).run(layer(build, 2, 3))


def test_half_precision_weights_are_judged_in_float32(build: Any) -> None:
    hidden = build.input("hidden", 2, HIDDEN, dtype=torch.float16)
    indices = build.input("indices", 2, 2, dtype=torch.int64)
    weights = build.call(aten._softmax.default, build.input("weights", 2, 2, dtype=torch.float16), -1, False)
    up = build.weight("up", torch.ones(4, 2 * INNER, HIDDEN, dtype=torch.float16))
    down = build.weight("down", torch.ones(4, HIDDEN, INNER, dtype=torch.float16))
    gate = ("silu", True, False, False, 1.0, 0.0, 0.0)
    after = routed(
        build.program(build.call(EXPERTS, hidden, indices, weights, up, None, down, None, *gate)), TopP(mass=0.5)
    )
    assert after.nodes(aten.matmul.default)[0].meta["val"].dtype == torch.float32
    assert after.nodes(SELECT)[0].meta["val"].dtype == torch.float16


def test_golden_graph(captured: Mapping[str, Program], snapshot: SnapshotAssertion) -> None:
    program, _ = passes.run_passes(captured["mixtral"], passes.default_passes())
    text = format_graph(routed(program, TopP(mass=0.8)))
    words = ("topk", "select", "experts", "matmul", "lt.")
    lines = [line for line in text.splitlines() if any(word in line for word in words)]
    assert "\n".join(lines) == snapshot


@pytest.mark.parametrize("name", ["top-p", "ratio", "threshold"])
def test_at_most_six_nodes_a_layer(captured: Mapping[str, Program], name: str) -> None:
    program, _ = passes.run_passes(captured["mixtral"], passes.default_passes())
    after = routed(program, POLICIES[name])
    added = [node for node in after.graph.nodes if node.meta.get("module", "").endswith(".select")]
    assert len(program.layers) == 2
    assert len(added) <= 2 * 6


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
@pytest.mark.parametrize("chosen", [TopP(mass=0.6), RandomDrop(probability=0.5)], ids=["top-p", "random-drop"])
def test_a_token_does_not_see_its_batch_nor_how_it_was_fed(
    captured: Mapping[str, Program], family: str, chosen: Policy
) -> None:
    program, _ = passes.run_passes(captured[family], passes.default_passes())
    after = routed(program, chosen)
    ids = np.random.default_rng(1).integers(3, program.vocab_size, (3, 11))
    runner = ProgramRunner(after)
    together = runner.prefill(ids)
    scale = np.abs(together).max()
    for row in range(3):
        np.testing.assert_allclose(runner.prefill(ids[row : row + 1])[0], together[row], atol=1e-5 * scale)
    steps = [runner.prefill(ids[:, :6]), *(runner.decode(ids[:, step : step + 1]) for step in range(6, 11))]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), together, atol=1e-5 * scale)
    assert np.abs(together - ProgramRunner(program).prefill(ids)).max() > 1e-3 * scale


def test_the_run_time_input_has_a_default(captured: Mapping[str, Program]) -> None:
    program, _ = passes.run_passes(captured["mixtral"], passes.default_passes())
    fixed, fed = routed(program, TopP(mass=0.6)), routed(program, TopP(mass=0.6), runtime=True)
    assert [spec.name for spec in fed.inputs] == [*(spec.name for spec in program.inputs), BUDGET_INPUT]
    assert float(fed.input_defaults[BUDGET_INPUT]) == pytest.approx(0.6)
    ids = np.arange(4, 14)[None]
    np.testing.assert_allclose(ProgramRunner(fed).prefill(ids), ProgramRunner(fixed).prefill(ids), atol=1e-5)
    open_ = ProgramRunner(fed.replace(input_defaults={BUDGET_INPUT: torch.tensor(1.0)})).prefill(ids)
    np.testing.assert_allclose(open_, ProgramRunner(program).prefill(ids), atol=1e-4)


def chain(build: Any, *steps: Callable[[Any, fx.Node], fx.Node]) -> fx.Node:
    node = build.input("scores", 3, 8)
    for step in steps:
        node = step(build, node)
    return node


def _softmax(build: Any, node: fx.Node) -> fx.Node:
    return build.call(aten._softmax.default, node, -1, False)


def _top(build: Any, node: fx.Node) -> fx.Node:
    return build.call(operator.getitem, build.call(aten.topk.default, node, 2), 0)


def _unsorted_top(build: Any, node: fx.Node) -> fx.Node:
    return build.call(operator.getitem, build.call(aten.topk.default, node, 2, -1, True, False), 0)


def _normalised(build: Any, node: fx.Node) -> fx.Node:
    return build.call(aten.div.Tensor, node, build.call(aten.sum.dim_IntList, node, [-1], True))


def _negated(build: Any, node: fx.Node) -> fx.Node:
    return build.call(aten.mul.Tensor, node, -1.0)


@pytest.mark.parametrize(
    ("steps", "falls", "positive"),
    [
        ((_softmax, _top), True, True),
        ((_softmax, _top, _normalised), True, True),
        ((_top, _softmax), True, True),
        ((_top,), True, False),
        ((_top, _normalised), False, False),
        ((_softmax, _unsorted_top), False, True),
        ((_softmax, _top, _negated), False, False),
        ((_softmax,), False, True),
    ],
)
def test_what_a_router_proves(build: Any, steps: Any, falls: bool, positive: bool) -> None:
    node = chain(build, *steps)
    assert descending(node) is falls
    assert non_negative(node) is positive


@pytest.mark.parametrize("biased", [False, True])
def test_gathered_weights_are_sorted_if_the_scores_were(build: Any, biased: bool) -> None:
    scores = build.call(aten.sigmoid.default, build.input("scores", 3, 8))
    ranked = build.call(aten.add.Tensor, scores, build.weight("bias", torch.arange(8.0))) if biased else scores
    chosen = build.call(operator.getitem, build.call(aten.topk.default, ranked, 2), 1)
    assert descending(build.call(aten.gather.default, scores, 1, chosen)) is not biased
