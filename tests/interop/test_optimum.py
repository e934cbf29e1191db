"""An artifact of the default flavor in optimum-onnx's ORTModelForCausalLM, in an environment of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.environments import environment, lines

pytestmark = pytest.mark.interop
HERE = Path(__file__).parent


def test_greedy_tokens(
    export_golden: Callable[[str], Path],
    golden_prompts: list[tuple[list[int], list[int]]],
) -> None:
    python = environment("optimum", lines(HERE / "optimum-requirements.txt"))
    prompts, greedy = zip(*golden_prompts, strict=True)
    command = [python, HERE / "generate_with_optimum.py", export_golden("default"), json.dumps(prompts), "64"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["answers"] == list(greedy)
    assert result["versions"]["optimum-onnx"] == "0.1.0"
