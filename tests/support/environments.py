"""Environments of other tools, each made once from a list of pinned packages and then kept in the cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Sequence
from pathlib import Path


def cache_directory() -> Path:
    """Folder of all environments."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moec" / "interop"


def environment(
    name: str, requirements: Sequence[str], *, beside: bool = False, alone: bool = False, sources: Sequence[str] = ()
) -> Path:
    """The python of an environment.

    Args:
        name: What it is for.
        requirements: Packages as pip names them.
        beside: Whether it also sees what is installed here.
        alone: Whether to leave out the packages that the named ones depend on.
        sources: Packages whose source is put on the path without being built.
    """
    digest = hashlib.sha256("\n".join((*requirements, *sources)).encode()).hexdigest()[:12]
    directory = cache_directory() / f"{name}-{digest}"
    python, done = directory / "bin" / "python", directory / "installed"
    if done.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    site = packages_of(python)
    paths = [sysconfig.get_path("purelib")] if beside else []
    pip = [str(python), "-m", "pip"]
    flags = ["--no-deps", "--no-build-isolation"] if alone else []
    if alone:
        (site / "here.pth").write_text("\n".join(paths))  # setup scripts ask for torch
        subprocess.run([*pip, "install", "--quiet", "--upgrade", "pip", "setuptools<81", "wheel"], check=True)
    subprocess.run([*pip, "install", "--quiet", *flags, *requirements], check=True)
    for source in sources:
        folder = directory / "sources" / source
        got = ["download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", str(folder)]
        subprocess.run([*pip, *got, source], check=True)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        paths += [str(path) for path in folder.iterdir() if path.is_dir()]
    (site / "here.pth").write_text("\n".join(paths))
    done.touch()
    return python


def npm_packages(name: str, packages: Sequence[str]) -> Path:
    """The folder `node_modules` with packages of npm.

    Args:
        name: What they are for.
        packages: Packages with versions as npm names them. Their scripts, which fetch more, are not run.
    """
    assert shutil.which("npm"), "no npm: install Node.js 20 or later"
    digest = hashlib.sha256("\n".join(packages).encode()).hexdigest()[:12]
    directory = cache_directory() / f"{name}-{digest}"
    if not (directory / "installed").exists():
        directory.mkdir(parents=True, exist_ok=True)
        install = ["npm", "install", "--silent", "--ignore-scripts", "--prefix", str(directory), *packages]
        subprocess.run(install, check=True, timeout=600)
        (directory / "installed").touch()
    return directory / "node_modules"


def packages_of(python: Path) -> Path:
    """The folder of an environment's packages."""
    (folder,) = (python.parents[1] / "lib").glob("python*/site-packages")
    return folder


def lines(path: Path) -> list[str]:
    """The requirements in a file."""
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
