import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import moec
from moec import cli
from moec.compiler.common.artifact import write_manifest
from moec.compiler.common.errors import ArtifactError, UsageError
from moec.compiler.run.chat import render_chat
from moec.compiler.run.generate import Generator

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
    with pytest.raises(UsageError, match="exceeds the 8 tokens"):
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
    assert "exceeds the 64 tokens" in capsys.readouterr().err


def test_the_prompt_is_an_argument_or_an_option(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(make())
    assert cli.dispatch(["run", out, "--prompt", "Hello", "--max-new-tokens", "6"]) == 0
    text = capsys.readouterr().out
    assert cli.dispatch(["run", out, "Hello", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == text
    assert cli.dispatch(["run", out]) == 2
    assert "no prompt is given" in capsys.readouterr().err
    assert cli.dispatch(["run", out, "Hello", "-p", "Hello"]) == 2
    assert "given twice" in capsys.readouterr().err


def test_run_ends_before_a_stop_string(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    out = make({"eos_token_id": None})
    generator = Generator(out)
    pieces = list(generator.stream([70], max_new_tokens=12))
    assert generator.statistics.finish == "length"
    text = "".join(pieces)
    border = len("".join(pieces[:5]))
    stop = text[border - 1 : border + 1]  # its first character ends a token, its second begins another
    assert text.find(stop) == border - 1
    assert generator.generate([70], max_new_tokens=12, stop=["never", stop]) == text[: border - 1]
    assert (generator.statistics.finish, generator.statistics.new_tokens) == ("stop", 6)
    start = generator.tokenizer.decode([70])
    assert cli.dispatch(["run", str(out), start, "--max-new-tokens", "12", "--stop", "never", "--stop", stop]) == 0
    assert capsys.readouterr().out == text[: border - 1] + "\n"
    assert cli.dispatch(["run", str(out), start, "--max-new-tokens", "12", "--stop", ""]) == 2
    assert "stop string is empty" in capsys.readouterr().err


def test_a_special_token_as_a_stop_string(make: Make) -> None:
    generator = Generator(make({"eos_token_id": None}))
    assert generator.tokenizer.id_to_token(0) == "<|endoftext|>"
    assert list(generator.tokens([4094], max_new_tokens=4)) == [4095, 0, 1, 2]
    text = generator.generate([4094], max_new_tokens=4, stop=["<|endoftext|>"])
    assert (text, generator.statistics.new_tokens) == (generator.tokenizer.decode([4095]), 1)


def test_a_long_prompt_is_fed_in_pieces(make: Make) -> None:
    generator = Generator(make({"max_position_embeddings": 4096}))
    with generator.session() as session:
        answer = generator.answer(session, [5] * 1025, max_new_tokens=2)
        assert list(answer.tokens()) == [None, None, 6, 7]
        assert answer.statistics.prompt_tokens == 1025


def moec_run(out: Path, environment: dict[str, str], *arguments: str, **streams: Any) -> subprocess.Popen[bytes]:
    code = "from moec.cli import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, "run", str(out), *arguments], env=environment, **streams)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_run_writes_any_text_in_any_encoding(make: Make, fake_target: dict[str, str], encoding: str) -> None:
    out = make()
    generator = moec.load(out)
    texts = {token: generator.generate([token], max_new_tokens=1) for token in range(101, 4000)}
    start = next(token for token, text in texts.items() if not text.isascii() and "\ufffd" not in text)
    (out / "config.json").write_text(json.dumps({"vocab_size": 4096, "bos_token_id": start}))
    write_manifest(out, {"recipe": {"target": "fake"}})
    environment = {**fake_target, "PYTHONIOENCODING": encoding}
    for flag in ([], ["--json"]):
        arguments = ["--prompt", "", "--max-new-tokens", "1", *flag]
        written, errors = moec_run(
            out, environment, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ).communicate()
        assert not errors
        text = written.decode(encoding)
        if flag:
            assert json.loads(text)["text"] == texts[start]
        else:
            assert text == texts[start].encode(encoding, "backslashreplace").decode(encoding) + "\n"


@pytest.mark.parametrize("flag", ["--stats", "--json"])
def test_a_reader_that_goes_away_is_no_error(make: Make, fake_target: dict[str, str], flag: str) -> None:
    read, written = os.pipe()
    os.close(read)
    arguments = ["--prompt", "Hello", "--max-new-tokens", "3", flag]
    done = moec_run(make(), fake_target, *arguments, stdout=written, stderr=subprocess.PIPE)
    os.close(written)
    _, errors = done.communicate()
    assert done.returncode == 0
    assert b"rror" not in errors


def test_a_prompt_that_is_not_utf8(make: Make, fake_target: dict[str, str]) -> None:
    out, pipes = make(), {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    read = moec_run(out, fake_target, "--prompt", "-", **pipes)
    _, errors = read.communicate(b"Hell\xff")
    assert (read.returncode, b"standard input: not UTF-8 text (byte 4)" in errors) == (2, True)
    given = moec_run(out, fake_target, "--prompt", b"Hell\xff", **pipes)  # type: ignore[arg-type]
    _, errors = given.communicate()
    assert (given.returncode, b"--prompt: not UTF-8 text (byte 4)" in errors) == (2, True)


def test_run_imports_no_torch(make: Make, fake_target: dict[str, str]) -> None:
    code = (
        "import sys; from moec.cli import dispatch; code = dispatch(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'onnx'} & sys.modules.keys(); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "run", str(make()), "--prompt", "Hello", "--max-new-tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=fake_target, check=False)
    assert done.returncode == 0, done.stderr


def test_the_seed_decides(make: Make) -> None:
    generator = Generator(make())
    options = {"max_new_tokens": 8, "temperature": 2.0}
    assert generator.generate("a", seed=1, **options) == generator.generate("a", seed=1, **options)
    assert generator.generate("a", seed=1, **options) != generator.generate("a", seed=2, **options)


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"temperature": 1, "top_p": 0}, {"temperature": 1, "top_k": -1}, {"top_k": 3}]
)
def test_senseless_sampling(make: Make, options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="sampling"):
        Generator(make()).generate("a", **options)


def test_the_models_own_sampling_is_the_default(make: Make) -> None:
    out = make()
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
    (out / "generation_config.json").write_text(json.dumps(generation))
    generator = Generator(out)
    assert generator.sampling().model_dump() == {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.0,
        "repetition_penalty": 1.05,
        "seed": 0,
    }
    # Tokens 8, 9, 10 ... follow token 7 with logits 0, -1, -2: drawn at temperature 0.6, another than 8 may come.
    drawn = {generator.generate([7], max_new_tokens=1, seed=seed) for seed in range(40)}
    assert len(drawn) > 1
    assert generator.generate([7], max_new_tokens=1, temperature=0) == generator.tokenizer.decode([7, 8])[1:]


def test_a_generation_config_that_makes_no_sense(make: Make) -> None:
    out = make()
    (out / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_p": 7}))
    with pytest.raises(ArtifactError, match="top_p is 7"):
        Generator(out)


FORMS = {
    "onnx": {"target": "onnx"},
    "onnx, cache in place": {"target": "onnx", "flavor": "genai"},
    "tflite": {"target": "tflite", "context": 64, "prefill": (16,)},
    "coreml": {"target": "coreml", "context": 64},
}


@pytest.mark.parametrize("form", FORMS)
def test_generations_side_by_side_have_states_of_their_own(
    form: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    moec.export(tiny_checkpoint("olmoe"), output=tmp_path / "out", gates=False, **FORMS[form])
    generator = moec.load(tmp_path / "out")
    prompts = [[5, 6, 7, 8], [90, 3]]

    def answer(prompt: list[int]) -> list[int]:
        return list(generator.tokens(prompt, max_new_tokens=8))

    alone = [answer(prompt) for prompt in prompts]
    assert alone[0] != alone[1]
    turns = itertools.zip_longest(*(generator.tokens(prompt, max_new_tokens=8) for prompt in prompts))
    assert [list(column) for column in zip(*turns, strict=True)] == alone
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(answer, prompts * 3)) == alone * 3


def test_a_runner_that_keeps_one_sequence_says_so(make: Make) -> None:
    generator = moec.load(make())
    first = generator.tokens([5], max_new_tokens=3)
    assert next(first) == 6
    with pytest.raises(UsageError, match="keeps one sequence at a time"):
        list(generator.tokens([5], max_new_tokens=3))
    assert list(first) == [7, 8]
    assert list(generator.tokens([5], max_new_tokens=3)) == [6, 7, 8]


def test_ids_that_the_model_does_not_have(make: Make) -> None:
    generator = moec.load(make({"vocab_size": 100}))
    with pytest.raises(UsageError, match="token 100, and the model's vocabulary has 100"):
        next(generator.tokens([5, 100], max_new_tokens=1))


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


TEMPLATES = {
    "tools": "{% if tools is not none %}TOOLS{{ tools | length }}{% endif %}{{ messages[0].content }}",
    "documents": "{% if documents is none %}plain{% endif %}{{ messages[0].content }}",
    "unk_token": "[{{ unk_token }}]{{ messages[0].content }}",
    "a token of the model's own": "{{ image_token }}{{ messages[0].content }}",
    "a named extra token": "{{ audio_token }}",
    "tojson": "{{ messages[0] | tojson(ensure_ascii=True) }}",
    "tojson, sorted": "{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}",
    "undefined": "{% if enable_thinking is defined and not enable_thinking %}<think>{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_gives_the_text_of_transformers(make: Make, name: str) -> None:
    from transformers import AutoTokenizer

    tokens = {"unk_token": "<unk>", "image_token": "<img>", "extra_special_tokens": {"audio_token": "<aud>"}}
    out = make(tokenizer_class="PreTrainedTokenizerFast", chat_template=TEMPLATES[name], **tokens)
    messages = [{"role": "user", "content": "hé</think>llo"}]
    expected = AutoTokenizer.from_pretrained(out).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert render_chat(out, messages) == expected


def test_special_tokens_of_the_older_file(make: Make) -> None:
    out = make(chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    (out / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
    assert render_chat(out, [{"role": "user", "content": "Hi"}]) == "<s>Hi</s>"


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (None, UsageError, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", UsageError, "roles must alternate"),
        ("{{ messages[0].content + 1 }}", UsageError, "can only concatenate str"),
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


def test_a_runner_that_feeds_the_defaults_alone_says_so(make: Make) -> None:
    out = make()
    signature = {"inputs": [{"name": "routing_budget", "shape": [], "dtype": "float32"}]}
    write_manifest(out, {"recipe": {"target": "fake"}, "signature": signature})
    with pytest.raises(UsageError, match="supports only the default of 'routing_budget'"):
        moec.load(out, inputs={"routing_budget": 0.5})
