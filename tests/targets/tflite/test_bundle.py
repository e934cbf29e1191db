"""The `.litertlm` bundle: what it holds, the same bytes on every rebuild, and what it cannot be made of."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from litert_lm_builder.runtime.proto.llm_metadata_pb2 import LlmMetadata

from moec.compiler.common.errors import CheckpointError, LoweringError
from moec.targets.tflite import bundle
from moec.targets.tflite.bundle import BUNDLE, sections, write_bundle
from tests.support.start_token import add_start_token

FILES = ("tokenizer.json", "config.json", "generation_config.json", "tokenizer_config.json")


@pytest.fixture
def parts(golden_model: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A directory with a model and the files of a checkpoint."""

    def made(name: str) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        (directory / "model.tflite").write_bytes(b"TFL3" * 5000)
        for file in FILES:
            if (golden_model / file).is_file():
                shutil.copyfile(golden_model / file, directory / file)
        return directory

    return made


def read(directory: Path, kind: str) -> bytes:
    start, stop = sections(directory / BUNDLE)[kind]
    return (directory / BUNDLE).read_bytes()[start:stop]


def test_it_holds_model_tokenizer_and_stop_tokens(parts: Callable[[str], Path]) -> None:
    directory = parts("a")
    assert write_bundle(directory, "model.tflite", 96) == BUNDLE
    assert read(directory, bundle.MODEL_PART) == (directory / "model.tflite").read_bytes()
    tokenizer = zlib.decompress(read(directory, bundle.TOKENIZER_PART)[8:])
    assert tokenizer == (directory / "tokenizer.json").read_bytes()
    notes = LlmMetadata.FromString(read(directory, bundle.METADATA))
    assert notes.max_num_tokens == 96
    assert all(stop.token_ids.ids for stop in notes.stop_tokens)
    assert notes.stop_tokens


@pytest.mark.parametrize("starts", [False, True])
def test_it_starts_texts_as_the_tokenizer_does(starts: bool, parts: Callable[[str], Path]) -> None:
    """LiteRT-LM reads nothing of what tokenizer.json adds, and puts the start token of the bundle before every text."""
    directory = parts("a")
    assert json.loads((directory / "config.json").read_text())["bos_token_id"] == 0
    if starts:
        add_start_token(directory / "tokenizer.json")
    write_bundle(directory, "model.tflite", 96)
    notes = LlmMetadata.FromString(read(directory, bundle.METADATA))
    assert notes.HasField("start_token") == starts
    assert list(notes.start_token.token_ids.ids) == [0] * starts


def test_the_same_parts_give_the_same_bytes(parts: Callable[[str], Path]) -> None:
    made = [parts("a"), parts("b")]
    for directory in made:
        write_bundle(directory, "model.tflite", 96)
    assert (made[0] / BUNDLE).read_bytes() == (made[1] / BUNDLE).read_bytes()


def test_a_part_that_is_not_what_was_put_in_is_an_error(
    parts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = bundle.sections
    monkeypatch.setattr(
        bundle,
        "sections",
        lambda path: {kind: (start, stop - (kind == bundle.MODEL_PART)) for kind, (start, stop) in kept(path).items()},
    )
    with pytest.raises(LoweringError, match="TFLiteModel"):
        write_bundle(parts("a"), "model.tflite", 96)


def test_without_a_tokenizer_there_is_no_bundle(parts: Callable[[str], Path]) -> None:
    directory = parts("a")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        write_bundle(directory, "model.tflite", 96)
    assert not (directory / BUNDLE).exists()
