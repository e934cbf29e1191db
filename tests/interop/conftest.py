"""Environments of other tools, and the golden model as they get it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the folder in which screenshots are kept, and the file for the table of foreign artifacts."""
    parser.addoption("--pictures", type=Path, default=None, help="folder in which screenshots are kept")
    parser.addoption("--foreign-table", type=Path, default=None, help="file to which a table of verdicts is written")


@pytest.fixture
def pictures(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder for screenshots."""
    folder: Path = request.config.getoption("--pictures", None) or tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moec" / "interop"


@pytest.fixture(scope="session")
def environment() -> Callable[[str, Path], Path]:
    """Name and requirements file -> the python of a virtual environment with exactly these; made once, then kept."""

    def make(name: str, requirements: Path) -> Path:
        digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
        directory = cache_directory() / f"{name}-{digest}"
        python, done = directory / "bin" / "python", directory / "installed"
        if not done.exists():
            subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", str(requirements)], check=True)
            done.touch()
        return python

    return make


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
