"""Environments of other tools, and the golden model as they get it."""

from __future__ import annotations

import hashlib
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.environments import cache_directory


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the folder in which screenshots are kept."""
    parser.addoption("--pictures", type=Path, default=None, help="folder in which screenshots are kept")


@pytest.fixture
def pictures(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder for screenshots."""
    folder: Path = request.config.getoption("--pictures", None) or tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


@pytest.fixture(scope="session")
def genai() -> Any:
    """The module onnxruntime_genai, pinned, on the onnxruntime that is installed here; installed once, then kept."""
    requirements = Path(__file__).with_name("genai-requirements.txt")
    directory = cache_directory() / f"genai-{hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]}"
    if not (directory / "installed").exists():
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", directory)
        subprocess.run([*pip, "-r", requirements], check=True)
        (directory / "installed").touch()
    sys.path.append(str(directory))
    return importlib.import_module("onnxruntime_genai")


@pytest.fixture(scope="session")
def golden_prompts(golden_model: Path) -> list[tuple[list[int], list[int]]]:
    """Token ids of each recorded prompt, and the 64 greedy tokens of transformers that follow."""
    recorded = np.load(golden_model / "golden_logits.npz")
    names = [name.removesuffix(".greedy") for name in recorded.files if name.endswith(".greedy")]
    return [(recorded[f"{name}.input_ids"].tolist(), recorded[f"{name}.greedy"].tolist()) for name in names]


@pytest.fixture
def export_golden(golden_model: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Flavor -> artifact of the golden model."""
    import moec

    def export(flavor: str) -> Path:
        directory = tmp_path / flavor
        moec.export(str(golden_model), target="onnx", output=directory, flavor=flavor, gates=False)
        return directory

    return export
