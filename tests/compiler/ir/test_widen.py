"""A Program captured in float16, in float32: what a capture in float32 gives."""

import itertools
import re
from collections.abc import Callable

import pytest
import torch
from torch import fx

from moec.compiler.ir.interpreter import Interpreter
from moec.compiler.ir.printing import format_graph
from moec.compiler.ir.program import Program
from moec.compiler.ir.widen import widened

Capture = Callable[..., Program]
FAMILIES = ("mixtral", "deepseek_v2")


def numbered(program: Program) -> str:
    """The text of the graph with its nodes numbered."""
    numbers: dict[str, int] = {}
    count = itertools.count()
    return re.sub(r"%\w+", lambda name: f"%{numbers.setdefault(name[0], next(count))}", format_graph(program))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_capture_in_float32_gives(family: str, capture_of: Capture) -> None:
    half, want = capture_of(family, torch.float16), capture_of(family)
    before = format_graph(half)
    got = widened(half)
    assert numbered(got) == numbered(want)
    assert (got.dtype, got.inputs, got.states) == (want.dtype, want.inputs, want.states)
    assert format_graph(half) == before


def test_weights_and_tables_are_not_rounded(capture_of: Capture) -> None:
    half, want = capture_of("mixtral", torch.float16), capture_of("mixtral")
    results = []
    for program in (widened(half), want):
        generator = torch.Generator().manual_seed(5)
        feeds = {
            "input_ids": torch.randint(3, program.vocab_size, (2, 6), generator=generator),
            "attention_mask": torch.ones(2, 6, dtype=torch.int64),
            "position_ids": torch.arange(6).expand(2, -1),
            "cache_position": torch.arange(6),
            **{state.input.name: torch.zeros(2, 2, 0, 16) for state in program.states},
        }
        results.append(Interpreter(program).run(feeds)["logits"])
    assert float((results[0] - results[1]).abs().max()) <= 1e-6 * float(results[1].abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_in_half_precision(family: str, capture_of: Capture) -> None:
    program = widened(capture_of(family, torch.float16))
    for node in program.graph.nodes:
        found: list[object] = []
        fx.node.map_aggregate((node.args, node.kwargs, node.meta.get("val")), found.append)
        assert not any(getattr(item, "dtype", item) is torch.float16 for item in found), node


def test_a_program_in_float32_stays_as_it_is(capture_of: Capture) -> None:
    program = capture_of("mixtral")
    assert widened(program) is program
