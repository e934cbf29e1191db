"""Environments of other tools, and the golden model as they get it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.environments import environment, lines, packages_of


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


@pytest.fixture(scope="session")
def genai() -> Any:
    """The module onnxruntime_genai, pinned, on the onnxruntime that is installed here."""
    packages = lines(Path(__file__).with_name("genai-requirements.txt"))
    sys.path.append(str(packages_of(environment("genai", packages, beside=True, alone=True))))
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
