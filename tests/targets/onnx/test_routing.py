"""ONNX artifacts with dynamic routing against the Program that they were lowered from."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import moec
from moec import passes
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import Program
from moec.passes.canonical.common_subexpressions import CommonSubexpressions
from moec.passes.canonical.dead_code import DeadCode
from moec.passes.routing.dynamic_routing import BUDGET_INPUT, DynamicRouting
from moec.passes.routing.policies.base import Policy
from moec.passes.routing.policies.ratio import Ratio
from moec.passes.routing.policies.threshold import Threshold
from moec.passes.routing.policies.top_p import TopP
from moec.targets.onnx.runner import NUM_LOGITS, OnnxRunner
from moec.targets.onnx.target import Experts, Flavor, OnnxOptions, OnnxTarget
from tests.support.compensations import compensated

Tiny = Callable[[str], Path]
Programs = Callable[[str], Program]


def programs(program: Program, policy: Policy, *, runtime: bool = False) -> tuple[Program, Program]:
    """Without and with routing."""
    routing = (DynamicRouting(policy, runtime), CommonSubexpressions(), DeadCode())
    return program, passes.run_passes(program, routing)[0]


def lowered(
    program: Program, directory: Path, flavor: Flavor = Flavor.DEFAULT, experts: Experts = Experts.AUTO
) -> tuple[OnnxRunner, dict[str, int]]:
    directory.mkdir()
    options = OnnxOptions(flavor=flavor, experts=experts)
    found = OnnxTarget().lower(program, options, directory, lambda *_: None)
    return OnnxRunner(directory, threads=1), found.facts["ops"]


def assert_same(runner: OnnxRunner, program: Program, seed: int = 5) -> None:
    ids = np.random.default_rng(seed).integers(3, program.vocab_size, (2, 9))
    reference = ProgramRunner(program)
    for step in (ids[:, :6], ids[:, 6:7], ids[:, 7:]):
        want, got = reference.decode(step), runner.decode(step)
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    runner.reset()


@pytest.mark.parametrize("experts", [Experts.KERNEL, Experts.GROUPED])
def test_what_stands_in_for_dropped_experts_is_added(
    tiny_checkpoint: Tiny, program_of: Programs, tmp_path: Path, experts: Experts
) -> None:
    program = compensated(program_of(tiny_checkpoint("olmoe")), TopP(mass=0.5, renormalize=False))
    runner, _ = lowered(program, tmp_path / "out", experts=experts)
    assert_same(runner, program)


@pytest.mark.parametrize("flavor", [Flavor.DEFAULT, Flavor.PORTABLE])
@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("mixtral", TopP(mass=0.6)),
        ("deepseek_v3", TopP(mass=0.6)),
        ("mixtral", Threshold(tau=0.45, absolute=True)),  # its weights sum to 1
        ("deepseek_v3", Threshold(tau=0.83, absolute=True)),  # and these to routed_scaling_factor, 2.5
    ],
)
def test_parity_with_sorted_and_unsorted_slots(
    family: str, policy: Policy, flavor: Flavor, program_of: Programs, tmp_path: Path
) -> None:
    off, on = programs(program_of(family), policy)
    runner, _ = lowered(on, tmp_path / "on", flavor)
    assert_same(runner, on)
    ids = np.arange(3, 20)[None]
    assert np.abs(runner.prefill(ids) - ProgramRunner(off).prefill(ids)).max() > 1e-3


def test_four_nodes_a_layer_where_the_kernel_normalises(program_of: Programs, tmp_path: Path) -> None:
    off, on = programs(program_of("golden"), TopP(mass=0.8))
    (_, before), (runner, after) = (
        lowered(program, tmp_path / name, experts=Experts.KERNEL) for name, program in (("off", off), ("on", on))
    )
    added = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert added == {"MatMul": 4, "Mul": 4, "Less": 4, "Where": 4}
    assert_same(runner, on)


def test_the_threshold_can_be_fed_and_need_not_be(program_of: Programs, tmp_path: Path) -> None:
    off, on = programs(program_of("mixtral"), Ratio(beta=0.9), runtime=True)
    runner, _ = lowered(on, tmp_path / "on")
    assert_same(runner, on)
    assert [item.name for item in runner.session.get_overridable_initializers()] == [BUDGET_INPUT, NUM_LOGITS]
    runner.overrides[BUDGET_INPUT] = np.asarray(0.0, np.float32)
    ids = np.arange(3, 20)[None]
    want = ProgramRunner(off).prefill(ids)
    np.testing.assert_allclose(runner.prefill(ids), want, atol=1e-5 * np.abs(want).max())


def test_the_threshold_of_an_exported_artifact_is_set_by_name(golden_model: Path, tmp_path: Path) -> None:
    routing = {"policy": "ratio", "parameters": {"beta": 0.9}, "runtime_input": True}
    moec.export(golden_model, target="onnx", output=tmp_path / "on", routing=routing, gates=False)
    ids = np.arange(3, 40)[None]
    default, off, same = (
        moec.load(tmp_path / "on", inputs=inputs).runner.prefill(ids)
        for inputs in (None, {BUDGET_INPUT: 0.0}, {BUDGET_INPUT: 0.9})
    )
    assert np.array_equal(default, same)
    assert np.abs(default - off).max() > 1e-2
