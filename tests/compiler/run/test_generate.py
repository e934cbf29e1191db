import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moec
from moec import cli
from moec.compiler.artifact import write_manifest
from moec.compiler.errors import ArtifactError, UsageError
from moec.compiler.run.chat import render_chat
from moec.compiler.run.generate import Generator, Sampling

Make = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("fake_target")


@pytest.fixture
def make(tmp_path: Path, golden_model: Path) -> Make:
    """An artifact of the fake target, whose model counts: token t is followed by t + 1."""

    def artifact(config: dict[str, Any] | None = None, **tokenizer_config: Any) -> Path:
        directory = tmp_path / "out"
        directory.mkdir()
        plain = {"vocab_size": 4096, "max_position_embeddings": 64, "eos_token_id": 100, "bos_token_id": 7}
        (directory / "config.json").write_text(json.dumps(plain | (config or {})))
        (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        shutil.copy(golden_model / "tokenizer.json", directory)
        write_manifest(directory, {"recipe": {"target": "fake"}})
        return directory

    return artifact


def test_tokens_until_the_limit_or_the_end(make: Make) -> None:
    generator = moec.load(make())
    assert list(generator.tokens([5, 20], max_new_tokens=3)) == [21, 22, 23]
    assert generator.statistics.prompt_tokens == 2
    assert generator.statistics.new_tokens == 3
    assert list(generator.tokens([97], max_new_tokens=9)) == [98, 99]


def test_the_generation_config_says_where_to_end(make: Make) -> None:
    out = make()
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [31, 30]}))
    assert list(Generator(out).tokens([27], max_new_tokens=9)) == [28, 29]


def test_streamed_pieces_are_the_decoded_text(make: Make) -> None:
    generator = Generator(make({"eos_token_id": None}))
    ids = generator.encode("Hello")
    pieces = list(generator.stream(ids, max_new_tokens=40))
    new = list(generator.tokens(ids, max_new_tokens=40))
    whole = generator.tokenizer.decode(ids + new)
    assert generator.tokenizer.decode(ids) + "".join(pieces) == whole
    assert len(pieces) > 20
    assert generator.generate(ids, max_new_tokens=40) == "".join(pieces)


def test_an_empty_prompt_starts_from_bos(make: Make) -> None:
    assert Generator(make()).encode("") == [7]


def test_an_empty_prompt_without_bos_is_an_error(make: Make) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        Generator(make({"bos_token_id": None})).encode("")


@pytest.mark.parametrize(("prompt", "new"), [(60, 5), (64, 1), (1, 64)])
def test_too_long_a_prompt_says_the_numbers(make: Make, prompt: int, new: int) -> None:
    generator = Generator(make())
    with pytest.raises(UsageError, match=f"prompt has {prompt} tokens; with {new} new tokens .* the 64") as caught:
        next(generator.tokens([1] * prompt, max_new_tokens=new))
    assert caught.value.exit_code == 2
    assert list(generator.tokens([1] * 63, max_new_tokens=1)) == [2]


def test_the_limit_of_a_nested_config(make: Make) -> None:
    generator = Generator(make({"max_position_embeddings": None, "text_config": {"max_position_embeddings": 8}}))
    with pytest.raises(UsageError, match="the 8 that"):
        next(generator.tokens([1] * 8, max_new_tokens=1))


def test_run_prints_the_text_and_the_statistics(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    out = make()
    generator = Generator(out)
    text = generator.generate("Hello", max_new_tokens=6)
    command = ["run", str(out), "--prompt", "Hello", "--max-new-tokens", "6"]
    assert cli.dispatch([*command, "--stats"]) == 0
    captured = capsys.readouterr()
    assert captured.out == text + "\n"
    assert "new: 6 tokens" in captured.err
    assert cli.dispatch([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["new_tokens"]) == (text, 6)
    assert cli.dispatch([*command[:-1], "900"]) == 2
    assert "more than the 64" in capsys.readouterr().err


def test_run_imports_no_torch(make: Make, fake_target: dict[str, str]) -> None:
    code = (
        "import sys; from moec.cli import dispatch; code = dispatch(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'onnx'} & sys.modules.keys(); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "run", str(make()), "--prompt", "Hello", "--max-new-tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=fake_target, check=False)
    assert done.returncode == 0, done.stderr


def test_greedy_is_the_default_and_ties_go_to_the_lower_id() -> None:
    random = np.random.default_rng(0)
    assert Sampling().choose(np.array([1.0, 3.0, 3.0, 2.0]), random) == 1


def test_sampling_follows_the_distribution() -> None:
    probabilities = np.array([0.1, 0.5, 0.15, 0.25])
    logits = np.log(probabilities)

    def drawn(**options: Any) -> np.ndarray:
        sampling, random = Sampling(**options), np.random.default_rng(1)
        draws = [sampling.choose(logits, random) for _ in range(4000)]
        return np.bincount(draws, minlength=4) / len(draws)

    assert np.abs(drawn(temperature=1.0) - probabilities).max() < 0.03
    squared = probabilities**2 / (probabilities**2).sum()
    assert np.abs(drawn(temperature=0.5) - squared).max() < 0.03
    assert np.abs(drawn(temperature=1.0, top_k=2) - [0, 2 / 3, 0, 1 / 3]).max() < 0.03
    assert np.abs(drawn(temperature=1.0, top_p=0.7) - [0, 2 / 3, 0, 1 / 3]).max() < 0.03
    assert drawn(temperature=1.0, top_p=0.3)[1] == 1
    assert drawn(temperature=1.0, top_p=1e-9)[1] == 1


def test_the_seed_decides(make: Make) -> None:
    generator = Generator(make())
    options = {"max_new_tokens": 8, "temperature": 2.0}
    assert generator.generate("a", seed=1, **options) == generator.generate("a", seed=1, **options)
    assert generator.generate("a", seed=1, **options) != generator.generate("a", seed=2, **options)


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"temperature": 1, "top_p": 0}, {"temperature": 1, "top_k": -1}, {"top_k": 3}]
)
def test_senseless_sampling(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**options)  # type: ignore[arg-type]


TEMPLATE = """{{ bos_token }}
{%- for m in messages %}
    {%- if loop.index > 5 %}{% break %}{% endif %}
    <{{ m.role }}>
    {% generation %}{{ m.content | tojson }}{% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}<a>{% endif %}
"""


def test_chat_template(make: Make) -> None:
    from transformers import PreTrainedTokenizerFast

    out = make(chat_template=TEMPLATE, bos_token={"content": "<s>"})
    messages = [{"role": "user", "content": "Hi <ü>"}, {"role": "assistant", "content": 'say "no"'}]
    text = render_chat(out, messages)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(out / "tokenizer.json"), bos_token="<s>")
    expected = reference.apply_chat_template(
        messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert text == expected
    assert "<user>" in text
    assert text.endswith("<a>")
    generator = Generator(out)
    assert (
        generator.encode("Hi", chat=True)
        == generator.tokenizer.encode(render_chat(out, [{"role": "user", "content": "Hi"}])).ids
    )
    (out / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert render_chat(out, messages) == "file Hi <ü>"


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (None, UsageError, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", UsageError, "roles must alternate"),
        ("{% for %}", ArtifactError, "damaged"),
        ("{{ messages.__class__.__mro__ }}", UsageError, "unsafe"),
        ([{"name": "tool_use", "template": "x"}], UsageError, "no chat template"),
    ],
)
def test_chat_templates_that_do_not_work(make: Make, template: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        render_chat(make(chat_template=template), [{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json missing"),
        ("config.json", "{", "config.json: cannot be read"),
        ("moec.json", "{}", "not a description"),
    ],
)
def test_damaged_artifacts(make: Make, name: str, content: str | None, message: str) -> None:
    out = make()
    (out / name).unlink() if content is None else (out / name).write_text(content)
    with pytest.raises(ArtifactError, match=message) as caught:
        Generator(out)
    assert caught.value.exit_code == 9


def test_an_artifact_without_or_with_a_damaged_tokenizer(make: Make) -> None:
    out = make()
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="damaged"):
        Generator(out).encode("Hi")
    (out / "tokenizer.json").unlink()
    write_manifest(out, {"recipe": {"target": "fake"}})
    generator = Generator(out)
    with pytest.raises(ArtifactError, match=r"no tokenizer\.json"):
        generator.encode("Hi")
    assert list(generator.tokens([5], max_new_tokens=2)) == [6, 7]


def test_only_scalar_inputs_of_the_artifact_can_be_set(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    out = make()
    with pytest.raises(UsageError, match="no scalar input 'routing_budget'") as error:
        moec.load(out, inputs={"routing_budget": 0.5})
    assert "--routing-input" in error.value.hint
    assert cli.dispatch(["run", str(out), "--prompt", "a", "--input", "routing_budget=half"]) == 2
    assert "not NAME=NUMBER" in capsys.readouterr().err
