from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from moec.compiler.api import merge
from moec.compiler.common.errors import UsageError
from moec.compiler.common.validation import choices_of, unknown, validate
from moec.compiler.pipeline.recipe import Recipe, make_recipe, read_recipe


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")
    block_size: int = Field(default=32, ge=1)


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    flavor: Literal["plain", "fancy"] = "plain"
    section: Section | None = None


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_yaml_and_keywords_make_the_same_recipe(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "checkpoint: a/b\ntarget: onnx\ndtype: fp16\noptions: {flavor: genai}\n")
    direct = Recipe(checkpoint="a/b", target="onnx", dtype="fp16", options={"flavor": "genai"})
    assert make_recipe(read_recipe(path)) == direct
    assert merge(path, {}) == direct
    assert merge(None, {"checkpoint": "a/b", "target": "onnx", "dtype": "fp16", "flavor": "genai"}) == direct


def test_what_is_given_beside_the_file_wins(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "checkpoint: a/b\ntarget: onnx\noptions: {flavor: genai, blocks: 3}\n")
    merged = merge(path, {"dtype": "fp16", "flavor": "portable", "checkpoint": None})
    assert (merged.checkpoint, merged.dtype) == ("a/b", "fp16")
    assert merged.options == {"flavor": "portable", "blocks": 3}


def test_a_checkpoint_that_starts_with_a_dot_is_relative_to_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "checkpoint: ./models/x\ntarget: onnx\n")
    assert read_recipe(path)["checkpoint"] == str(tmp_path / "models" / "x")


def test_canonical_is_complete_and_says_nothing_of_paths() -> None:
    recipe = Recipe(checkpoint="/home/me/model", target="onnx", dtype="fp32", trust_remote_code=True)
    canonical = recipe.canonical(Options())
    given = {key: value for key, value in canonical.items() if value is not None}
    assert given == {
        "target": "onnx",
        "dtype": "fp32",
        "inputs_embeds": False,
        "options": {"flavor": "plain", "section": None},
    }
    rebuilt = make_recipe({**canonical, "checkpoint": "elsewhere"})
    assert rebuilt.canonical(validate(Options, rebuilt.options, where="options")) == canonical


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("chekpoint: a\ntarget: onnx", "unknown recipe key 'chekpoint'", "did you mean 'checkpoint'"),
        ("checkpoint: a\ntarget: onnx\nzzz: 1", "unknown recipe key 'zzz'", "the keys of a recipe: checkpoint"),
        ("target: onnx", "no checkpoint is given", "CHECKPOINT"),
        ("checkpoint: a", "no target is given", "--target"),
        ("checkpoint: a\ntarget: onnx\ndtype: fp61", "dtype: unknown value 'fp61'", "did you mean 'fp16'"),
        ("checkpoint: a\ntarget: onnx\noptions: 3", "options: ", "--help"),
        ("- a\n- b", "not a mapping of keys", "a recipe is a mapping"),
        ("a: [", "cannot be read as YAML", ""),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, message: str, hint: str) -> None:
    path = write(tmp_path / "r.yaml", text)
    with pytest.raises(UsageError) as caught:
        merge(path, {})
    assert caught.value.exit_code == 2
    assert str(path) in caught.value.message
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("fields", "message", "hint"),
    [
        ({"flavour": "plain"}, "options: unknown key 'flavour'", "did you mean 'flavor'"),
        ({"flavor": "fanzy"}, "options.flavor: unknown value 'fanzy'", "did you mean 'fancy'"),
        ({"section": {"blocksize": 3}}, "options.section: unknown key 'blocksize'", "did you mean 'block_size'"),
        ({"section": {"block_size": 0}}, "options.section.block_size: Input should be greater", "--help"),
        ({"section": {"block_size": "x"}}, "block_size: Input should be a valid integer", "--help"),
    ],
)
def test_bad_options_name_the_place_and_the_nearest(fields: dict[str, object], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        validate(Options, fields, where="options")
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_nothing_near_is_not_guessed() -> None:
    assert "did you mean" not in unknown("qqqq", ["onnx", "tflite"], "unknown target", "the targets").hint


def test_choices() -> None:
    assert choices_of(Literal["a", "b"] | None) == ("a", "b")
    assert choices_of(int) == ()


def test_a_rule_of_a_section_is_told_in_its_own_words() -> None:
    with pytest.raises(UsageError) as caught:
        make_recipe({"checkpoint": "a/b", "target": "onnx", "routing": {"compensation": 16}})
    assert str(caught.value) == "recipe.routing: settings of a routing policy are given without a policy"
