"""The npm packages of the page: fetched by npm or found in a folder, and checked by the digests in `packages.json`."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from moec.compiler.common.digest import sha256_of_bytes
from moec.compiler.common.errors import MissingExtraError, UsageError, first_line

TIMEOUT = 600
"""Seconds that npm may take."""


@dataclass(frozen=True)
class Package:
    """A package at a fixed version.

    Attributes:
        name: Its name at the registry.
        version: Its version.
        integrity: Digest of its archive as npm writes it, "sha512-" and base64.
        files: Path in the package -> SHA-256 of each file that the page needs.
    """

    name: str
    version: str
    integrity: str
    files: Mapping[str, str]

    @property
    def archive(self) -> str:
        """Name that npm gives the archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def pinned_packages() -> tuple[Package, ...]:
    """The packages in `packages.json`."""
    text = (importlib.resources.files("moec") / "compiler" / "web" / "packages.json").read_text(encoding="utf-8")
    return tuple(Package(name, **entry) for name, entry in json.loads(text).items())


def command(packages: tuple[Package, ...], folder: str) -> str:
    """The command that puts the archives of `packages` into a folder."""
    names = (f"{package.name}@{package.version}" for package in packages)
    return shlex.join(["npm", "pack", "--silent", "--pack-destination", folder, *names])


def copy_packages(destination: Path, folder: Path | None = None) -> tuple[str, ...]:
    """Write the files that the page needs to `destination`, in a folder for each package.

    Args:
        destination: Existing directory.
        folder: Where the packages are, as archives of `npm pack` or in `node_modules`; None: fetch them by npm.

    Returns:
        Paths of the files, relative to `destination`.

    Raises:
        MissingExtraError: npm is not installed, or cannot fetch a package.
        UsageError: `folder` lacks a package, or has another version of it.
    """
    packages = pinned_packages()
    with tempfile.TemporaryDirectory() as fetched:
        source = folder.expanduser() if folder else Path(fetched)
        if folder is None:
            _fetch(packages, source)
        found = []
        for package in packages:
            contents = _contents(package, source)
            for name, data in contents.items():
                path = destination / package.name / PurePosixPath(name).name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                found.append(path.relative_to(destination).as_posix())
    return tuple(found)


def _fetch(packages: tuple[Package, ...], folder: Path) -> None:
    """Let npm fetch the archives.

    Raises:
        MissingExtraError: npm is not installed or fails.
    """
    elsewhere = (
        f"where there is a network, run: mkdir packages && {command(packages, 'packages')}; then --packages packages"
    )
    program = shutil.which("npm")
    if program is None:
        raise MissingExtraError("npm is not installed, and fetches the packages of the page", hint=elsewhere)
    words = [program, *shlex.split(command(packages, str(folder)))[1:]]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingExtraError(f"npm: {first_line(error)}", hint=elsewhere) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["it failed"]
        raise MissingExtraError(f"npm cannot fetch the packages of the page: {lines[0]}", hint=elsewhere)


def _contents(package: Package, folder: Path) -> dict[str, bytes]:
    """The files of a package in `folder`, checked.

    Raises:
        UsageError: It is missing or differs from what is pinned.
    """
    archive = folder / package.archive
    installed = folder / "node_modules" / package.name
    hint = command(tuple(pinned_packages()), str(folder))
    if archive.is_file():
        data = archive.read_bytes()
        if "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode() != package.integrity:
            raise UsageError(f"{archive}: not the archive of {package.name} {package.version}", hint=hint)
        contents = _unpacked(archive, package)
    elif installed.is_dir():
        contents = {name: path.read_bytes() for name in package.files if (path := installed / name).is_file()}
    else:
        raise UsageError(f"{folder}: neither {package.archive} nor node_modules/{package.name} is there", hint=hint)
    for name, digest in package.files.items():
        if name not in contents or sha256_of_bytes(contents[name]) != digest:
            raise UsageError(f"{folder}: {package.name}/{name} is not that of version {package.version}", hint=hint)
    return contents


def _unpacked(archive: Path, package: Package) -> dict[str, bytes]:
    with tarfile.open(archive) as opened:
        members = {member.name.partition("/")[2]: member for member in opened.getmembers() if member.isfile()}
        found = {}
        for name in package.files:
            if name in members and (file := opened.extractfile(members[name])) is not None:
                found[name] = file.read()
    return found
