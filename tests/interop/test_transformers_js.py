"""Unchanged artifacts in transformers.js under Node.js: the same greedy tokens as in moec's own runner."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moec

pytestmark = pytest.mark.interop
PACKAGE = "@huggingface/transformers@4.3.2"
SCRIPT = Path(__file__).with_name("generate_with_transformers_js.mjs")
# Those of its model types that are mixtures of experts.
FAMILIES = ("afmoe", "deepseek_v3", "gpt_oss", "lfm2_moe", "qwen2_moe", "qwen3_moe", "solar_open")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers.js and the script."""
    assert shutil.which("npm"), "no npm: install Node.js 20 or later"
    folder = tmp_path_factory.mktemp("node")
    # Without the script that downloads CUDA libraries; the runtime for CPUs is in the package.
    command = ["npm", "install", "--silent", "--ignore-scripts", "--prefix", str(folder), PACKAGE]
    subprocess.run(command, check=True, timeout=600)
    shutil.copy(SCRIPT, folder)
    return folder


def check(node: Path, checkpoint: Path, folder: Path, family: str, flavor: str, **recipe: Any) -> None:
    """The same 40 greedy tokens as in `moec run`."""
    options = {"flavor": flavor}
    moec.export(checkpoint, output=folder / family, target="onnx", options=options, gates=False, **recipe)
    prompt = list(range(5, 25))
    generator = moec.load(folder / family)
    generator.eos_token_ids = ()
    want = list(generator.tokens(prompt, max_new_tokens=40))
    command = ["node", str(node / SCRIPT.name), f"{folder}/", family, json.dumps(prompt), "40", flavor]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == want


@pytest.mark.parametrize("flavor", ["default", "web"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(
    family: str, flavor: str, node: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    check(node, tiny_checkpoint(family), tmp_path, family, flavor)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_codes_of_int4(family: str, node: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    quantize = {"format": "int4", "rounding": "rtn"}
    check(node, tiny_checkpoint(family), tmp_path, family, "web", quantize=quantize)
