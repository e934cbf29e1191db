import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from moec.compiler.common.artifact import MANIFEST, read_manifest, verify, write_manifest
from moec.compiler.common.errors import ArtifactError, LoweringError, OutputError
from moec.compiler.common.staging import check_output, staged


def fill(directory: Path, text: str = "weights") -> None:
    (directory / "model.bin").write_text(text)
    (directory / "sub").mkdir()
    (directory / "sub" / "part.bin").write_bytes(bytes(range(256)))
    (directory / "report.json").write_text("{}")
    write_manifest(directory, {"recipe": {"target": "fake"}})


def make(output: Path, text: str = "weights", *, overwrite: bool = False) -> Path:
    with staged(output, overwrite=overwrite) as directory:
        fill(directory, text)
    return output


def fail(output: Path, error: BaseException, *, overwrite: bool) -> None:
    with staged(output, overwrite=overwrite) as directory:
        fill(directory, "new")
        raise error


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def test_verify_names_every_file_but_the_reports(tmp_path: Path) -> None:
    assert list(verify(make(tmp_path / "out"))) == ["model.bin", "sub/part.bin"]
    (tmp_path / "out" / "report.json").write_text("measured again")
    verify(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_same_content_same_bytes(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    assert (first / MANIFEST).read_bytes() == (second / MANIFEST).read_bytes()


@pytest.mark.parametrize("name", ["model.bin", "sub/part.bin", MANIFEST])
def test_every_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "out") / name
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        damaged = bytearray(good)
        damaged[position] ^= 1
        path.write_bytes(bytes(damaged))
        with pytest.raises(ArtifactError, match=name) as caught:
            verify(tmp_path / "out")
        assert caught.value.exit_code == 9


def test_missing_file_and_missing_artifact(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    (out / "model.bin").unlink()
    with pytest.raises(ArtifactError, match=r"model\.bin is missing"):
        verify(out)
    with pytest.raises(ArtifactError, match=r"no moec\.json"):
        verify(tmp_path)
    with pytest.raises(ArtifactError, match="is not a directory"):
        verify(tmp_path / "nowhere")


def test_a_name_that_leads_out_of_the_artifact_is_refused(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    manifest = json.loads((out / MANIFEST).read_text())
    secret = tmp_path / "secret"
    shutil.copy(out / "model.bin", secret)
    content = {key: value for key, value in manifest.items() if key not in {"files", "digest"}}
    (out / MANIFEST).unlink()
    written = write_manifest(out, content)
    written["files"] = {"../secret": written["files"]["model.bin"]}
    from moec.compiler.common.artifact import _own_digest, _serialise

    written["digest"] = _own_digest(written)
    (out / MANIFEST).write_text(_serialise(written))
    with pytest.raises(ArtifactError, match="outside"):
        verify(out)


def test_a_link_that_leads_out_of_the_artifact_is_refused(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    (out / "model.bin").rename(tmp_path / "elsewhere")
    (out / "model.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"model\.bin is a link that leads out"):
        verify(out)


@pytest.mark.parametrize(
    "changed", [{"facts": {"size": float("inf")}}, {"passes": [{"name": "a", "rejections": True}]}, {"passes": [1]}]
)
def test_values_that_no_export_writes_are_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    out = make(tmp_path / "out")
    from moec.compiler.common.artifact import _own_digest

    manifest = {**read_manifest(out), **changed}
    if "passes" in changed:  # whoever changes it on purpose also changes the digest
        manifest["digest"] = _own_digest(manifest)
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"moec\.json: (damaged|passes)"):
        read_manifest(out)


def test_a_later_schema_is_refused(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    manifest = read_manifest(out) | {"schema_version": 99}
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="schema version 99"):
        read_manifest(out)


def test_parents_are_made_and_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a" / "empty").mkdir(parents=True)
    assert verify(make(tmp_path / "a" / "empty"))
    assert verify(make(tmp_path / "b" / "c" / "out"))


def test_the_mode_is_that_of_any_new_directory(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    assert make(tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="is a file") as caught:
            make(tmp_path / "file", overwrite=overwrite)
        assert caught.value.exit_code == 11
        with pytest.raises(OutputError, match="not an artifact"):
            make(tmp_path / "folder", overwrite=overwrite)
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("exchange", [True, False])
def test_an_artifact_is_replaced_with_overwrite_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr("ctypes.CDLL", lambda *_args, **_kwargs: object())
    out = make(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="already") as caught:
        make(out, "new")
    assert "--overwrite" in caught.value.hint
    assert (out / "model.bin").read_text() == "old"
    make(out, "new", overwrite=True)
    assert (out / "model.bin").read_text() == "new"
    assert verify(out)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), LoweringError("x"), SystemExit(143)])
def test_whatever_goes_wrong_leaves_nothing_and_loses_nothing(tmp_path: Path, error: BaseException) -> None:
    old = make(tmp_path / "old", "old")
    for output, overwrite in ((tmp_path / "out", False), (old, True)):
        with pytest.raises(type(error)):
            fail(output, error, overwrite=overwrite)
    assert names(tmp_path) == ["old"]
    assert (old / "model.bin").read_text() == "old"


def test_what_was_killed_is_cleaned_and_what_lives_is_not(tmp_path: Path) -> None:
    dead = tmp_path / ".out.partial-dead"
    dead.mkdir()
    (dead / "model.bin").write_text("half")
    other = tmp_path / ".outer.partial-x"
    other.mkdir()
    with staged(tmp_path / "out") as living:
        fill(living)
        assert not dead.exists()
        with staged(tmp_path / "out") as second:
            fill(second)
            assert living.exists()
        with pytest.raises(OutputError, match="already"):
            check_output(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
    assert names(tmp_path) == [".outer.partial-x", "out"]


def test_a_link_to_an_artifact_stays_a_link(tmp_path: Path) -> None:
    make(tmp_path / "v1", "old")
    (tmp_path / "current").symlink_to("v1")
    make(tmp_path / "current", "new", overwrite=True)
    assert (tmp_path / "current").is_symlink()
    assert (tmp_path / "v1" / "model.bin").read_text() == "new"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(tmp_path: Path, code: int) -> None:
    with pytest.raises(OutputError, match="no space left") as caught, staged(tmp_path / "out"):
        raise OSError(code, os.strerror(code))
    assert caught.value.exit_code == 11
    assert names(tmp_path) == []


def test_a_library_that_hides_the_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    with pytest.raises(OutputError, match="no space left"), staged(tmp_path / "out"):
        raise RuntimeError("1024 requested and 0 written")


def test_an_error_about_another_file_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged(tmp_path / "out"):
        Path("/nonexistent/weights").read_bytes()


def test_unwritable_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(OutputError, match="Permission denied"), staged(tmp_path / "out"):
            pass
    with pytest.raises(OutputError, match="cannot be written"), staged(Path("/proc/out")):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"File exists at .*/file"), staged(tmp_path / "file" / "out"):
        pass
