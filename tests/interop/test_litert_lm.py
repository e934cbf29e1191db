"""A bundle of `--target tflite --bundle` in LiteRT-LM, the runtime of phones, in an environment of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import moec
from tests.support.environments import environment
from tests.support.start_token import add_start_token

pytestmark = pytest.mark.interop
GENERATE = Path(__file__).with_name("generate_with_litert_lm.py")
TOKENS = 64


def answers(directory: Path, cache: Path, texts: list[str]) -> list[str]:
    cache.mkdir()
    python = environment("litert-lm", ["litert-lm-api==0.18.1"])
    command = [python, GENERATE, directory / "model.litertlm", cache, json.dumps(texts), TOKENS]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["version"] == "0.18.1"
    found: list[str] = result["answers"]
    return found


def export(checkpoint: Path, directory: Path, quantize: str | None = None) -> Path:
    options = {"bundle": True, "context": 256}
    section = None if quantize is None else {"format": quantize, "rounding": "rtn"}
    moec.export(checkpoint, target="tflite", output=directory, options=options, quantize=section, gates=False)
    return directory


def test_greedy_text(golden_model: Path, golden_prompts: list[tuple[list[int], list[int]]], tmp_path: Path) -> None:
    """The tokens that were recorded from transformers."""
    tokenizer = Tokenizer.from_file(str(golden_model / "tokenizer.json"))
    texts = [tokenizer.decode(prompt) for prompt, _ in golden_prompts]
    assert [tokenizer.encode(text).ids for text in texts] == [prompt for prompt, _ in golden_prompts]
    directory = export(golden_model, tmp_path / "out")
    found = answers(directory, tmp_path / "cache", texts)
    assert found == [tokenizer.decode(greedy) for _, greedy in golden_prompts]


def with_start_token(golden_model: Path, directory: Path) -> Path:
    """The golden model with a tokenizer that puts the token 0 before every text, as that of Llama does."""
    shutil.copytree(golden_model, directory, ignore=shutil.ignore_patterns("*.npz", "texts"))
    add_start_token(directory / "tokenizer.json")
    return directory


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_the_text_of_moec_run(quantize: str | None, golden_model: Path, tmp_path: Path) -> None:
    """With a start token, and with the kernels of quantized weights."""
    directory = export(with_start_token(golden_model, tmp_path / "checkpoint"), tmp_path / "out", quantize)
    text = "It is a truth universally acknowledged, that a single man"
    model = moec.load(directory)
    want = model.generate(text, max_new_tokens=TOKENS, temperature=0)
    assert answers(directory, tmp_path / "cache", [text]) == [want]
