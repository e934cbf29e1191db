"""`moec estimate ARTIFACT --memory`: from a recorded sequence, from counts, and from nothing."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import moec
from moec import cli
from moec.compiler.common.artifact import read_manifest
from moec.compiler.common.errors import ArtifactError, UsageError
from moec.compiler.measure.estimate.paging import describe_paging, estimate_paging
from moec.compiler.measure.expert_use import FILE, ExpertUse
from moec.compiler.measure.paging import TOKENS, reuse_distances
from moec.compiler.run import packed_cache
from moec.compiler.run.packing import pack_into
from moec.targets.onnx.target import OnnxTarget


@pytest.fixture(scope="module")
def routed(golden_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model in int4, of whose four slots layers keep one to four."""
    directory = tmp_path_factory.mktemp("routed") / "out"
    routing = {"policy": "layer-k", "parameters": {"ks": [1, 2, 3, 4]}}
    quantize = {"format": "int4", "rounding": "rtn"}
    moec.export(golden_model, target="onnx", output=directory, gates=False, quantize=quantize, routing=routing)
    return directory


@pytest.fixture
def copied(routed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be changed, without packed weights in a cache."""
    monkeypatch.setattr(packed_cache.platformdirs, "user_cache_path", lambda _: tmp_path / "cache")
    shutil.copytree(routed, tmp_path / "out")
    return tmp_path / "out"


def edit(directory: Path, change: Any) -> None:
    content = json.loads((directory / FILE).read_text())
    change(content)
    (directory / FILE).write_text(json.dumps(content))


def test_the_recorded_sequence_is_replayed(copied: Path) -> None:
    sizes = OnnxTarget().weight_sizes(copied)
    stored = (copied / "model.onnx_data").stat().st_size
    assert sizes.counts == (16,) * 4
    assert len(set(sizes.experts)) == 1
    assert 0.5 * stored < sizes.total < stored
    found = estimate_paging(copied, [sizes.dense - 1, sizes.dense + 20 * sizes.experts[0], 10**9])
    use = ExpertUse.read(copied)
    assert use is not None
    assert [len(layer.sequence) for layer in use.layers] == [TOKENS] * 4
    assert [{len(row) for row in layer.sequence} for layer in use.layers] == [{1}, {2}, {3}, {4}]
    assert found["routing"]["source"] == "recorded"
    assert found["token_uses_bytes"] == (1 + 2 + 3 + 4) * sizes.experts[0]
    assert found["least_bytes"] == sizes.dense + 4 * sizes.experts[0]
    assert found["dense_bytes"] + found["expert_bytes"] == sizes.total
    none, some, everything = found["limits"]
    assert (none["fits"], none["hit_rate"], none["bytes_per_token"]) == (False, 0, found["token_uses_bytes"])
    expected = reuse_distances([layer.sequence for layer in use.layers], sizes.counts, sizes.experts)
    assert some["hit_rate_by_layer"] == list(expected.hit_rates(20 * sizes.experts[0]))
    assert 0.1 < some["hit_rate"] < 0.9
    assert some["bytes_per_token"] == pytest.approx((1 - some["hit_rate"]) * found["token_uses_bytes"])
    assert (everything["hit_rate"], everything["bytes_per_token"]) == (1, 0)
    assert none["bytes_per_token_at_start"] == found["token_uses_bytes"]
    new = sum(
        sum(expert not in {*itertools.chain(*run[:at])} for expert in run[at])
        for layer in use.layers
        for start in range(0, 480, 96)
        for run in [layer.sequence[start : start + 96]]
        for at in range(32, 96)
    )
    assert everything["bytes_per_token_at_start"] == pytest.approx(new * sizes.experts[0] / (5 * 64))
    assert some["bytes_per_token_at_start"] > everything["bytes_per_token_at_start"] > 0
    rows = dict(describe_paging(found))
    assert "do not fit" in rows[f"with {(sizes.dense - 1) / 1e6:.0f} MB"]
    assert rows["with 1000 MB"].startswith("a token reads 0.0 MB from disk; 100.0%")
    assert "; at the start of a run, " in rows["with 1000 MB"]


def test_a_short_sequence_says_nothing_of_the_start_of_a_run(copied: Path) -> None:
    edit(copied, lambda content: [layer.update(sequence=layer["sequence"][:95]) for layer in content["layers"]])
    found = estimate_paging(copied, [10**9])
    assert found["limits"][0]["bytes_per_token_at_start"] is None
    assert "start of a run" not in dict(describe_paging(found))["with 1000 MB"]


def test_without_a_sequence_tokens_are_drawn_and_it_says_so(copied: Path) -> None:
    recorded = estimate_paging(copied, [])
    edit(copied, lambda content: [layer.pop("sequence") for layer in content["layers"]])
    counted = estimate_paging(copied, [])
    (copied / FILE).unlink()
    uniform = estimate_paging(copied, [])
    assert [found["routing"]["source"] for found in (recorded, counted, uniform)] == ["recorded", "counts", "uniform"]
    assert "assumed to be equally likely" in dict(describe_paging(uniform))["routing"]
    assert counted["token_uses_bytes"] == recorded["token_uses_bytes"]
    half = [found["limits"][1]["hit_rate"] for found in (recorded, counted, uniform)]
    assert half[0] > half[1] > half[2], "text repeats experts, and uses some more often than others"


def test_a_sequence_that_cannot_be_is_damage(copied: Path) -> None:
    edit(copied, lambda content: content["layers"][0]["sequence"][0].append(16))
    with pytest.raises(ArtifactError, match=r"expert_use\.json: damaged: .* has not so many experts"):
        estimate_paging(copied, [])
    edit(copied, lambda content: content["layers"][0]["sequence"].pop(0))
    with pytest.raises(ArtifactError, match="sequences of different lengths"):
        estimate_paging(copied, [])


def test_the_report_shows_the_curve(copied: Path) -> None:
    rows = read_manifest(copied)["routing"]["accounting"]["paging"]
    assert [row["memory_share"] for row in rows] == [share / 8 for share in range(1, 9)]
    reads = [row["read_share"] for row in rows]
    assert reads == sorted(reads, reverse=True)
    assert reads[-1] == 0
    for row in rows:
        assert row["read_share"] == pytest.approx((1 - row["hit_rate"]) * (1 + 2 + 3 + 4) / 64)
    assert json.loads((copied / "report.json").read_text())["routing"]["accounting"]["paging"] == rows
    assert "If memory holds only a part of the experts" in (copied / "report.html").read_text()


def test_the_command(copied: Path, golden_onnx: Path, golden_model: Path, tmp_path: Path, capsys: Any) -> None:
    def said(*arguments: str) -> dict[str, Any]:
        assert cli.dispatch(["estimate", *arguments, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    plain = said(str(copied), "--memory", "1MB,2MB")
    assert [row["memory"] for row in plain["limits"]] == [10**6, 2 * 10**6]
    pack_into(copied, tmp_path / "packed", lambda *_: None)
    packed = said(str(tmp_path / "packed"))
    assert packed["expert_bytes"] > plain["expert_bytes"], "the sizes are those that are read"
    assert len(packed["limits"]) == 4
    assert cli.dispatch(["pack", str(copied)]) == 0
    capsys.readouterr()
    assert said(str(copied))["expert_bytes"] == packed["expert_bytes"]
    for arguments, message in (
        ([str(copied), "--memory", "2"], "--memory has the value '2'"),
        ([str(copied), "--target", "onnx"], "--target is for checkpoints"),
        ([str(golden_model), "-t", "onnx", "--memory", "1GB"], "--memory is for artifacts"),
        ([str(golden_model)], "no target is given"),
        ([str(golden_onnx)], "not computed by ONNX Runtime's kernels"),
    ):
        assert cli.dispatch(["estimate", *arguments]) == UsageError.exit_code
        assert message in capsys.readouterr().err.replace("\n", " ")
