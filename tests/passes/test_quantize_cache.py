"""A KV cache in 8 bits: the graph, its numbers, and a cache that must stay as it is."""

import operator
from dataclasses import replace
from typing import Any

import pytest
import torch
from syrupy.assertion import SnapshotAssertion
from torch import Tensor

from moec.compiler.ir.interpreter import Interpreter
from moec.compiler.ir.invariants import check_invariants
from moec.compiler.ir.ops import to_codes
from moec.compiler.ir.printing import format_graph
from moec.compiler.ir.program import ATTENTION, Program, TensorSpec, state_spec
from moec.compiler.ir.weights import WeightStore
from moec.passes import default_passes, run_passes
from moec.passes.quantize_cache import QuantizeCache
from moec.quantize.kv_cache import unit_scales

HEADS, PAST, NEW, WIDTH, VALUES = 2, 5, 3, 8, 6
KEY, VALUE = "past_key_values.0.key", "past_key_values.0.value"


def program_of(build: Any, *, read_elsewhere: bool = False) -> Program:
    """One attention node with its cache; values are narrower than keys."""
    query, key = build.input("query", 1, 2 * HEADS, NEW, WIDTH), build.input("key", 1, HEADS, NEW, WIDTH)
    value, slots = build.input("value", 1, HEADS, NEW, VALUES), build.input("cache_position", NEW, dtype=torch.int64)
    build.feeds["cache_position"] = torch.arange(PAST, PAST + NEW)
    past = build.input(KEY, 1, HEADS, PAST, WIDTH), build.input(VALUE, 1, HEADS, PAST, VALUES)
    found = build.call(ATTENTION, query, key, value, *past, slots, None, None, 0.3, "causal", 0, 0.0, None, None, None)
    out, *present = (build.call(operator.getitem, found, index) for index in range(3))
    if read_elsewhere:
        out = build.call(torch.ops.aten.add.Tensor, out, build.call(torch.ops.aten.amax.default, past[0], [0, 1, 2, 3]))
    build.graph.output((out, *present))
    states = []
    for kind, width in (("key", WIDTH), ("value", VALUES)):
        state = state_spec(0, kind, (1, HEADS, PAST, width), torch.float32)
        after = TensorSpec(state.output.name, (1, HEADS, PAST + NEW, width), torch.float32)
        states.append(replace(state, output=after))
    inputs = tuple(spec for spec in build.inputs if spec.name not in (KEY, VALUE))
    return Program(build.graph, WeightStore({}), inputs, tuple(states), (), torch.float32, config={}, dims={})


@pytest.fixture
def scales() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {KEY: (HEADS, WIDTH), VALUE: (HEADS, VALUES)}
    return {name: torch.rand(shape, generator=generator) * 0.01 + 0.01 for name, shape in shapes.items()}


def test_the_graph(build: Any, scales: dict[str, Tensor], snapshot: SnapshotAssertion) -> None:
    program = program_of(build)
    found = QuantizeCache(scales).run(program)
    assert found.modified
    assert not found.rejections
    check_invariants(found.program, ("decompose",))
    assert format_graph(found.program) == snapshot
    assert {spec.dtype for state in found.program.states for spec in (state.input, state.output)} == {torch.int8}
    assert {state.input.dtype for state in program.states} == {torch.float32}


def test_attention_reads_codes_times_scale(build: Any, scales: dict[str, Tensor]) -> None:
    """Past tokens are codes already, and those of the step are rounded before they are read; large ones are cut off."""
    program, feeds = program_of(build), build.feeds
    rounded = QuantizeCache(scales).run(program).program
    codes = {name: to_codes(feeds[name], scale) for name, scale in scales.items()}
    got = Interpreter(rounded).run({**feeds, **codes})
    new = {KEY: to_codes(feeds["key"], scales[KEY]), VALUE: to_codes(feeds["value"], scales[VALUE])}
    for state in rounded.states:
        name = state.input.name
        assert torch.equal(got[state.output.name], torch.cat([codes[name], new[name]], dim=2))
    read = {name: each.float() * scales[name][:, None] for name, each in codes.items()}
    fed = {end: new[name].float() * scales[name][:, None] for name, end in ((KEY, "key"), (VALUE, "value"))}
    want = Interpreter(program).run({**feeds, **read, **fed})["logits"]
    assert torch.allclose(got["logits"], want, atol=1e-6)
    exact = Interpreter(program).run(feeds)["logits"]
    assert float((want - exact).abs().max()) > 1e-4
    assert int(new[KEY].max()) == 127
    assert int(new[KEY].min()) == -128


def test_codes_are_the_nearest_and_halves_go_to_the_even_one() -> None:
    values = torch.tensor([0.5, 1.5, -0.5, -2.5, 1.4, 300.0, -300.0]).reshape(1, 1, 7, 1)
    found = to_codes(values * 0.25, torch.tensor([[0.25]]))
    assert found.flatten().tolist() == [0, 2, 0, -2, 1, 127, -128]
    assert found.dtype is torch.int8


def test_a_cache_that_something_else_reads_stays_as_it_is(build: Any, scales: dict[str, Tensor]) -> None:
    program = program_of(build, read_elsewhere=True)
    found = QuantizeCache(scales).run(program)
    assert not found.modified
    assert found.program is program
    (rejection,) = found.rejections
    assert "something besides its attention reads the cache" in rejection.reason


def test_without_scales_nothing_changes(build: Any) -> None:
    program = program_of(build)
    assert QuantizeCache().run(program).program is program


def test_the_states_of_other_kinds_stay_as_they_are(capture_of: Any) -> None:
    program, log = run_passes(capture_of("qwen3_next"), default_passes())
    found, _ = run_passes(program, (QuantizeCache(unit_scales(program)),), completed=[record.name for record in log])
    kinds = {(state.kind, state.input.dtype is torch.int8) for state in found.states}
    assert kinds == {("conv", False), ("recurrent", False), ("key", True), ("value", True)}
