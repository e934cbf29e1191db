"""Embeddings in place of token ids: what transformers makes of `inputs_embeds`, on the Program and on artifacts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec import passes
from moec.compiler.common.errors import LoweringError, UsageError
from moec.compiler.common.validation import validate
from moec.compiler.frontend import architecture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import Program
from moec.compiler.pipeline.export import compile_recipe
from moec.compiler.pipeline.recipe import make_recipe
from moec.compiler.pipeline.refusals import check_target
from moec.passes.inputs_embeds import NAME, InputsEmbeds
from moec.passes.routing.dynamic_routing import BUDGET_INPUT, DynamicRouting
from moec.passes.routing.policies.ratio import Ratio
from moec.targets import get_target
from moec.targets.runners import AdjustableRunner, Runner


@pytest.mark.parametrize("name", ["gemma-4-26B-A4B", "Qwen3-VL-30B-A3B"])
def test_an_app_can_feed_images(name: str, tiny_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(name))
    fields = {"checkpoint": str(checkpoint.directory), "target": "onnx", "inputs_embeds": True}
    result = compile_recipe(make_recipe(fields), tmp_path / "out", gates=False)
    target = get_target("onnx")
    runner: Any = target.open(tmp_path / "out", threads=1)
    assert "inputs_embeds" in [spec["name"] for spec in result.manifest["signature"]["inputs"]]

    kind, config = architecture.model_class(checkpoint.config)
    model = kind.from_pretrained(checkpoint.directory, config=config, dtype=torch.float32).eval()
    random = np.random.default_rng(0)
    ids = random.integers(3, 127, (2, 9))
    with torch.no_grad():
        embeds = model.get_input_embeddings()(torch.from_numpy(ids))
        words = model(input_ids=torch.from_numpy(ids)).logits.numpy()
        embeds[:, 2:5] = 0.5 * torch.from_numpy(random.standard_normal((2, 3, embeds.shape[-1])).astype(np.float32))
        want = model(inputs_embeds=embeds).logits.numpy()
    np.testing.assert_allclose(runner.prefill(ids), words, atol=1e-4 * np.abs(words).max())
    ids[:, 2:5] = -1
    runner.overrides["inputs_embeds"] = embeds.numpy()
    np.testing.assert_allclose(runner.prefill(ids), want, atol=1e-4 * np.abs(want).max())
    assert np.abs(want - words).max() > 0.1


@pytest.mark.parametrize(("name", "options"), [("onnx", {}), ("tensorrt", {"engine": False, "batch": 2})])
def test_in_half_precision_the_input_need_not_be_fed(
    name: str, options: dict[str, Any], tiny_checkpoint: Any, tmp_path: Path
) -> None:
    # The default in ONNX has one row. ONNX Runtime casts it, and let values with a row for each token use its buffer.
    fields = {"checkpoint": str(tiny_checkpoint("llama4_text")), "target": name, "dtype": "fp16", "options": options}
    ids, runner, found = np.random.default_rng(0).integers(3, 127, (2, 9)), None, []
    for given in (False, True):
        compile_recipe(make_recipe({**fields, "inputs_embeds": given}), tmp_path / str(given), gates=False)
        runner = get_target(name).open_reference(tmp_path / str(given), threads=1)
        found.append(runner.prefill(ids))
    close(*found, limit=1e-2)
    # Whoever feeds it gives float32, whatever the precision of the graph.
    assert isinstance(runner, AdjustableRunner)
    runner.overrides[NAME] = np.zeros((2, 9, 64), np.float32)
    close(runner.prefill(ids), found[0], limit=1e-2)


@pytest.mark.usefixtures("fake_target")
def test_a_target_without_such_an_input_says_so(tiny_checkpoint: Any, tmp_path: Path) -> None:
    fields = {"checkpoint": str(tiny_checkpoint("olmoe")), "target": "fake", "inputs_embeds": True}
    with pytest.raises(UsageError, match="fake does not support an input of embeddings"):
        compile_recipe(make_recipe(fields), tmp_path / "out")


# Targets whose inputs have no defaults -------------------------------------------------------------------------------

TARGETS: dict[str, dict[str, Any]] = {
    # Prompts longer than a piece, so that each piece has its own rows, the last one padded (TFLite).
    "tflite": {"prefill": (8,), "context": 32},
    "coreml": {"prefill_chunk": 4, "context": 32},
    "tensorrt": {"engine": False, "context": 32, "piece": 4, "prompt": 4},
}


@pytest.fixture(scope="module")
def plain(program_of: Any) -> Program:
    program: Program = program_of("olmoe")
    return program


@pytest.fixture(scope="module")
def feedable(capture_of: Any) -> Program:
    """The same with the input of embeddings."""
    return passes.run_passes(capture_of("olmoe"), (InputsEmbeds(), *passes.default_passes()))[0]


def fed(program: Program, rows: np.ndarray) -> ProgramRunner:
    """The reference, with embeddings for every token of its only call."""
    return ProgramRunner(program.replace(input_defaults={**program.input_defaults, NAME: torch.from_numpy(rows)}))


def lowered(name: str, program: Program, directory: Path) -> tuple[Runner, Any]:
    target = get_target(name)
    options = validate(target.Options, TARGETS[name], where=name)
    check_target(target, program, options)
    made = target.lower(program, options, directory, lambda *_: None)
    return target.open(directory, threads=1), made


@pytest.mark.parametrize("name", TARGETS)
def test_an_artifact_computes_what_the_program_computes(
    name: str, feedable: Program, plain: Program, tmp_path: Path
) -> None:
    program = feedable
    runner: Any
    runner, made = lowered(name, program, tmp_path)
    assert get_target(name).takes_embeddings
    assert f'"{NAME}"' in json.dumps(made.signature)
    random = np.random.default_rng(1)
    ids, width = random.integers(3, program.vocab_size, (1, 19)), int(program.inputs[-1].shape[-1])

    words = ProgramRunner(plain).prefill(ids)
    close(runner.prefill(ids), words)

    image = ids.copy()
    image[:, [0, 3, 4, 5, 9, 17]] = -1
    rows = random.standard_normal((1, 19, width)).astype(np.float32)
    want = fed(program, rows).prefill(image)
    assert np.abs(want - words).max() > 0.1 * np.abs(words).max()
    runner.overrides[NAME] = rows
    close(runner.prefill(image), want)
    # In steps of which each has its own rows, single tokens among them.
    got = []
    runner.reset()
    for first, last in ((0, 11), (11, 17), (17, 18), (18, 19)):
        runner.overrides[NAME] = rows[:, first:last]
        got.append(runner.decode(image[:, first:last]))
    close(np.concatenate(got, axis=1), want)

    with pytest.raises(UsageError, match=rf"inputs_embeds has the shape \[1, 1, {width}\].* needs \[1, 19, {width}\]"):
        runner.prefill(ids)
    del runner.overrides[NAME]
    close(runner.prefill(ids), words)


def close(got: np.ndarray, want: np.ndarray, limit: float = 1e-4) -> None:
    np.testing.assert_allclose(got, want, atol=limit * np.abs(want).max())


@pytest.mark.parametrize("name", TARGETS)
def test_beside_a_routing_budget(name: str, feedable: Program, plain: Program, tmp_path: Path) -> None:
    """Two inputs that passes added: one with a row for each token, and one value for all."""
    program = DynamicRouting(Ratio(beta=0.9), runtime_budget=True).run(feedable).program
    runner: Any
    runner, _ = lowered(name, program, tmp_path)
    ids = np.random.default_rng(2).integers(3, program.vocab_size, (1, 10))
    routed, static = ProgramRunner(program).prefill(ids), ProgramRunner(plain).prefill(ids)
    close(runner.prefill(ids), routed)
    runner.overrides[BUDGET_INPUT] = np.asarray(0.0, np.float32)
    close(runner.prefill(ids), static)
    assert np.abs(routed - static).max() > 1e-2 * np.abs(static).max()


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("coreml", {"flavor": "swift-transformers"}, "swift-transformers feeds no such input"),
        ("tflite", {"bundle": True}, "LiteRT-LM (--bundle) does not feed such an input"),
    ],
)
def test_a_library_that_feeds_no_such_input(name: str, options: dict[str, Any], reason: str, feedable: Program) -> None:
    target = get_target(name)
    with pytest.raises(LoweringError, match=re.escape(f"input {NAME}: {reason}")):
        check_target(target, feedable, validate(target.Options, options, where=name))
