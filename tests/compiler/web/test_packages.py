"""The npm packages of the page: where they come from, and that nothing but the pinned files is taken."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from moec.compiler.common.errors import MissingExtraError, UsageError
from moec.compiler.web import packages
from moec.compiler.web.packages import Package, copy_packages, pinned_packages

FILES = {"dist/run.js": b"export const run = 1;\n", "LICENSE": b"MIT\n"}


def archive() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as opened:
        for name, content in {**FILES, "dist/other.js": b"no\n"}.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    return data.getvalue()


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> tuple[Package, bytes]:
    """A small package, the only one that is pinned, and its archive."""
    data = archive()
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    own = Package("@some/runner", "1.2.3", integrity, digests)
    monkeypatch.setattr(packages, "pinned_packages", lambda: (own,))
    return own, data


def test_every_package_is_pinned_by_version_and_digests() -> None:
    found = {package.name: package for package in pinned_packages()}
    assert set(found) == {"onnxruntime-web", "@huggingface/tokenizers", "@huggingface/jinja"}
    for own in found.values():
        assert own.version.count(".") == 2
        assert own.integrity.startswith("sha512-")
        assert own.files
        assert all(len(digest) == 64 for digest in own.files.values())


def test_an_archive_and_an_installed_package_give_the_same_files(
    package: tuple[Package, bytes], tmp_path: Path
) -> None:
    own, data = package
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / own.archive).write_bytes(data)
    assert own.archive == "some-runner-1.2.3.tgz"
    for name, content in FILES.items():
        path = tmp_path / "installed" / "node_modules" / own.name / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for source in ("archives", "installed"):
        names = copy_packages(tmp_path / f"from-{source}", tmp_path / source)
        assert sorted(names) == ["@some/runner/LICENSE", "@some/runner/run.js"]
        written = tmp_path / f"from-{source}" / "@some" / "runner" / "run.js"
        assert written.read_bytes() == FILES["dist/run.js"]


def test_another_version_or_a_missing_package_is_named(package: tuple[Package, bytes], tmp_path: Path) -> None:
    own, data = package
    with pytest.raises(UsageError, match=r"neither some-runner-1\.2\.3\.tgz nor node_modules/@some/runner") as raised:
        copy_packages(tmp_path / "out", tmp_path)
    assert "npm pack" in raised.value.hint
    (tmp_path / own.archive).write_bytes(data[:-1] + b"x")
    with pytest.raises(UsageError, match=r"not the archive of @some/runner 1\.2\.3"):
        copy_packages(tmp_path / "out", tmp_path)
    (tmp_path / own.archive).unlink()
    changed = tmp_path / "node_modules" / own.name / "dist" / "run.js"
    changed.parent.mkdir(parents=True)
    changed.write_bytes(b"export const run = 2;\n")
    with pytest.raises(UsageError, match=r"@some/runner/dist/run\.js is not that of version 1\.2\.3"):
        copy_packages(tmp_path / "out", tmp_path)


def make_npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program `npm` that runs `script` with the folder of the archives in `$4`."""
    program = folder / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def test_npm_fetches_the_packages(
    package: tuple[Package, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, data = package
    (tmp_path / "kept.tgz").write_bytes(data)
    make_npm(tmp_path, f'[ "$1 $2 $3 $5" = "pack --silent --pack-destination @some/runner@1.2.3" ] && cp {tmp_path}/kept.tgz "$4/{own.archive}"', monkeypatch)  # fmt: skip # noqa: E501
    assert len(copy_packages(tmp_path / "out")) == 2


@pytest.mark.usefixtures("package")
def test_without_npm_or_a_network_the_command_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "npm pack --silent --pack-destination packages @some/runner@1.2.3"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match="npm is not installed") as raised:
        copy_packages(tmp_path / "out")
    assert command in raised.value.hint
    assert raised.value.exit_code == 8
    make_npm(tmp_path, "echo 'npm error code ENOTFOUND' >&2; exit 1", monkeypatch)
    with pytest.raises(MissingExtraError, match=r"cannot fetch .*: npm error code ENOTFOUND") as raised:
        copy_packages(tmp_path / "out")
    assert command in raised.value.hint


def test_the_page_imports_only_files_that_are_pinned() -> None:
    page = Path(packages.__file__).parent / "page"
    pinned = {f"{package.name}/{Path(name).name}" for package in pinned_packages() for name in package.files}
    lines = [line for path in page.glob("*.js") for line in path.read_text().splitlines()]
    imported = {line.split('"./vendor/')[1].split('"')[0] for line in lines if '"./vendor/' in line}
    assert imported
    assert imported <= pinned


def test_packages_json_is_what_its_reader_expects() -> None:
    entries = json.loads((Path(packages.__file__).parent / "packages.json").read_text())
    assert all(set(entry) == {"version", "integrity", "files"} for entry in entries.values())
