"""Steps that compute the logits of their last token alone."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import fx

from moec.compiler.ir.interpreter import ProgramRunner
from moec.targets.onnx import lower
from moec.targets.onnx.lowerings.last_logits import head_of
from moec.targets.onnx.lowerings.table import onnx_dialect
from moec.targets.onnx.runner import NUM_LOGITS
from moec.targets.runners import last_logits

aten = torch.ops.aten
FLAVORS = ("default", "genai", "portable", "web")


def test_golden_graph(tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    """The cut is before the head, and the axis after it has a name of its own."""
    model = lower_checkpoint(tiny_checkpoint("mixtral"))
    graph = ir.load(model.directory / "model.onnx").graph
    (logits,) = (value for value in graph.outputs if value.name == "logits")
    head = logits.producer()
    assert head is not None
    cut = head.inputs[0].producer()
    start = cut.inputs[1].producer()
    negated = start.inputs[0].producer()
    assert [node.op_type for node in (head, cut, start, negated)] == ["MatMul", "Slice", "Reshape", "Neg"]
    count = negated.inputs[0]
    assert (count.name, count.shape, count.const_value.numpy().item()) == (NUM_LOGITS, ir.Shape([]), 0)
    assert [str(value.shape[1]) for value in (cut.inputs[0], cut.outputs[0], logits)] == [
        "sequence_length",
        "logits_length",
        "logits_length",
    ]
    assert {"name": NUM_LOGITS, "shape": [], "dtype": "int64"} in model.lowered.signature["inputs"]


@pytest.mark.parametrize(
    ("family", "flavor"),
    [
        *itertools.product(("gpt_oss", "granitemoe"), ("default", "genai", "portable", "web")),
        ("gemma4_text", "default"),
    ],
)
def test_the_last_row(family: str, flavor: str, tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    """Logits that are scaled (granitemoe) or capped (Gemma 4), a batch with padding, and all logits after it."""
    model = lower_checkpoint(tiny_checkpoint(family), flavor=flavor)
    assert NUM_LOGITS in {spec.name for spec in model.runner.session.get_overridable_initializers()}
    ids = np.random.default_rng(0).integers(3, model.program.vocab_size, (2, 11))
    mask = (np.arange(8)[None] >= np.array([[0], [3]])).astype(np.int64)
    reference = ProgramRunner(model.program)
    padded = reference.prefill(ids[:, :8], mask)[:, -1]
    scale = np.abs(padded).max()
    model.runner.reset()
    got = model.runner.decode_last(ids[:, :8], mask)
    assert got.shape == padded.shape
    assert np.abs(got - padded).max() <= 1e-5 * scale
    want = [reference.prefill(ids[:1, :8]), reference.decode(ids[:1, 8:])]
    assert np.abs(last_logits(model.runner, ids[:1, :8], start=True) - want[0][:, -1]).max() <= 1e-5 * scale
    rest = model.runner.decode(ids[:1, 8:])
    assert rest.shape == want[1].shape
    assert np.abs(rest - want[1]).max() <= 1e-5 * scale


def test_the_input_is_left_out_where_the_head_is_not_the_end(program_of: Any, tiny_checkpoint: Any) -> None:
    """Logits that depend on other tokens, hidden states that something else reads, and inputs without defaults."""
    program = program_of(tiny_checkpoint("mixtral"))
    assert [node.target for node in head_of(program)] == [aten.linear.default]
    summed = program.copy_graph()
    logits = summed.output_node().args[0][0]
    with summed.inserting_after(logits):
        total = summed.call_function(aten.cumsum.default, (logits, 1))
    total.meta = dict(logits.meta)
    shared = program.copy_graph()
    hidden = shared.output_node().args[0][0].args[0]
    with shared.inserting_after(hidden):
        other = shared.call_function(aten.neg.default, (hidden,))
    other.meta = dict(hidden.meta)
    assert head_of(program.replace(graph=_with_logits(summed, total))) == ()
    assert head_of(program.replace(graph=shared)) == ()
    capped = program.copy_graph()
    logits = capped.output_node().args[0][0]
    with capped.inserting_after(logits):
        bounded = capped.call_function(aten.tanh.default, (logits,))
    bounded.meta = dict(logits.meta)
    assert head_of(program.replace(graph=_with_logits(capped, bounded))) == (logits, bounded)
    with capped.inserting_after(logits):
        capped.call_function(aten.neg.default, (logits,)).meta = dict(logits.meta)
    assert head_of(program.replace(graph=capped)) == ()
    model, _ = lower.build(program.replace(graph=shared), onnx_dialect(contrib=True))
    assert NUM_LOGITS not in {value.name for value in model.graph.inputs}


def _with_logits(graph: fx.Graph, logits: fx.Node) -> fx.Graph:
    output = graph.output_node()
    output.args = ((logits, *output.args[0][1:]),)
    return graph


def test_a_runner_without_it_computes_all(tiny_checkpoint: Any, program_of: Any) -> None:
    program = program_of(tiny_checkpoint("mixtral"))
    ids = np.random.default_rng(0).integers(3, program.vocab_size, (1, 7))
    runner, other = ProgramRunner(program), ProgramRunner(program)
    want = other.prefill(ids)
    for start, stop in ((0, 5), (5, 7)):
        found = last_logits(runner, ids[:, start:stop], start=not start)
        assert found.shape == (1, program.vocab_size)
        assert np.abs(found - want[:, stop - 1]).max() <= 1e-5 * np.abs(want).max()
