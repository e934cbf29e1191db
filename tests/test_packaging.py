"""The packaging rules that keep "the root is the package" honest."""

import ast
import importlib.resources
import os
import sys
import tomllib
from pathlib import Path

import moec

ROOT = Path(__file__).resolve().parents[1]
MEMBERS = {"cli", "compiler", "passes", "quantize", "targets"}


def test_moec_is_this_checkout() -> None:
    assert list(moec.__path__) == [str(ROOT)]


def test_every_package_directory_is_declared() -> None:
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    on_disk = {
        ".".join(("moec", *init.parent.relative_to(ROOT).parts))
        for member in MEMBERS
        for init in (ROOT / member).rglob("__init__.py")
    }
    assert declared == on_disk | {"moec"}


def test_package_data_is_found_by_an_installed_moec() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package, names in setuptools["package-data"].items():
        for name in names:
            # Wild cards are allowed, but each must match something.
            assert list(Path(str(importlib.resources.files(package))).glob(name)), (package, name)
    assert {"py.typed", "golden_models/families.yaml", "golden_models/olmoe-tiny/texts/*.txt"} <= set(
        setuptools["package-data"]["moec"]
    )


def test_no_registry_or_index_is_named() -> None:
    for name in ("Makefile", ".ci/run", "pyproject.toml"):
        text = (ROOT / name).read_text()
        assert "index-url" not in text, name
        assert "://" not in text, name


def test_continuous_integration_uses_a_new_environment() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert text.index("rm -rf .venv") < text.index("make test")


def test_root_holds_no_stray_modules() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", "cli"}


def test_nothing_imports_a_member_by_its_bare_name() -> None:
    assert MEMBERS.isdisjoint(sys.modules)
    sources = [ROOT / "cli.py", *(path for member in MEMBERS for path in (ROOT / member).rglob("*.py"))]
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, source
                assert (node.module or "").split(".")[0] not in MEMBERS, source
            elif isinstance(node, ast.Import):
                assert MEMBERS.isdisjoint(alias.name.split(".")[0] for alias in node.names), source
