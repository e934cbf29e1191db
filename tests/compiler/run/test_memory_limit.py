"""Limits on memory: the user's and that of a container; the text is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import moec
from moec import cli
from moec.compiler.common.errors import UsageError
from moec.compiler.run import memory_limit, packed_cache, packing
from moec.compiler.run.generate import Generator
from moec.compiler.run.memory_limit import RESERVE, MemoryLimit
from moec.compiler.run.packing import pack_into
from moec.targets.onnx.paging import PagedRunner
from moec.targets.onnx.target import OnnxTarget
from moec.targets.paging import WeightSizes

PROMPT = "In the beginning"


@pytest.fixture(scope="module")
def artifact(golden_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("limited") / "out"
    quantize = {"format": "int4", "rounding": "rtn"}
    moec.export(golden_model, target="onnx", output=directory, gates=False, quantize=quantize)
    return directory


@pytest.fixture(scope="module")
def packed(artifact: Path) -> Path:
    directory = artifact.parent / "packed"
    pack_into(artifact, directory, lambda *_: None)
    return directory


@pytest.fixture(autouse=True)
def no_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No container, and a cache of this test's own."""
    monkeypatch.setattr(memory_limit, "memory_limit", lambda: None)
    monkeypatch.setattr(packed_cache.platformdirs, "user_cache_path", lambda _: tmp_path / "cache")


def sizes_of(packed: Path) -> WeightSizes:
    return OnnxTarget().weight_sizes(packed)


def text(generator: Generator) -> str:
    return generator.generate(PROMPT, max_new_tokens=24)


def test_a_limit_leaves_experts_on_the_disk_and_the_text_as_it_is(packed: Path, artifact: Path) -> None:
    sizes, want = sizes_of(packed), text(moec.load(artifact))
    limit = sizes.dense + 20 * sizes.experts[0]
    generator = moec.load(packed, memory_limit=limit)
    assert isinstance(generator.runner, PagedRunner)
    assert text(generator) == want
    counted = generator.statistics
    assert counted.disk is not None
    assert counted.disk.uses.tolist() == [4 * counted.steps] * 4
    assert 0 < (counted.disk.hit_rate or 0) < 1
    assert counted.lines()[0] == counted.line()
    assert "experts found in memory" in counted.lines()[1]


def test_what_fits_is_opened_as_without_a_limit(packed: Path) -> None:
    sizes = sizes_of(packed)
    assert isinstance(moec.load(packed, memory_limit=sizes.total - 1).runner, PagedRunner)
    for limit in (sizes.total, "1GB"):
        assert not isinstance(moec.load(packed, memory_limit=limit).runner, PagedRunner)
    assert moec.load(packed).statistics.disk is None


def test_a_limit_that_is_too_small_says_what_is_needed(packed: Path, capsys: Any) -> None:
    sizes = sizes_of(packed)
    least = sizes.dense + 4 * sizes.experts[0]
    assert isinstance(moec.load(packed, memory_limit=least).runner, PagedRunner)
    with pytest.raises(UsageError, match="is too small: dense weights take") as caught:
        moec.load(packed, memory_limit=least - 1)
    assert "give at least" in caught.value.hint
    assert cli.dispatch(["run", str(packed), PROMPT, "--memory-limit", "100kB"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the limit on memory of 0.1 MB is too small" in said
    assert f"{sizes.dense / 1e6:.1f} MB" in said


def test_the_commands_take_a_limit(packed: Path, capsys: Any) -> None:
    sizes = sizes_of(packed)
    limit = f"{(sizes.dense + 30 * sizes.experts[0]) / 1e3:.3f}kB"
    assert cli.dispatch(["run", str(packed), PROMPT, "--memory-limit", limit, "--stats", "--max-new-tokens", "9"]) == 0
    assert "page faults per token; experts found in memory" in capsys.readouterr().err
    assert cli.dispatch(["run", str(packed), PROMPT, "--memory-limit", limit, "--json", "--max-new-tokens", "9"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["disk"]["hit_rate_by_layer"]) == 4
    assert found["disk"]["bytes_per_token"] >= 0
    assert cli.dispatch(["run", str(packed), PROMPT, "--memory-limit", "2"]) == 2
    assert "--memory-limit has the value '2'" in capsys.readouterr().err
    assert cli.dispatch(["run", str(packed), PROMPT, "--json", "--max-new-tokens", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["disk"]["hit_rate"] is None


def test_an_artifact_is_packed_for_it_however_small(artifact: Path, packed: Path, tmp_path: Path) -> None:
    sizes = sizes_of(packed)
    moec.load(artifact)
    assert not (tmp_path / "cache").exists()
    generator = moec.load(artifact, memory_limit=sizes.dense + 20 * sizes.experts[0])
    assert isinstance(generator.runner, PagedRunner)
    assert list((tmp_path / "cache" / "packed").glob("*/model.onnx"))


def test_what_cannot_be_limited_is_refused(
    artifact: Path, golden_onnx: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="needs packed weights"):
        moec.load(artifact, memory_limit="1MB", pack=False)
    with pytest.raises(UsageError, match="not computed by ONNX Runtime's kernels for experts"):
        moec.load(golden_onnx, memory_limit="1MB")
    assert not (tmp_path / "cache").exists(), "it was packed before it was refused"
    monkeypatch.setattr(memory_limit.sys, "platform", "darwin")
    with pytest.raises(UsageError, match="needs Linux"):
        moec.load(artifact, memory_limit="1MB")
    monkeypatch.undo()
    monkeypatch.setattr(packing, "_packed_now", lambda *_: (None, "weights are not packed: no room"))
    monkeypatch.setattr(packed_cache.platformdirs, "user_cache_path", lambda _: tmp_path / "other")
    with pytest.raises(UsageError, match="needs packed weights; weights are not packed: no room"):
        moec.load(artifact, memory_limit="1MB")


def test_the_limit_of_a_container_counts_the_whole_process(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sizes_of(packed)
    own, of_files = 70 << 20, 40 << 20
    monkeypatch.setattr(memory_limit, "resident_bytes", lambda: (own, of_files))
    files = sum(path.stat().st_size for path in packed.iterdir())

    def opened(limit: int) -> Generator:
        monkeypatch.setattr(memory_limit, "memory_limit", lambda: limit)
        return moec.load(packed)

    base = own + of_files + RESERVE
    want = opened(base + files)
    assert not isinstance(want.runner, PagedRunner)
    paged = opened(base + sizes.dense + 20 * sizes.experts[0])
    assert isinstance(paged.runner, PagedRunner)
    assert paged.note == ""
    assert text(paged) == text(want)
    small = opened(base + sizes.dense + sizes.experts[0])
    assert not isinstance(small.runner, PagedRunner), "the kernel may do what it can"
    assert "experts are not left on the disk: the container's memory of" in small.note
    assert "is too small" in small.note


def test_experts_get_less_room_when_the_process_needs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = MemoryLimit(1 << 30, 10 << 20, of_container=True)
    monkeypatch.setattr(memory_limit, "resident_bytes", lambda: (100 << 20, 0))
    assert limit.room(500 << 20) == (1024 - 10 - 100 - 500 << 20) - RESERVE
    monkeypatch.setattr(memory_limit, "resident_bytes", lambda: (300 << 20, 0))
    assert limit.room(500 << 20) == (1024 - 10 - 300 - 500 << 20) - RESERVE
    assert MemoryLimit(1 << 30).room(500 << 20) == 524 << 20
