"""A trained model with experts that no text reaches: it passes, and an artifact that has one of them wrong fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx

import moec
from moec.compiler.common.verdict import Status
from moec.compiler.gates.cases import Prompts
from moec.compiler.gates.coverage import judge_coverage, run_every_expert
from moec.compiler.gates.parity import ParityOptions, gather_artifact, judge_parity
from moec.compiler.gates.tolerance import precision_of
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import EXPERTS, Program
from moec.targets import get_target
from moec.targets.base import Target

RARE = ((1, 5), (2, 11), (3, 0))
"""Layer and expert."""
UNMEASURED = {"quality", "latency", "repeatability", "engine: execution"}
"""Gates that do not run here: nothing is demanded, or the runtime of users is not on this machine."""
DTYPES = {"coreml": torch.float16}
Programs = Callable[..., Program]


def turned(states: torch.Tensor) -> torch.Tensor:
    """A row of the router whose score is far below 0 for every one of `states` [T, H]: [H]."""
    return torch.linalg.lstsq(states, torch.full((len(states), 1), -400.0)).solution[:, 0]


@pytest.fixture(scope="module")
def rare_model(golden_model: Path, capture_of: Programs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model with three rows of its routers turned away from every hidden state that text makes."""
    directory = tmp_path_factory.mktemp("rare") / "model"
    shutil.copytree(golden_model, directory)
    program = capture_of(golden_model)
    layers = {node: layer for layer, node in enumerate(program.nodes(EXPERTS))}
    states: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers.values()}

    def watch(node: fx.Node, args: tuple[Any, ...], _: Any) -> None:
        if node.target is EXPERTS:
            states[layers[node]].append(args[0])

    runner, prompts = ProgramRunner(program, observer=watch), Prompts.of(golden_model, program.vocab_size, seed=7)
    for _ in range(3):
        runner.prefill(prompts.text(1, 512))
        runner.prefill(prompts.random(1, 256))
        runner.prefill(prompts.text(64, 9))
    tensors = load_file(directory / "model.safetensors")
    for layer, expert in RARE:
        row = tensors[f"model.layers.{layer}.mlp.gate.weight"][expert]
        row.copy_(turned(torch.cat(states[layer])).to(row.dtype))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def reverse_sign(directory: Path, value: np.ndarray) -> None:
    """Negate a matrix wherever the files of an artifact hold it, one way round or the other."""
    changed = 0
    for path in (path for path in directory.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for form in (value, value.T):
            for dtype in (np.float32, np.float16):
                stored = np.ascontiguousarray(form).astype(dtype)
                changed += data.count(stored.tobytes())
                data = data.replace(stored.tobytes(), (-stored).tobytes())
        path.write_bytes(data)
    assert changed


class Artifact:
    """The rare model on one target, its Program, and what the reference met."""

    def __init__(self, model: Path, name: str, directory: Path, program_of: Programs) -> None:
        self.target: Target = get_target(name)
        self.result = moec.export(model, target=name, output=directory)
        self.directory = directory
        self.program: Program = program_of(model, DTYPES.get(name, torch.float32))
        self._prompts: Callable[[], Prompts] = lambda: Prompts.of(model, self.program.vocab_size)

    def judge(self) -> tuple[Any, Any]:
        """The verdicts of parity and of coverage on the files as they are now."""
        options = ParityOptions(greedy_tokens=0, long_prompt=130)
        runner = self.target.open_reference(self.directory)
        seen = gather_artifact(self.program, runner, self._prompts(), options, lambda *_: None)
        runners = self.target.open_experts(self.directory)
        found = run_every_expert(self.program, runners, seen.hidden)
        precision = precision_of(self.program)
        return judge_parity("parity", seen, options), judge_coverage(found, list(runners), precision, 1.0, seen.usage)


def check(artifact: Artifact) -> None:
    """Every gate passes; one rare expert with the wrong sign fails coverage, and parity does not see it."""
    verdicts = {verdict.gate: verdict for verdict in artifact.result.verdicts}
    assert {gate for gate, verdict in verdicts.items() if verdict.status is not Status.PASS} <= UNMEASURED
    never = verdicts["coverage"].figures["steps"]["parity: artifact"]["never"]
    for layer, expert in RARE:
        assert expert in never[artifact.program.layers[layer].module]
    layer, expert = RARE[1]
    value = artifact.program.weights.read(artifact.program.layers[layer].down_proj)[expert].numpy()
    reverse_sign(artifact.directory, value)
    parity, coverage = artifact.judge()
    assert parity.status is Status.PASS, "no text reaches it, so parity cannot see it"
    assert coverage.status is Status.FAIL
    assert [item["wrong"] for item in coverage.figures["experts"]] == [[], [], [expert], []]
    reverse_sign(artifact.directory, -value)


@pytest.fixture(scope="module")
def onnx_artifact(rare_model: Path, program_of: Programs, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The rare model as ONNX."""
    return Artifact(rare_model, "onnx", tmp_path_factory.mktemp("rare") / "artifact", program_of)


def test_rare_experts_pass_and_a_wrong_one_fails(onnx_artifact: Artifact) -> None:
    check(onnx_artifact)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tflite", "coreml", "tensorrt"])
def test_rare_experts_on_other_targets(name: str, rare_model: Path, program_of: Programs, tmp_path: Path) -> None:
    check(Artifact(rare_model, name, tmp_path / "artifact", program_of))


def test_a_graph_that_mixes_up_experts_fails_though_every_weight_is_right(onnx_artifact: Artifact) -> None:
    """Integrity reads the weights, which are all there: only running the expert shows that another one is used."""
    import onnx

    artifact, (layer, expert) = onnx_artifact, RARE[0]
    own = artifact.program.layers[layer].down_proj
    model = onnx.load(artifact.directory / "model.onnx", load_external_data=False)
    (node,) = [node for node in model.graph.node if f"{own}.{expert}" in node.input]
    node.input[1] = f"{own}.{expert + 1}"
    onnx.save(model, artifact.directory / "model.onnx")
    stored = artifact.target.stored_weights(artifact.directory)
    np.testing.assert_array_equal(stored[own].values(0, 16), artifact.program.weights.read(own).numpy())
    parity, coverage = artifact.judge()
    assert parity.status is Status.PASS
    assert [item["wrong"] for item in coverage.figures["experts"]] == [[], [expert], [], []]
