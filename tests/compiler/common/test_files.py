"""Files that somebody else wrote: whatever they hold, the answer is a message, at once and in little memory."""

import tracemalloc
from pathlib import Path

import pytest

from moec.compiler.build.matrix import read_matrix
from moec.compiler.common import files
from moec.compiler.common.artifact import read_manifest
from moec.compiler.common.errors import ArtifactError, MoecError, UsageError
from moec.compiler.common.model_config import read_config
from moec.compiler.pipeline.recipe import read_recipe

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
BAD_YAML = {
    "aliases that stand for 10^11 values": (LAUGHS, "aliases stand for more than"),
    "a value that holds itself": ("target: &a [*a]\n", "a value that contains the alias"),
    "nests deeply": ("target: " + "[" * 100_000, "nests too deeply"),
    "not closed": ("target: [", "cannot be read as YAML"),
    "no mapping": ("3", "not a mapping"),
    "empty": ("", "not a mapping"),
    "not UTF-8": (b"target: \xff", "cannot be read as YAML"),
}


@pytest.mark.parametrize("read", [read_recipe, read_matrix])
@pytest.mark.parametrize("name", BAD_YAML)
def test_yaml(tmp_path: Path, name: str, read: object) -> None:
    text, message = BAD_YAML[name]
    path = tmp_path / "file.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=message) as caught:
            read(path)  # type: ignore[operator]
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in caught.value.message
    assert caught.value.hint


BAD_JSON = {
    "nests deeply": ("[" * 100_000, "nests too deeply"),
    "cut off": ('{"files": {', "cannot be read as JSON"),
    "no object": ("[1]", "not a JSON object"),
    "not UTF-8": (b'{"a": "\xff"}', "cannot be read as JSON"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json(tmp_path: Path, name: str) -> None:
    text, message = BAD_JSON[name]
    for file in ("moec.json", "config.json"):
        (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (lambda: read_manifest(tmp_path), lambda: read_config(tmp_path / "config.json")):
        with pytest.raises(ArtifactError, match=message):
            read()


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}" + " " * 100)
    monkeypatch.setattr(files, "MAX_BYTES", 50)
    with pytest.raises(MoecError, match="102 bytes"):
        read_config(tmp_path / "config.json")


def test_aliases_in_moderation_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("checkpoint: x\noptions: &o {flavor: genai}\nrouting: {parameters: *o}\n")
    assert read_recipe(path)["routing"] == {"parameters": {"flavor": "genai"}}


def _fail_in_the_middle(path: Path) -> None:
    with files.replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "made" / "index.json"
    files.write_atomically(path, "old")
    with pytest.raises(RuntimeError):
        _fail_in_the_middle(path)
    assert path.read_text() == "old"
    files.write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [item.name for item in path.parent.iterdir()] == ["index.json"]


def test_a_directory_that_is_there_may_stay(tmp_path: Path) -> None:
    def unless_there(partial: Path, path: Path) -> None:
        if not path.exists():
            partial.rename(path)

    for text in ("first", "second"):
        with files.replacing(tmp_path / "entry", unless_there) as partial:
            partial.mkdir()
            (partial / "file").write_text(text)
    assert [(item.name, (item / "file").read_text()) for item in tmp_path.iterdir()] == [("entry", "first")]
