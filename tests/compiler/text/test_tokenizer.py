"""The tokenizer file, and text that grows token by token."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from moec.compiler.common.errors import ArtifactError, CheckpointError
from moec.compiler.text.corpus import tokenize
from moec.compiler.text.tokenizer import TextStream, encode, make_loadable, open_tokenizer

GOLDEN = Path(__file__).resolve().parents[3] / "golden_models" / "olmoe-tiny"


def byte_fallback() -> Tokenizer:
    """As Mixtral, Phi-3.5-MoE and Gemma have: a token for each byte that no other token holds."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [*(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581the", "\u2581cat", "a", "s", "."]:
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


BYTE_LEVEL, FALLBACK = open_tokenizer(GOLDEN), byte_fallback()


def pieces_of(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.add(token) for token in new), stream.end()]


def streamed(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    return "".join(pieces_of(tokenizer, prompt, new))


@given(st.text(max_size=20))
def test_text_comes_out_as_it_is(text: str) -> None:
    prompt, new = BYTE_LEVEL.encode("Hello").ids, BYTE_LEVEL.encode(text).ids
    assert streamed(BYTE_LEVEL, prompt, new) == BYTE_LEVEL.decode(prompt + new)[len("Hello") :]


@given(st.text(alphabet=st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), max_size=8))
def test_characters_of_several_bytes_come_out_whole(text: str) -> None:
    new = [3 + byte for byte in text.encode()]
    pieces = pieces_of(FALLBACK, [1, FALLBACK.token_to_id("\u2581the")], new)
    assert "".join(pieces) == text
    assert "\ufffd" not in text.join(pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, 264), max_size=12), st.sampled_from([0, 1]))
def test_bytes_that_are_no_text_never_stop_it(new: list[int], which: int) -> None:
    tokenizer = (BYTE_LEVEL, FALLBACK)[which]
    text = streamed(tokenizer, [1], new)
    whole = tokenizer.decode([1, *new])
    assert "\ufffd" in whole or text == whole.removeprefix(tokenizer.decode([1]))


def test_the_space_before_the_first_word_is_that_of_the_whole_text() -> None:
    cat = FALLBACK.token_to_id("\u2581cat")
    assert streamed(FALLBACK, [1, FALLBACK.token_to_id("\u2581the")], [cat, cat]) == " cat cat"
    assert streamed(FALLBACK, [1], [cat, cat]) == "cat cat"


def test_a_character_that_is_never_finished_is_not_lost() -> None:
    assert streamed(FALLBACK, [1], [3 + 0xE2, 3 + 0x82]) == "\ufffd\ufffd"


PADDING = {
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<|endoftext|>",
    "direction": "Right",
    "pad_to_multiple_of": None,
}
TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    "stored",
    [
        {"padding": {**PADDING, "strategy": {"Fixed": 64}}},
        {"padding": {**PADDING, "strategy": "BatchLongest"}},
        {"truncation": TRUNCATION},
    ],
    ids=["fixed padding", "padding to the longest", "truncation"],
)
def test_what_training_left_in_the_file_is_off(tmp_path: Path, stored: dict[str, object]) -> None:
    content = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **stored}), encoding="utf-8")
    text = "A list of arguments, and of what they mean. " * 1000
    assert tokenize(tmp_path, text).tolist() == tokenize(GOLDEN, text).tolist()
    assert open_tokenizer(tmp_path).encode("Hello").ids == BYTE_LEVEL.encode("Hello").ids


def test_a_missing_or_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(ArtifactError, match="damaged"):
        open_tokenizer(tmp_path, ArtifactError)


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100}))
    with pytest.raises(CheckpointError, match="the model's vocabulary has 100"):
        tokenize(tmp_path, "Hello")


def test_the_class_of_an_artifacts_tokenizer_is_known_to_every_release(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    make_loadable(tmp_path)
    assert not path.exists()
    path.write_text(json.dumps({"tokenizer_class": "TokenizersBackend", "eos_token": "</s>"}))
    make_loadable(tmp_path)
    assert json.loads(path.read_text()) == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    path.write_text('{"tokenizer_class": "GemmaTokenizer"}')
    make_loadable(tmp_path)
    assert path.read_text() == '{"tokenizer_class": "GemmaTokenizer"}'


def test_a_tokenizer_that_cannot_encode_a_text_is_damaged(tmp_path: Path) -> None:
    """Its vocabulary lacks the token for unknown words, which shows only when a word is unknown."""
    tokenizer = Tokenizer(models.WordPiece(vocab={"a": 0}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    opened = open_tokenizer(tmp_path)
    assert encode(opened, "a") == [0]
    for error in (ArtifactError, CheckpointError):
        with pytest.raises(error, match=r"tokenizer\.json cannot encode the text: .*UNK") as caught:
            encode(opened, "unknown", error)
        assert caught.value.hint
    with pytest.raises(CheckpointError, match="cannot encode"):
        tokenize(tmp_path, "unknown")


def test_a_panic_of_tokenizers_is_a_damaged_file(tmp_path: Path) -> None:
    """Rust panics are no `Exception` in Python: one when the file is read, and one when a text is encoded."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3}, "merges": [["a", "b"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {**model, "continuing_subword_prefix": "prefix"}}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: damaged: .*out of range"):
        open_tokenizer(tmp_path)
    both = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    template = {"type": "TemplateProcessing", "single": both, "pair": both, "special_tokens": {}}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "post_processor": template}))
    with pytest.raises(ArtifactError, match=r"tokenizer\.json cannot encode the text: index out of bounds"):
        encode(open_tokenizer(tmp_path), "ab", ArtifactError)
