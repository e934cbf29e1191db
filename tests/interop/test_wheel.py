"""The wheel, built and installed in an environment of its own, which sees the dependencies that are installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.interop
ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", ".links", ".*_cache", "__pycache__", "build", "*.egg-info", "tests")


def run(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_installed_wheel_exports_and_runs(golden_model: Path, tmp_path: Path) -> None:
    # compiler/build/ is a package, so "build" is left out at the root alone.
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=lambda place, names: LEFT_OUT(place, names) if Path(place) == ROOT else ())
    home, python = tmp_path / "home", tmp_path / "home" / "bin" / "python"
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "dist", source, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").iterdir()
    run(sys.executable, "-m", "venv", home, cwd=tmp_path)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel, cwd=tmp_path)
    where = run(python, "-c", "import moec; print(moec.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(home)
    run(home / "bin" / "moec", "export", golden_model, "-t", "onnx", "-o", "out", "-q", cwd=tmp_path)
    assert (tmp_path / "out" / "README.md").read_text().startswith("# OlmoeForCausalLM for onnx")
    assert "<style>" in (tmp_path / "out" / "report.html").read_text()
    text = run(python, "-m", "moec", "run", "out", "The list of arguments is", "--max-new-tokens", "8", cwd=tmp_path)
    assert text.strip()
    listed = "from moec.compiler.families import released_page; print(len(released_page.choose(())))"
    assert int(run(python, "-c", listed, cwd=tmp_path)) > 50
