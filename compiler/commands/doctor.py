"""`moec doctor`: what this machine can build, run and measure."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import moec
from moec.compiler.commands.serve import INSTALL, missing_modules
from moec.compiler.common.errors import MissingExtraError
from moec.targets import get_target, target_names

_TOOLS = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def doctor() -> dict[str, Any]:
    """The environment, for each target and each command with an extra what works here, and the gaps.

    Each entry has the pip command that installs what is missing; `gaps` has each of them once: command -> what it adds.
    """
    targets = {name: _target(name) for name in target_names()}
    commands = {"serve": _serve(), **{name: _needs(*needed) for name, needed in _EXTRAS.items()}}
    gaps: dict[str, list[str]] = {}
    for name, facts in [
        *((f"target {name}", facts) for name, facts in targets.items()),
        *((f"moec {name}", facts) for name, facts in commands.items()),
    ]:
        if facts.get("install"):
            gaps.setdefault(facts["install"], []).append(name)
    return {
        "environment": {
            "moec": moec.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {_memory()}",
            **{name: _version(name) for name in _TOOLS},
        },
        "targets": targets,
        "commands": commands,
        "gaps": gaps,
    }


_EXTRAS = {
    "search": ("pymoo", "search"),
    "build --executor ray": ("ray", "ray"),
    "publish --to mlflow": ("mlflow", "mlflow"),
    "verify --public-key": ("minisign", "sign"),
}
"""Command -> the module that it needs, and the extra that installs it."""


def _serve() -> dict[str, str]:
    missing = missing_modules()
    return {"run": f"no: needs {', '.join(missing)}", "install": INSTALL} if missing else {"run": "yes", "install": ""}


def _needs(module: str, extra: str) -> dict[str, str]:
    if importlib.util.find_spec(module) is not None:
        return {"run": "yes", "install": ""}
    return {"run": f"no: needs {module}", "install": f"pip install 'moec[{extra}]'"}


def _target(name: str) -> dict[str, str]:
    try:
        return dict(get_target(name).doctor())
    except MissingExtraError as error:
        return {"build": f"no: {error.message}", "run": "no", "measure": "no", "install": error.hint}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{memory.total / 2**30:.0f} GiB of memory, {memory.available / 2**30:.0f} free"
