"""Embeddings in place of token ids: what transformers makes of `inputs_embeds`, on the Program and on an artifact."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moec.compiler.common.errors import UsageError
from moec.compiler.frontend import architecture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.pipeline.export import compile_recipe
from moec.compiler.pipeline.recipe import make_recipe
from moec.targets import get_target


@pytest.mark.parametrize("name", ["gemma-4-26B-A4B", "Qwen3-VL-30B-A3B"])
def test_an_app_can_feed_images(name: str, tiny_checkpoint, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(name))
    fields = {"checkpoint": str(checkpoint.directory), "target": "onnx", "inputs_embeds": True}
    result = compile_recipe(make_recipe(fields), tmp_path / "out", gates=False)
    target = get_target("onnx")
    runner = target.open(tmp_path / "out", threads=1)
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


def test_a_target_without_such_an_input_says_so(tiny_checkpoint, tmp_path: Path) -> None:
    fields = {"checkpoint": str(tiny_checkpoint("olmoe")), "target": "tflite", "inputs_embeds": True}
    with pytest.raises(UsageError, match="tflite has no optional input of embeddings"):
        compile_recipe(make_recipe(fields), tmp_path / "out")
