"""Comparing, publishing and verifying signed artifacts."""

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import minisign
import pytest

from moec import cli
from moec.compiler.build import mlflow_server, publish, signature
from moec.compiler.common import provenance
from moec.compiler.common.artifact import read_manifest, verify, write_manifest
from moec.compiler.common.errors import ArtifactError, MissingExtraError, OutputError, UsageError
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.report import write as report
from moec.compiler.report.diff import diff

PASSED = Verdict("parity: artifact", Status.PASS, "equal", 5, {"max_error": 1e-6})
FAILED = Verdict("quality", Status.FAIL, "worse", 7, {"increase": 0.03})
NOT_RUN = Verdict("quality", Status.NOT_RUN, "no limit", 7)

LAYER = {"top_k": 2, "kept_share": 0.7, "kept_by_k": [0, 0.6, 0.4], "tokens": [3, 4]}


def artifact(directory: Path, *verdicts: Verdict, weights: str = "weights", **content: Any) -> Path:
    directory.mkdir(parents=True)
    (directory / "model.bin").write_text(weights)
    plain = {
        "source": {"digests": {"config.json": "abc"}},
        "recipe": {"target": "fake", "dtype": "fp32"},
        "facts": {"ops": {"MatMul": 4}},
        "tensor_bytes": {"attention": 1000},
        "passes": [{"name": "dead-code", "modified": True}, {"name": "dead-code", "modified": False}],
        **content,
    }
    report.write(directory, write_manifest(directory, plain), verdicts or (PASSED, NOT_RUN), {})
    return directory


def test_artifacts_of_one_recipe_do_not_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = artifact(tmp_path / "a"), artifact(tmp_path / "b")
    assert diff(first, second) == []
    assert cli.dispatch(["diff", str(first), str(second), "--exit-code"]) == 0
    assert capsys.readouterr().out == "B is the same as A, in every figure.\n"


def test_a_difference_is_found_in_every_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = artifact(tmp_path / "a")
    second = artifact(
        tmp_path / "b",
        dataclasses.replace(PASSED, figures={"max_error": 2e-6}),
        FAILED,
        weights="other weights",
        source={"digests": {"config.json": "xyz"}},
        recipe={"target": "fake", "dtype": "fp16"},
        facts={"ops": {"MatMul": 5, "If": 1}},
        tensor_bytes={"attention": 500},
        tools={"torch": "2"},
        routing={"policy": "top-p", "accounting": {"kept_share": 0.7, "layers": [LAYER]}},
        quantization={"layers": {"layer 0": 0.01}},
    )
    found = {(item.section, item.what): item for item in diff(first, second)}
    assert {section for section, _ in found} == {
        "source", "recipe", "tools", "graph", "sizes", "files", "routing", "quantization", "gates",
    }  # fmt: skip
    assert found["sizes", "attention"].change == pytest.approx(-0.5)
    assert found["graph", "MatMul"].change == pytest.approx(0.25)
    assert (found["graph", "If"].first, found["graph", "If"].change) == (None, None)
    assert found["gates", "parity: artifact: max_error"].change == pytest.approx(1.0)
    assert (found["gates", "quality"].first, found["gates", "quality"].second) == ("not run", "fail")
    assert ("routing", "slots kept layer 0") in found
    assert cli.dispatch(["diff", str(first), str(second), "--exit-code"]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("B is worse than A: quality: fail in place of not run; it differs in source, recipe, ")
    assert "-50.0%" in shown
    assert cli.dispatch(["diff", str(first), str(second), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["differences"]) == len(found)
    assert (said["comparison"], said["sentence"]) == ("worse", shown.splitlines()[0])
    assert cli.dispatch(["diff", str(first), str(second), "--markdown"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        f"**{said['sentence']}**\n\n<details><summary>{len(found)} differences</summary>\n\n| section |"
    )
    assert "| recipe | dtype | fp32 | fp16 |  |" in text


def test_diff_of_what_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not an artifact"):
        diff(artifact(tmp_path / "a"), tmp_path)


def test_versions_of_a_directory_are_counted_and_described(tmp_path: Path) -> None:
    place = artifact(tmp_path / "out")
    found = [publish.publish(place, "dir", str(tmp_path / "registry"), "m") for _ in range(2)]
    assert [item["version"] for item in found] == ["1", "2"]
    named = publish.publish(place, "dir", str(tmp_path / "registry"), "m", version="2026.1")
    shelf = tmp_path / "registry" / "m"
    assert named["location"] == str(shelf / "2026.1")
    assert verify(shelf / "2") == verify(place)
    entries = json.loads((shelf / "index.json").read_text())["versions"]
    assert [entry["version"] for entry in entries] == ["1", "2", "2026.1"]
    assert entries[0]["gates"] == {"parity: artifact": "pass", "quality": "not run"}
    assert entries[0]["digest"] == json.loads((place / "moec.json").read_text())["digest"]
    assert entries[0]["files"].keys() == {"model.bin"}
    with pytest.raises(OutputError, match=r"version 2026\.1 exists already") as caught:
        publish.publish(place, "dir", str(tmp_path / "registry"), "m", version="2026.1")
    assert "--as" in caught.value.hint
    assert "--overwrite" not in caught.value.hint
    (shelf / "index.json").write_text('{"versions": [{"version": 3}]}')
    with pytest.raises(OutputError, match=r"index\.json: damaged"):
        publish.publish(place, "dir", str(tmp_path / "registry"), "m")


def test_links_that_lead_out_are_not_published(tmp_path: Path) -> None:
    place = artifact(tmp_path / "out")
    (tmp_path / "secret").write_text("mine")
    (place / "notes.txt").symlink_to(tmp_path / "secret")
    found = publish.publish(place, "dir", str(tmp_path / "registry"), "m")
    assert not (Path(found["location"]) / "notes.txt").exists()
    assert verify(Path(found["location"])) == verify(place)


@pytest.mark.parametrize("verdicts", [(PASSED, FAILED), (NOT_RUN,)])
def test_what_is_not_proven_is_not_published(tmp_path: Path, verdicts: tuple[Verdict, ...]) -> None:
    place = artifact(tmp_path / "out", *verdicts)
    with pytest.raises(ArtifactError, match=r"not published: (failed: quality|no gate has run)"):
        publish.publish(place, "dir", str(tmp_path / "registry"), "m")
    assert not (tmp_path / "registry").exists()
    assert publish.publish(place, "dir", str(tmp_path / "registry"), "m", allow_failed=True)["version"] == "1"


def test_what_is_damaged_is_not_published(tmp_path: Path) -> None:
    place = artifact(tmp_path / "out")
    (place / "model.bin").write_text("changed")
    with pytest.raises(ArtifactError, match="differs from what was built"):
        publish.publish(place, "dir", str(tmp_path / "registry"), "m", allow_failed=True)


@pytest.mark.parametrize("name", ["", "../m", ".m", "a/b"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is not allowed"):
        publish.publish(artifact(tmp_path / "out"), "dir", str(tmp_path), name)


def test_mlflow_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_server.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError) as error:
        publish.publish(artifact(tmp_path / "out"), "mlflow", "sqlite:///x", "m")
    assert error.value.hint == "pip install 'moec[mlflow]'"


@pytest.mark.parametrize(
    ("registry", "hint"), [("sqlite:///x.db", "mlflow server"), ("http://127.0.0.1:1", "--registry http")]
)
def test_what_mlflow_refuses_is_said(
    registry: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class MlflowException(Exception):  # noqa: N818
        """mlflow 3.17 raises it, or a class of its own below it, from the constructor of its client."""

    def client(**_: str) -> None:
        raise MlflowException("the registry is unavailable\nand much more")

    mlflow, exceptions = ModuleType("mlflow"), ModuleType("mlflow.exceptions")
    mlflow.MlflowClient, exceptions.MlflowException = client, MlflowException  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.exceptions", exceptions)
    monkeypatch.setattr(mlflow_server.importlib.util, "find_spec", lambda _: object())
    arguments = ["publish", str(artifact(tmp_path / "out")), "--to", "mlflow", "--registry", registry, "--name", "m"]
    assert cli.dispatch(arguments) == 11
    said = capsys.readouterr().err
    assert f"{registry}: MLflow refuses: the registry is unavailable" in said
    assert "much more" not in said
    assert hint in said


@pytest.fixture
def keys() -> minisign.KeyPair:
    return minisign.KeyPair.generate()


def sign(directory: Path, keys: minisign.KeyPair) -> str:
    """What `minisign -Sm moec.json` does; returns the public key in base64."""
    signed = keys.secret_key.sign((directory / "moec.json").read_bytes(), trusted_comment="release 7")
    (directory / signature.FILE).write_bytes(bytes(signed))
    return bytes(keys.public_key).decode().splitlines()[-1]


def test_a_right_signature(tmp_path: Path, keys: minisign.KeyPair, capsys: pytest.CaptureFixture[str]) -> None:
    place = artifact(tmp_path / "out")
    key = sign(place, keys)
    (tmp_path / "key.pub").write_bytes(bytes(keys.public_key))
    for given in (key, str(tmp_path / "key.pub")):
        assert cli.dispatch(["verify", str(place), "--public-key", given]) == 0
        assert "the signature is valid: release 7" in capsys.readouterr().out
    assert cli.dispatch(["verify", str(place), "--ignore-signature", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["signature"] is None


def test_a_signature_of_the_provenance_is_checked_too(
    tmp_path: Path, keys: minisign.KeyPair, capsys: pytest.CaptureFixture[str]
) -> None:
    place = artifact(tmp_path / "out")
    provenance.write(place, read_manifest(place))
    key = sign(place, keys)
    signed = keys.secret_key.sign((place / provenance.FILE).read_bytes())
    (place / f"{provenance.FILE}.minisig").write_bytes(bytes(signed))
    assert cli.dispatch(["verify", str(place), "--public-key", key]) == 0
    assert "provenance.json describes this artifact" in capsys.readouterr().out
    (place / f"{provenance.FILE}.minisig").write_bytes((place / signature.FILE).read_bytes())
    assert cli.dispatch(["verify", str(place), "--public-key", key]) == 9
    assert "not a valid signature of this provenance.json" in capsys.readouterr().err


def test_what_a_signature_does_not_prove_is_no_pass(
    tmp_path: Path, keys: minisign.KeyPair, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = artifact(tmp_path / "out")
    key = sign(place, keys)
    assert cli.dispatch(["verify", str(place)]) == 2  # a signature and no key
    other = bytes(minisign.KeyPair.generate().public_key).decode().splitlines()[-1]
    assert cli.dispatch(["verify", str(place), "--public-key", other]) == 9
    assert cli.dispatch(["verify", str(place), "--public-key", "no key"]) == 2
    unsigned = artifact(tmp_path / "unsigned")
    assert cli.dispatch(["verify", str(unsigned)]) == 0
    monkeypatch.setenv("MOEC_PUBLIC_KEY", key)
    assert cli.dispatch(["verify", str(unsigned)]) == 9
    # Another artifact, whole in itself, under the signature of the first.
    changed = artifact(tmp_path / "changed", weights="changed")
    (changed / signature.FILE).write_bytes((place / signature.FILE).read_bytes())
    assert cli.dispatch(["verify", str(changed)]) == 9
    (place / signature.FILE).write_text("nothing")
    assert cli.dispatch(["verify", str(place)]) == 9
    assert "not a valid signature" in capsys.readouterr().err
