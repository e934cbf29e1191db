"""The packaging rules that keep "the root is the package" honest."""

import ast
import importlib.resources
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

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
    declared = {path for name in setuptools["package-data"]["moec"] for path in ROOT.glob(name)}
    named = {Path("py.typed"), Path("golden_models/olmoe-tiny/texts/calibration.txt")}
    for source in (path for member in MEMBERS for path in (ROOT / member).rglob("*.py")):
        # Files that the code reads from its package: files("moec") / "a" / "b.yaml", or .joinpath("a", "b.yaml").
        for found in re.findall(r'files\("moec"\)((?: / "[^"]+")+)', source.read_text()):
            named.add(Path(*re.findall(r'"([^"]+)"', found)))
    assert Path("golden_models/released.yaml") in named
    assert {ROOT / path for path in named if (ROOT / path).is_file()} <= declared
    templates = set((ROOT / "compiler" / "report" / "templates").iterdir())
    assert templates
    assert templates <= declared


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


def test_the_module_is_the_command() -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / ".links"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "moec", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert shown == f"moec {moec.__version__}\n"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("moec exp", ["export"]),
        ("moec export x --target t", ["tensorrt", "tflite"]),
        ("moec export x -t onnx --flav", ["--flavor"]),
        ("moec export x --ta", ["--target"]),
        ("moec export 'x --ta", []),
    ],
)
def test_a_shell_completes_commands_targets_and_their_options(words: str, offered: list[str]) -> None:
    path = os.pathsep.join([str(ROOT / ".links"), os.environ.get("PYTHONPATH", "")])
    asked = {"_MOEC_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    command = [sys.executable, "-m", "moec"]
    shown = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **asked, "PYTHONPATH": path}
    )
    assert shown.stdout.split() == offered
    assert shown.stderr == ""


def test_the_action_and_the_image_install_this_repository() -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    assert action["runs"]["using"] == "composite"
    steps = "\n".join(step.get("run", "") for step in action["runs"]["steps"])
    # Inputs reach the shell as variables, never as part of a script.
    assert "${{" not in steps
    used = {name for step in action["runs"]["steps"] for name in re.findall(r"inputs\.([\w-]+)", yaml.dump(step))}
    assert used == set(action["inputs"])
    image = (ROOT / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", image, re.M)
    assert all((ROOT / name).exists() for line in copied for name in line.split())
    members = {name.removesuffix("/") for line in copied for name in line.split()}
    assert MEMBERS - {"cli"} <= members
    assert {"cli.py", "__init__.py", "__main__.py", "py.typed", "pyproject.toml", "golden_models"} <= members


def test_root_holds_no_stray_modules() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", "__main__", "cli"}


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
