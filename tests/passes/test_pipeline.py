"""The list of passes, its order, and what runs them."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
import torch

from moec.compiler.common.errors import MoecError, UnsupportedModelError, UsageError
from moec.compiler.ir.interpreter import Interpreter
from moec.compiler.ir.invariants import InvariantError
from moec.compiler.ir.printing import format_graph
from moec.passes import check_order, default_passes, run_passes
from moec.passes.base import Pass, PassResult
from moec.passes.canonical.dead_code import DeadCode
from moec.passes.canonical.normalize import Normalize
from moec.passes.fuse.rms_norm import RmsNorm


@dataclass(frozen=True)
class Third(Pass):
    name: ClassVar[str] = "third"
    requires: ClassVar[tuple[str, ...]] = ("normalize",)

    def run(self, program):
        return PassResult(program, modified=False)


@dataclass(frozen=True)
class Failing(Pass):
    error: Exception
    name: ClassVar[str] = "failing"

    def run(self, program):  # noqa: ARG002
        raise self.error


@dataclass(frozen=True)
class Breaking(Pass):
    name: ClassVar[str] = "breaking"

    def run(self, program):
        return PassResult(program.replace(layers=()), modified=True)


def entry(name, attribute="Third"):
    return EntryPoint(name, f"{__name__}:{attribute}", "moec.passes")


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_the_default_passes_keep_the_results(captured, feeds, family):
    before = captured[family]
    after, _ = run_passes(before, default_passes(extra=()))
    for batch, sequence, past in ((1, 1, 9), (2, 5, 0)):
        values = feeds(before, batch, sequence, past)
        want, got = Interpreter(before).run(values), Interpreter(after).run(values)
        for name, tensor in want.items():
            assert float((got[name] - tensor).abs().max()) <= 1e-5 * float(tensor.abs().max()), name


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_every_norm_and_rotation_is_recognised(captured, family):
    program, log = run_passes(captured[family], default_passes(extra=()))
    ops = torch.ops.moec
    names = {"mixtral": (5, 4), "deepseek_v2": (13, 6)}
    assert (len(program.nodes(ops.rms_norm.default)), len(program.nodes(ops.rotary.default))) == names[family]
    assert [rejection for record in log for rejection in record.rejections] == []
    kinds = {node.target for node in program.graph.nodes}
    assert not kinds & {
        torch.ops.aten.rsqrt.default,
        torch.ops.aten.polar.default,
        torch.ops.aten.slice_scatter.default,
    }


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_modified_is_the_truth_and_the_argument_stays_as_it_is(captured, family):
    program = captured[family]
    for item in default_passes(extra=()):
        text, names = format_graph(program), set(program.weights)
        result = item.run(program)
        assert (format_graph(program), set(program.weights)) == (text, names)
        changed = (format_graph(result.program), set(result.program.weights)) != (text, names)
        assert result.modified == changed, item.name
        program = result.program


def test_running_all_again_changes_nothing(captured):
    program, first = run_passes(captured["mixtral"], default_passes(extra=()))
    again, second = run_passes(program, default_passes(extra=()))
    assert any(record.modified for record in first)
    assert not any(record.modified for record in second)
    assert format_graph(again) == format_graph(program)


def test_each_pass_is_reported(captured):
    seen = []
    _, log = run_passes(captured["mixtral"], (Normalize(), DeadCode()), on_pass=seen.append)
    assert tuple(seen) == log
    assert [record.name for record in log] == ["normalize", "dead-code"]


def test_the_order_is_checked_before_anything_runs(captured):
    seen = []
    with pytest.raises(UsageError, match="rms-norm needs normalize before it; rms-norm needs fold-weights before it"):
        run_passes(captured["mixtral"], (DeadCode(), RmsNorm()), on_pass=seen.append)
    assert seen == []
    check_order(default_passes(extra=()))


def test_passes_of_third_parties_come_last():
    assert default_passes(extra=[entry("third")])[-1] == Third()


@pytest.mark.parametrize("name", ["normalize", "dead-code"])
def test_a_name_that_is_taken_is_an_error(name):
    with pytest.raises(UsageError, match=f"{name} = .* claims a name that is taken"):
        default_passes(extra=[entry(name)])


def test_two_third_parties_of_one_name():
    with pytest.raises(UsageError, match="taken"):
        default_passes(extra=[entry("third"), entry("third")])


@pytest.mark.parametrize(("name", "attribute"), [("third", "entry"), ("other", "Third")])
def test_an_entry_point_that_is_no_pass_of_its_name(name, attribute):
    with pytest.raises(UsageError, match="does not refer to a Pass of that name"):
        default_passes(extra=[entry(name, attribute)])


def test_a_failing_pass_is_named(captured):
    with pytest.raises(MoecError, match="pass failing failed: ZeroDivisionError: oh") as caught:
        run_passes(captured["mixtral"], (Failing(ZeroDivisionError("oh")),))
    assert caught.value.exit_code == 70


def test_an_error_for_the_user_keeps_its_exit_code_and_hint(captured):
    with pytest.raises(UnsupportedModelError, match="pass failing: no such thing") as caught:
        run_passes(captured["mixtral"], (Failing(UnsupportedModelError("no such thing", hint="try another")),))
    assert caught.value.hint == "try another"
    assert caught.value.message == str(caught.value)


def test_a_pass_that_breaks_a_rule_is_named(captured):
    with pytest.raises(InvariantError, match=r"pass breaking: .*table of MoE layers"):
        run_passes(captured["mixtral"], (Breaking(),))
