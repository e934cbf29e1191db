"""Packed weights: made once, found again, and never a reason for a run to fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moec.compiler.common.artifact import read_manifest, verify, write_manifest
from moec.compiler.common.errors import ArtifactError, OutputError, UsageError
from moec.compiler.run import packed_cache, packing
from moec.compiler.run.packed_cache import DESCRIPTION, PackedCache
from moec.compiler.run.packing import open_packed, pack, pack_into, packed_of
from moec.targets.runners import Runner

from .copying_target import MODEL, PACKING, CopyingTarget, make_artifact  # noqa: TID252 - tests are no package with a name of its own

SCRIPT = Path(__file__).with_name("copying_target.py")
DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return make_artifact(tmp_path / "artifact")


@pytest.fixture
def cache(tmp_path: Path) -> PackedCache:
    return PackedCache(tmp_path / "cache")


@pytest.fixture(autouse=True)
def pack_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WORTHWHILE", 0)
    monkeypatch.setattr(packing, "get_target", lambda _: CopyingTarget())


def opened(artifact: Path, cache: PackedCache, target: CopyingTarget | None = None) -> tuple[Runner, str]:
    return open_packed(artifact, read_manifest(artifact), target or CopyingTarget(), threads=1, cache=cache)


def packs(artifact: Path) -> int:
    log = artifact / "packs"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def in_process(artifact: Path, cache: PackedCache) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(SCRIPT), str(artifact), str(cache.directory)])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_first_run_packs_and_the_others_find_it(artifact: Path, cache: PackedCache) -> None:
    for _ in range(3):
        _, note = opened(artifact, cache)
        assert note == ""
    assert packs(artifact) == 1
    found = cache.find(read_manifest(artifact)["digest"], PACKING)
    assert found is not None
    assert found.bytes == 1000
    shown = packed_of(artifact, cache)
    assert shown is not None
    assert shown["source"] == read_manifest(artifact)["digest"]
    assert (shown["runtime"], shown["cpu"]) == ("copier 1", "A processor")


def test_a_small_artifact_is_packed_only_if_asked(
    artifact: Path, cache: PackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "WORTHWHILE", 1001)
    opened(artifact, cache)
    assert packed_of(artifact, cache) is None
    pack(artifact, lambda *_: None, cache)
    assert packed_of(artifact, cache) is not None


@pytest.mark.parametrize("other", [{"runtime": "copier 2"}, {"instruction_set": ("x86_64", "avx2", "avx512f")}])
def test_another_version_or_instruction_set_has_weights_of_its_own(
    artifact: Path, cache: PackedCache, other: dict[str, Any]
) -> None:
    opened(artifact, cache)
    target = CopyingTarget()
    target.packed_for = replace(PACKING, **other)
    opened(artifact, cache, target)
    assert packs(artifact) == 2
    target.packed_for = replace(PACKING, cpu="another name of the same")
    opened(artifact, cache, target)
    assert packs(artifact) == 2


def test_another_artifact_has_weights_of_its_own(artifact: Path, cache: PackedCache, tmp_path: Path) -> None:
    other = make_artifact(tmp_path / "other", 2000)
    assert opened(artifact, cache)[0].size == 1000  # type: ignore[attr-defined]
    assert opened(other, cache)[0].size == 2000  # type: ignore[attr-defined]


def test_a_process_that_is_killed_leaves_nothing(artifact: Path, cache: PackedCache) -> None:
    (artifact / "wait").touch()
    process = in_process(artifact, cache)
    until(lambda: packs(artifact) == 1)
    process.kill()
    process.wait()
    assert list(cache.directory.glob(".*.partial-*/*")), "it was half-way"
    assert packed_of(artifact, cache) is None
    (artifact / "wait").unlink()
    runner, note = opened(artifact, cache)
    assert (runner.size, note) == (1000, "")  # type: ignore[attr-defined]
    assert list(cache.directory.glob(".*.partial-*")) == []


def test_what_others_left_is_removed_too(artifact: Path, cache: PackedCache, tmp_path: Path) -> None:
    (artifact / "wait").touch()
    process = in_process(artifact, cache)
    until(lambda: packs(artifact) == 1)
    other = make_artifact(tmp_path / "other", 500)
    opened(other, cache)
    assert list(cache.directory.glob(".*.partial-*")), "a living process is left alone"
    process.kill()
    process.wait()
    opened(make_artifact(tmp_path / "third", 600), cache)
    assert list(cache.directory.glob(".*.partial-*")) == []


def test_two_processes_pack_once(artifact: Path, cache: PackedCache) -> None:
    (artifact / "wait").touch()
    processes = [in_process(artifact, cache) for _ in range(2)]
    until(lambda: packs(artifact) == 1)
    time.sleep(0.5)
    (artifact / "wait").unlink()
    assert [process.wait(30) for process in processes] == [0, 0]
    assert packs(artifact) == 1


def test_a_place_that_cannot_be_written_is_a_note(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    runner, note = opened(artifact, PackedCache(tmp_path / "file" / "cache"))
    assert runner.size == 1000  # type: ignore[attr-defined]
    assert "weights are not packed: " in note


@pytest.mark.parametrize("missing", ["disk", "limit"])
def test_a_full_disk_is_a_note(
    missing: str, artifact: Path, cache: PackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(1 << 40, 1 << 40, packed_cache.SPARE))
    else:
        cache.limit = 1500
    runner, note = opened(artifact, cache)
    assert runner.size == 1000  # type: ignore[attr-defined]
    assert "weights are not packed: " in note
    assert "2200 are needed" in note or "2200 bytes are more than its limit" in note
    assert packs(artifact) == 0
    with pytest.raises(OutputError):
        pack(artifact, lambda *_: None, cache)


def test_the_disk_that_fills_up_meanwhile_is_a_note(
    artifact: Path, cache: PackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Runner:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CopyingTarget, "pack", full)
    assert "no space left" in opened(artifact, cache)[1].lower()
    assert packed_of(artifact, cache) is None


def test_what_was_used_least_recently_goes_first(cache: PackedCache, tmp_path: Path) -> None:
    made = [make_artifact(tmp_path / f"{number}", 1000 + number) for number in range(3)]
    for age, one in enumerate(made):
        opened(one, cache)
        entry = Path((packed_of(one, cache) or {})["directory"])
        os.utime(entry / DESCRIPTION, (age + 1.0, age + 1.0))
    opened(made[0], cache)  # the oldest is used again
    cache.limit = 2 * 1400 + 2210
    opened(make_artifact(tmp_path / "last", 1003), cache)
    assert [packed_of(one, cache) is not None for one in made] == [True, False, True]


def test_wrong_results_are_never_used(artifact: Path, cache: PackedCache) -> None:
    target = CopyingTarget()
    target.wrong = True
    runner, note = opened(artifact, cache, target)
    assert runner.size == 1000  # type: ignore[attr-defined]
    assert "do not give the same bits" in note
    assert packed_of(artifact, cache) is None


@pytest.mark.parametrize("damage", ["short", "gone", "no description", "no JSON"])
def test_a_damaged_entry_is_packed_again(damage: str, artifact: Path, cache: PackedCache) -> None:
    opened(artifact, cache)
    entry = Path((packed_of(artifact, cache) or {})["directory"])
    if damage == "short":
        (entry / MODEL).write_bytes(b"w")
    elif damage == "gone":
        (entry / MODEL).unlink()
    elif damage == "no description":
        (entry / DESCRIPTION).unlink()
    else:
        (entry / DESCRIPTION).write_text("[1]")
    runner, note = opened(artifact, cache)
    assert (runner.size, note, packs(artifact)) == (1000, "", 2)  # type: ignore[attr-defined]


def test_an_entry_that_goes_while_it_is_opened_is_a_note(
    artifact: Path, cache: PackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(artifact, cache)
    plain = CopyingTarget.open

    def vanishing(self: CopyingTarget, directory: Path, *, threads: int = 0) -> Runner:
        if directory != artifact:
            raise ArtifactError("it is gone")
        return plain(self, directory, threads=threads)

    monkeypatch.setattr(CopyingTarget, "open", vanishing)
    runner, note = opened(artifact, cache)
    assert runner.size == 1000  # type: ignore[attr-defined]
    assert "packed weights are not used: it is gone" in note


def test_a_packed_copy_is_an_artifact(artifact: Path, tmp_path: Path, cache: PackedCache) -> None:
    (artifact / "report.json").write_text("{}")
    found = pack_into(artifact, tmp_path / "copy", lambda *_: None)
    assert verify(tmp_path / "copy").keys() == {MODEL}
    recorded = read_manifest(tmp_path / "copy")["packed"]
    assert recorded["source"] == read_manifest(artifact)["digest"]
    assert recorded["bytes"] == found.bytes == 1000
    assert opened(tmp_path / "copy", cache)[1] == ""
    assert not cache.directory.exists(), "it is packed already"
    with pytest.raises(UsageError, match="its weights are packed"):
        pack(tmp_path / "copy", lambda *_: None, cache)
    with pytest.raises(OutputError, match="holds an artifact already"):
        pack_into(artifact, tmp_path / "copy", lambda *_: None)
    other = CopyingTarget()
    other.packed_for = replace(PACKING, runtime="copier 2")
    runner, note = opened(tmp_path / "copy", cache, other)
    assert runner.size == 1000  # type: ignore[attr-defined]
    assert "packed for copier 1 on A processor, and this is copier 2" in note


def test_a_target_that_does_not_pack_is_opened_as_it_is(
    artifact: Path, cache: PackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CopyingTarget, "packing", lambda _: None)
    assert opened(artifact, cache)[1] == ""
    assert packs(artifact) == 0
    with pytest.raises(UsageError, match="copying target does not pack"):
        pack(artifact, lambda *_: None, cache)
    assert packed_of(artifact, cache) is None


def test_an_entry_says_what_it_is(artifact: Path, cache: PackedCache) -> None:
    directory = pack(artifact, lambda *_: None, cache).directory
    content = json.loads((directory / DESCRIPTION).read_text())
    assert content["files"] == {MODEL: 1000}
    assert content["instruction_set"] == ["x86_64", "avx2"]


@pytest.mark.parametrize("packed", [{}, {"bytes": "1"}, [1], {"bytes": 1, "runtime": "", "cpu": "", "source": ""}])
def test_a_manifest_that_says_something_else_is_damaged(packed: Any, artifact: Path) -> None:
    write_manifest(artifact, {"recipe": {"target": "copying"}, "model_files": [MODEL], "packed": packed})
    with pytest.raises(ArtifactError, match="packed"):
        read_manifest(artifact)
