"""Aliases of versions in a directory: promoted, rolled back, resolved, and nothing lost when two write at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moec import cli
from moec.compiler.build import aliases
from moec.compiler.build.publish import publish
from moec.compiler.build.registry import DirectoryRegistry, resolve
from moec.compiler.common.errors import ArtifactError, OutputError, UsageError
from tests.compiler.build.test_publish import FAILED, PASSED, artifact


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """Three versions of `olmoe`, the last of which failed a gate."""
    for number, verdicts in enumerate([(PASSED,), (PASSED,), (PASSED, FAILED)]):
        place = artifact(tmp_path / f"out{number}", *verdicts, weights=f"weights {number}")
        publish(place, "dir", str(tmp_path / "registry"), "olmoe", allow_failed=True)
    return tmp_path / "registry"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = cli.dispatch(["publish", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_an_alias_is_promoted_and_rolled_back_step_by_step(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "promote", registry, "olmoe@1", "--as", "prod") == (0, "olmoe@prod is 1\n")
    assert said(capsys, "promote", registry, "olmoe@1", "--as", "prod") == (0, "olmoe@prod is 1 already\n")
    assert said(capsys, "promote", registry, "olmoe@2", "--as", "prod", "--note", "faster")[1].endswith(
        "is 2, in place of 1\n"
    )
    assert said(capsys, "promote", registry, "olmoe@3", "--as", "prod", "--allow-failed")[0] == 0
    assert said(capsys, "rollback", registry, "olmoe", "--alias", "prod") == (0, "olmoe@prod is 2, in place of 3\n")
    assert said(capsys, "rollback", registry, "olmoe", "--alias", "prod") == (0, "olmoe@prod is 1, in place of 2\n")
    code, text = said(capsys, "rollback", registry, "olmoe", "--alias", "prod")
    assert (code, "olmoe@prod has no history: 1 is the only version" in text) == (2, True)
    assert "moec publish promote" in text
    # After a rollback, a promotion goes on from what is in use.
    assert said(capsys, "promote", registry, "olmoe@2", "--as", "prod")[0] == 0
    assert said(capsys, "rollback", registry, "olmoe", "--alias", "prod")[1] == "olmoe@prod is 1, in place of 2\n"
    kept = json.loads((registry / "olmoe" / "aliases.json").read_text())
    assert kept["aliases"] == {"prod": "1"}
    actions = [event["action"] for event in kept["history"]]
    assert actions == [*["promote"] * 3, *["rollback"] * 2, "promote", "rollback"]
    assert kept["history"][1]["note"] == "faster"
    assert all("@" in event["by"] and event["time"].endswith("+00:00") for event in kept["history"])


def test_the_list_shows_versions_aliases_and_verdicts(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "promote", registry, "olmoe@2", "--as", "prod", "--note", "faster")
    code, text = said(capsys, "list", registry, "--history")
    assert code == 0
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["model", "version", "aliases", "size", "gates", "proven"]
    assert rows[2][:3] == ["olmoe", "2", "prod"]
    assert "failed: quality" in text.splitlines()[3]
    assert text.splitlines()[-1].endswith("promote  olmoe@prod  2        faster")
    code, text = said(capsys, "list", registry, "olmoe", "--json")
    found = json.loads(text)
    assert (code, found["ok"], found["models"]["olmoe"]["aliases"]) == (0, True, {"prod": "2"})
    assert [entry["version"] for entry in found["models"]["olmoe"]["versions"]] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        (["promote", "R", "olmoe@4", "--as", "prod"], 2, "olmoe: unknown version '4'", "its versions: 1, 2, 3"),
        (["promote", "R", "olmo@1", "--as", "prod"], 2, "unknown model 'olmo'", "did you mean 'olmoe'?"),
        (["promote", "R", "olmoe", "--as", "prod"], 2, "'olmoe' is not NAME@VERSION", "moec publish list"),
        (["promote", "R", "olmoe@1", "--as", "2"], 2, "'2' is the name of a version", "such as prod"),
        (["promote", "R", "olmoe@1", "--as", "7"], 2, "'7' is the name of a version", "such as prod"),
        (["promote", "R", "olmoe@1", "--as", "a@b"], 2, "'a@b' is not allowed", "such as prod"),
        (["promote", "R", "olmoe@3", "--as", "prod"], 9, "olmoe@3: not promoted: failed: quality", "--allow-failed"),
        (["rollback", "R", "olmoe", "--alias", "prd"], 2, "olmoe has no alias 'prd'", "did you mean 'prod'?"),
        (["rollback", "R", "olmoe", "--alias", "prod"], 2, "prod has no history", "moec publish promote"),
        (["list", "R/none"], 2, "there is no such registry", "moec publish"),
        (["list", "R", "x"], 2, "unknown model 'x'", "the models there: olmoe"),
    ],
)
def test_what_cannot_be_done_is_said(
    registry: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str, hint: str
) -> None:
    said(capsys, "promote", registry, "olmoe@1", "--as", "prod")
    kept = (registry / "olmoe" / "aliases.json").read_bytes()
    given = [word.replace("R", str(registry), 1) if word.startswith("R") else word for word in arguments]
    found, text = said(capsys, *given)
    text = " ".join(text.split())
    assert (found, message in text, hint in text) == (code, True, True), text
    assert (registry / "olmoe" / "aliases.json").read_bytes() == kept


def test_a_damaged_version_is_neither_promoted_nor_rolled_back_to(
    registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for version in ("1", "2"):
        said(capsys, "promote", registry, f"olmoe@{version}", "--as", "prod")
    (registry / "olmoe" / "1" / "model.bin").write_text("changed")
    assert said(capsys, "rollback", registry, "olmoe", "--alias", "prod")[0] == 9
    assert said(capsys, "promote", registry, "olmoe@1", "--as", "test")[0] == 9
    # Another artifact in its place, whole in itself.
    other = registry / "olmoe" / "2"
    for path in sorted(other.iterdir()):
        path.unlink()
    for path in (registry / "olmoe" / "3").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ArtifactError, match="not the artifact that was published"):
        DirectoryRegistry(registry).promote("olmoe", "2", "test", note="", allow_failed=True)


def test_an_alias_is_no_version_and_files_that_are_damaged_are_named(registry: Path, tmp_path: Path) -> None:
    DirectoryRegistry(registry).promote("olmoe", "1", "prod", note="", allow_failed=False)
    with pytest.raises(UsageError, match="'prod' is an alias of this model"):
        publish(tmp_path / "out0", "dir", str(registry), "olmoe", version="prod")
    (registry / "olmoe" / "aliases.json").write_text('{"history": [{"alias": 3}]}')
    with pytest.raises(OutputError, match=r"aliases\.json: damaged"):
        DirectoryRegistry(registry).describe("olmoe")


def test_a_name_and_an_alias_stand_for_an_artifact(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DirectoryRegistry(registry).promote("olmoe", "2", "prod", note="", allow_failed=False)
    for wanted in ("olmoe@prod", "olmoe@2"):
        assert resolve(registry / wanted) == registry / "olmoe" / "2"
    assert cli.dispatch(["verify", str(registry / "olmoe@prod")]) == 0
    assert f"{registry / 'olmoe' / '2'}: 1 files are unchanged" in capsys.readouterr().out
    assert cli.dispatch(["diff", str(registry / "olmoe@1"), str(registry / "olmoe@prod")]) == 0
    assert "B differs from A" in capsys.readouterr().out
    assert cli.dispatch(["verify", str(registry / "olmoe@prd")]) == 2
    assert "did you mean 'prod'?" in capsys.readouterr().err
    # What exists is what it is called, and what is in no registry stays as it was given.
    (registry / "out@2").mkdir()
    assert resolve(registry / "out@2") == registry / "out@2"
    assert resolve(Path("none@x")) == Path("none@x")


PROMOTE = """
import sys
from pathlib import Path
from moec.compiler.build.registry import DirectoryRegistry
place, own = DirectoryRegistry(Path(sys.argv[1])), sys.argv[2]
for number in range(12):
    place.promote("olmoe", "12"[number % 2], own, note=str(number), allow_failed=False)
"""


def test_processes_that_promote_at_once_lose_nothing(registry: Path) -> None:
    command = [sys.executable, "-c", PROMOTE, str(registry)]
    running = [subprocess.Popen([*command, f"alias-{own}"]) for own in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    found = DirectoryRegistry(registry).describe("olmoe")
    assert found["aliases"] == {f"alias-{own}": "2" for own in range(3)}
    for own in range(3):
        notes = [event["note"] for event in found["history"] if event["alias"] == f"alias-{own}"]
        assert notes == [str(number) for number in range(12)]


def test_who_did_it_is_known_without_a_name_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Any:
        raise KeyError("uid not found")

    monkeypatch.setattr(aliases.getpass, "getuser", nobody)
    assert aliases.Event.now(action="promote", alias="a", version="1").by.startswith("unknown@")


def test_publish_needs_no_name_of_its_first_command(
    tmp_path: Path, registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--to", "dir", "--registry", registry, "--name", "m"]
    assert said(capsys, tmp_path / "out0", *flags)[1] == f"m 1: {registry / 'm' / '1'}\n"
    assert said(capsys, *flags, tmp_path / "out0")[1].startswith("m 2: ")
    assert said(capsys, "add", tmp_path / "out0", *flags)[1].startswith("m 3: ")
    code, text = said(capsys, "--help")
    assert code == 0
    assert all(word in text for word in ("add", "list", "promote", "rollback"))
