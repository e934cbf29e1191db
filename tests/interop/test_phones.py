"""The apps for phones: Android's compiled by Kotlin's own compiler, its decoding run on real artifacts in LiteRT.

The compiler comes from npm and runs on Java 17 or later (`apt-get install default-jre-headless`). Android, LiteRT and
LiteRT-LM for Android are in none of the registries used here: their classes are declared in `android/declarations`
from their documentation, so that the app is type-checked.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from ai_edge_litert.compiled_model import CompiledModel
from tokenizers import Tokenizer

import moec
from moec.compiler.families.tiny_models import tiny_model
from moec.compiler.text.sampling import Sampling
from tests.support.environments import environment, npm_packages, packages_of

pytestmark = pytest.mark.interop
HERE = Path(__file__).with_name("android")
APP = Path(__file__).parents[2] / "examples" / "android"
IOS = APP.with_name("ios")
COMPILER = "2.4.20"
TOKENS = 64


@pytest.fixture(scope="session")
def kotlinc(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles sources to a jar; warnings are errors."""
    assert shutil.which("java"), "no Java: apt-get install default-jre-headless"
    compiler = npm_packages("kotlin", [f"kotlin-compiler@{COMPILER}"]) / "kotlin-compiler"
    coroutines = compiler / "lib" / "kotlinx-coroutines-core-jvm.jar"

    def compiled(sources: Sequence[Path], libraries: Sequence[Path] = ()) -> Path:
        jar = tmp_path_factory.mktemp("kotlin") / "out.jar"
        path = ":".join(str(each) for each in (*libraries, coroutines))
        flags = ["-Werror", "-jvm-target", "17", "-include-runtime", "-classpath", path, "-d", str(jar)]
        command = ["bash", str(compiler / "bin" / "kotlinc"), *flags, *(str(source) for source in sources)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr
        return jar

    return compiled


@pytest.fixture(scope="session")
def decoding(kotlinc: Callable[..., Path]) -> list[Path]:
    """The jars of the example's plain module with the program that runs it here."""
    site = packages_of(environment("kotlin-json", ["kotlin-jupyter-kernel==0.19.0.944"], alone=True))
    libraries = sorted((site / "run_kotlin_kernel" / "jars").glob("kotlinx-serialization-*-1.9.0.jar"))
    assert len(libraries) == 2
    return [kotlinc([APP / "decoding" / "src", HERE / "DecodeOverPipe.kt"], libraries), *libraries]


class Kotlin:
    """The other end of the pipe: LiteRT's CompiledModel, whose methods are those of Kotlin's, and a tokenizer."""

    def __init__(self, jars: Sequence[Path], arguments: Sequence[str], directory: Path) -> None:
        path = ":".join(str(jar) for jar in jars)
        command = ["java", "-Xmx1g", "-cp", path, "moec.test.DecodeOverPipeKt", *arguments]
        environ = {**os.environ, "LC_ALL": "C.UTF-8"}  # Java reads its arguments by it
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input: IO[bytes] = self._process.stdout
        self._output: IO[bytes] = self._process.stdin
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        model = directory / "model.tflite"
        self._model = CompiledModel.from_file(str(model)) if model.exists() else None
        self._buffers: list[Any] = []
        self._integers: dict[int, np.ndarray] = {}
        self.calls: list[tuple[str, dict[str, np.ndarray]]] = []
        """Signature and integer inputs of each call."""

    def texts(self) -> Iterator[tuple[str, str]]:
        """What the program tells: ("text", a piece) or ("end", "")."""
        answers: dict[str, Callable[[], None]] = {
            "encode": self._encode,
            "decode": self._decode,
            "input": lambda: self._create("create_input_buffer_by_name"),
            "output": lambda: self._create("create_output_buffer_by_name"),
            "integers": self._write_integers,
            "floats": lambda: self._buffers[self._integer()].write(self._array(">f4").astype(np.float32)),
            "read": self._read,
            "run": self._run,
        }
        with self._process as process:
            try:
                while kind := self._word(last=True):
                    if kind in answers:
                        answers[kind]()
                        self._output.flush()
                    else:
                        yield kind, self._word()
                assert process.wait(timeout=60) == 0
            finally:
                process.kill()

    def _encode(self) -> None:
        ids = self._tokenizer.encode(self._word()).ids
        self._output.write(struct.pack(f">i{len(ids)}i", len(ids), *ids))

    def _decode(self) -> None:
        text = self._tokenizer.decode(self._array(">i4").tolist(), skip_special_tokens=True).encode()
        self._output.write(struct.pack(">i", len(text)) + text)

    def _create(self, method: str) -> None:
        self._output.write(struct.pack(">i", len(self._buffers)))
        self._buffers.append(getattr(self._model, method)(self._word(), self._word()))

    def _write_integers(self) -> None:
        index = self._integer()
        self._integers[index] = self._array(">i4").astype(np.int32)
        self._buffers[index].write(self._integers[index])

    def _read(self) -> None:
        buffer = self._buffers[self._integer()]
        size = int(np.prod(buffer.get_tensor_details()["shape"]))
        values = buffer.read(size, np.float32)
        self._output.write(struct.pack(">i", size) + values.astype(">f4").tobytes())

    def _run(self) -> None:
        assert self._model is not None
        signature = self._word()
        inputs, outputs = ({self._word(): self._integer() for _ in range(self._integer())} for _ in range(2))
        self.calls.append(
            (signature, {name: self._integers[it] for name, it in inputs.items() if it in self._integers})
        )
        named = [{name: self._buffers[it] for name, it in each.items()} for each in (inputs, outputs)]
        self._model.run_by_name(signature, *named)

    def _array(self, kind: str) -> np.ndarray:
        return np.frombuffer(self._input.read(4 * self._integer()), kind)

    def _integer(self) -> int:
        return int.from_bytes(self._input.read(4), "big")

    def _word(self, *, last: bool = False) -> str:
        """A text after its length in bytes; an empty one at the end of the stream, where that may come."""
        header = self._input.read(4)
        assert header or last, "the program ended early"
        return self._input.read(int.from_bytes(header, "big")).decode()


def pieces(told: Iterator[tuple[str, str]]) -> list[list[str]]:
    """The pieces of each answer."""
    found: list[list[str]] = [[]]
    for kind, text in told:
        if kind == "end":
            found.append([])
        else:
            found[-1].append(text)
    return found


def export(checkpoint: Path, directory: Path, **options: Any) -> Path:
    moec.export(checkpoint, target="tflite", output=directory, gates=False, options=options)
    return directory


def test_the_recorded_tokens(
    decoding: list[Path], golden_model: Path, golden_prompts: list[tuple[list[int], list[int]]], tmp_path: Path
) -> None:
    """Prompts in pieces, the last of them padded, give the text that was recorded from transformers."""
    directory = export(golden_model, tmp_path / "out", context=128, prefill=(4, 16))
    tokenizer = Tokenizer.from_file(str(golden_model / "tokenizer.json"))
    texts = [tokenizer.decode(prompt) for prompt, _ in golden_prompts]
    kotlin = Kotlin(decoding, ["generate", str(directory), str(TOKENS), *texts], directory)
    *answers, rest = pieces(kotlin.texts())
    assert rest == []
    assert ["".join(answer) for answer in answers] == [tokenizer.decode(greedy) for _, greedy in golden_prompts]
    assert all(len(answer) > TOKENS / 2 for answer in answers)  # streamed, not given at the end
    assert {signature for signature, _ in kotlin.calls} == {"decode", "prefill_4", "prefill_16"}


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2_moe"])
def test_states_that_each_call_replaces(family: str, decoding: list[Path], golden_model: Path, tmp_path: Path) -> None:
    """Convolutions and scans, which must not see padding: the text of `moec run`."""
    tiny_model(family, vocab_size=4096).save_pretrained(tmp_path / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(golden_model / name, tmp_path / "checkpoint")
    directory = export(tmp_path / "checkpoint", tmp_path / "out", context=64, prefill=(16,))
    text = "def main():\n    return the list of arguments"
    kotlin = Kotlin(decoding, ["generate", str(directory), "20", text], directory)
    (answer, _) = pieces(kotlin.texts())
    assert "".join(answer) == moec.load(directory).generate(text, max_new_tokens=20, temperature=0)
    assert any(inputs["token_count"][0] < 16 for _, inputs in kotlin.calls if "token_count" in inputs)


def test_an_input_that_a_policy_added(decoding: list[Path], golden_model: Path, tmp_path: Path) -> None:
    """It gets the default of moec.json."""
    routing = {"policy": "top-p", "parameters": {"mass": 0.5}, "runtime_input": True}
    directory = tmp_path / "out"
    options = {"context": 64, "prefill": (16,)}
    moec.export(golden_model, target="tflite", output=directory, routing=routing, gates=False, options=options)
    text = "The list of arguments is"
    (answer, _) = pieces(Kotlin(decoding, ["generate", str(directory), "20", text], directory).texts())
    model = moec.load(directory)
    assert "".join(answer) == model.generate(text, max_new_tokens=20, temperature=0)
    whole = moec.load(directory, inputs={"routing_budget": 1.0})
    assert "".join(answer) != whole.generate(text, max_new_tokens=20, temperature=0)


def test_streamed_characters(decoding: list[Path], golden_model: Path) -> None:
    """A character of several tokens arrives whole."""
    text = "naïve café: 東京 \U0001f642 done"
    (found,) = pieces(Kotlin(decoding, ["stream", text], golden_model).texts())
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)
    assert len([piece for piece in found if piece]) > 5


def test_draws(decoding: list[Path], golden_model: Path) -> None:
    """As often as moec's own sampler draws, and never outside of top-p."""
    logits, count = np.array([1.0, 3.0, 2.0, -1.0, 2.5], np.float32), 3000
    arguments = ["sample", "0.9", "0.85", str(count), *(str(value) for value in logits)]
    (found,) = pieces(Kotlin(decoding, arguments, golden_model).texts())
    sampling, random = Sampling(temperature=0.9, top_p=0.85), np.random.default_rng(0)
    want = np.bincount([sampling.choose(logits, random) for _ in range(count)], minlength=5)
    got = np.bincount([int(token) for token in found], minlength=5)
    assert (got > 0).tolist() == (want > 0).tolist() == [False, True, True, False, True]
    assert np.abs(got - want).max() < 0.05 * count


@pytest.mark.parametrize("flavor", ["bundle", "model"])
def test_the_app_is_well_typed(flavor: str, kotlinc: Callable[..., Path], decoding: list[Path]) -> None:
    sources = [HERE / "declarations", *(APP / "app" / "src" / each / "kotlin" for each in ("main", flavor))]
    kotlinc(sources, decoding)


def test_the_compiler_is_that_of_the_project() -> None:
    assert re.search(rf'kotlin.jvm"\) version "{re.escape(COMPILER)}"', (APP / "build.gradle.kts").read_text())


PARSE = """
import pathlib, sys, tree_sitter, tree_sitter_swift
parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language()))
for name in sys.argv[1:]:
    print(name, parser.parse(pathlib.Path(name).read_bytes()).root_node.has_error)
"""


def test_swift_parses(tmp_path: Path) -> None:
    """The iOS example by a grammar of Swift; no compiler of Swift is in the registries used here."""
    python = environment("tree-sitter", ["tree-sitter==0.26.1", "tree-sitter-swift==0.7.4"])
    sources = sorted(IOS.rglob("*.swift"))
    wrong = tmp_path / "wrong.swift"
    wrong.write_text(sources[0].read_text() + "}")
    command = [str(python), "-c", PARSE, *(str(source) for source in (*sources, wrong))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *found, last = [line.rpartition(" ")[2] for line in done.stdout.splitlines()]
    assert len(sources) == 8
    assert set(found) == {"False"}
    assert last == "True"
