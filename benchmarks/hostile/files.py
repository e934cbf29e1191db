"""The files that moec reads, each with the command that reads it and valid content to start from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hostile import mutations
from moec.compiler.common.digest import sha256_of_text

NOTHING = "nothing"
"""The damage of a file that is valid, to which no command may object."""
PER_FILE = 16
"""Inputs of each file in which one value is replaced."""


@dataclass(frozen=True)
class Place:
    """Paths of one run, in a directory of its own with copies of a checkpoint and of an artifact."""

    root: Path

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    @property
    def artifact(self) -> Path:
        return self.root / "artifact"

    @property
    def output(self) -> Path:
        return self.root / "out"


@dataclass(frozen=True)
class Input:
    """One hostile input.

    Attributes:
        file: Name of the file, for the table.
        damage: What is wrong with it.
        path: The file in a place.
        content: The bytes of the valid file -> those that are written.
        command: Arguments of `moec`.
    """

    file: str
    damage: str
    path: Callable[[Place], Path]
    content: Callable[[bytes], bytes]
    command: Callable[[Place], list[str]]


def export(place: Place, *flags: str) -> list[str]:
    return ["export", str(place.checkpoint), "-t", "onnx", "-o", str(place.output), "--no-gates", *flags]


def run(place: Place) -> list[str]:
    return ["run", str(place.artifact), "Hello", "--max-new-tokens", "4"]


def in_checkpoint(name: str) -> Callable[[Place], Path]:
    return lambda place: place.checkpoint / name


def in_artifact(name: str) -> Callable[[Place], Path]:
    return lambda place: place.artifact / name


def in_root(name: str) -> Callable[[Place], Path]:
    return lambda place: place.root / name


@dataclass(frozen=True)
class File:
    """A JSON or YAML file, of which inputs are made.

    Attributes:
        name: Its name in the table.
        path: Where it lies.
        commands: The commands that read it.
        form: "json" or "yaml".
        accepted: Whether the commands accept the valid file. That of a search is of another checkpoint, since a search
            that goes on takes minutes.
        finish: Applied to a document after one of its values was changed.
    """

    name: str
    path: Callable[[Place], Path]
    commands: tuple[Callable[[Place], list[str]], ...]
    form: str = "json"
    accepted: bool = True
    finish: Callable[[dict[str, Any]], dict[str, Any]] = lambda document: document

    def inputs(self, valid: bytes, seed: int) -> Iterator[Input]:
        """All inputs of this file; the commands take turns."""
        whole = mutations.of_json() if self.form == "json" else mutations.of_yaml()
        found: list[tuple[str, Callable[[bytes], bytes]]] = list(whole.items())
        document = json.loads(valid) if self.form == "json" else yaml.safe_load(valid)
        for damage, changed in mutations.of_values(document, PER_FILE, seed):
            found.append((damage, _constant(self._dump(self.finish(changed)))))
        for command in self.commands if self.accepted else ():
            yield Input(self.name, NOTHING, self.path, lambda data: data, command)
        for number, (damage, content) in enumerate(found):
            yield Input(self.name, damage, self.path, content, self.commands[number % len(self.commands)])

    def _dump(self, document: dict[str, Any]) -> bytes:
        return (json.dumps(document) if self.form == "json" else yaml.safe_dump(document)).encode()


def _constant(data: bytes) -> Callable[[bytes], bytes]:
    return lambda _: data


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """moec.json with a digest that is right, as somebody who changes it on purpose would write it."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    try:
        text = json.dumps(rest, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return manifest
    return {**rest, "digest": sha256_of_text(text)}


FILES = (
    File("config.json", in_checkpoint("config.json"), (export, lambda place: ["inspect", str(place.checkpoint)])),
    File("generation_config.json", in_checkpoint("generation_config.json"), (export,)),
    File(
        "tokenizer.json of a checkpoint", in_checkpoint("tokenizer.json"), (lambda p: export(p, "--quantize", "int4"),)
    ),
    File("tokenizer.json of an artifact", in_artifact("tokenizer.json"), (run,)),
    File("tokenizer_config.json", in_artifact("tokenizer_config.json"), (run,)),
    File("generation_config.json of an artifact", in_artifact("generation_config.json"), (run,)),
    File(
        "model.safetensors.index.json",
        in_checkpoint("model.safetensors.index.json"),
        (export, lambda place: ["estimate", str(place.checkpoint), "-t", "onnx"]),
    ),
    File(
        "moec.json",
        in_artifact("moec.json"),
        (
            lambda place: ["verify", str(place.artifact)],
            lambda place: ["inspect", str(place.artifact)],
            run,
            lambda place: ["diff", str(place.artifact), str(place.artifact)],
            lambda place: ["validate", str(place.artifact), "--against", str(place.checkpoint)],
        ),
        finish=signed,
    ),
    File(
        "report.json",
        in_artifact("report.json"),
        (
            lambda place: ["diff", str(place.artifact), str(place.artifact)],
            lambda place: ["inspect", str(place.artifact)],
            lambda place: [
                "publish",
                str(place.artifact),
                "--to",
                "dir",
                "--registry",
                str(place.output),
                "--name",
                "a",
            ],
        ),
    ),
    File("provenance.json", in_artifact("provenance.json"), (lambda place: ["verify", str(place.artifact)],)),
    File(
        "calibration file",
        in_root("calibration.json"),
        (
            lambda p: export(
                p, *("--routing", "top-p", "--expert-budget", "0.7", "--calibration", str(p.root / "calibration.json"))
            ),
        ),
    ),
    File(
        "recipe", in_root("recipe.yaml"), (lambda p: export(p, "--recipe", str(p.root / "recipe.yaml")),), form="yaml"
    ),
    File(
        "matrix",
        in_root("matrix.yaml"),
        (
            lambda place: [
                "build",
                str(place.root / "matrix.yaml"),
                "-o",
                str(place.output),
                "--no-gates",
                "--jobs",
                "1",
            ],
        ),
        form="yaml",
    ),
    File(
        "search.json",
        in_root("search/search.json"),
        (lambda place: ["search", str(place.root / "search"), "--resume"],),
        accepted=False,
    ),
)


def headers(valid: bytes, seed: int) -> Iterator[Input]:
    """Inputs whose safetensors header is damaged."""
    length = int.from_bytes(valid[:8], "little")
    header, data = json.loads(valid[8 : 8 + length]), valid[8 + length :]

    def packed(text: bytes) -> Callable[[bytes], bytes]:
        return _constant(len(text).to_bytes(8, "little") + text + data)

    def made(damage: str, content: Callable[[bytes], bytes]) -> Input:
        return Input("model.safetensors", damage, in_checkpoint("model.safetensors"), content, export)

    for damage, change in mutations.of_json().items():
        try:
            yield made(f"header: {damage}", packed(change(valid[8 : 8 + length])))
        except UnicodeDecodeError:
            continue
    for damage, changed in mutations.of_values(header, 2 * PER_FILE, seed):
        yield made(f"header: {damage}", packed(json.dumps(changed).encode()))
    for size in (0, 1, 2**31, 2**63, 2**64 - 1):
        yield made(f"header of {size} bytes claimed", _constant(size.to_bytes(8, "little") + valid[8:]))
    yield made("data missing", _constant(valid[: 8 + length]))
    yield made("more data than the header says", _constant(valid + bytes(100)))


def templates() -> Iterator[Input]:
    """Chat templates that ask for too much or for what is not theirs."""
    for damage, text in {
        "a syntax error": "{% for message in messages %}",
        "an undefined name": "{{ nothing.at.all }}",
        "an exception": "{{ raise_exception('no') }}",
        "a division by zero": "{{ 1 // 0 }}",
        "a range of a billion": "{% for i in range(1000000000) %}x{% endfor %}",
        "a number": 7,
        "a list": [],
        "a list of templates without a default": [{"name": "tool_use", "template": "x"}],
    }.items():

        def content(data: bytes, text: Any = text) -> bytes:
            return json.dumps({**json.loads(data), "chat_template": text}).encode()

        yield Input(
            "chat template",
            damage,
            in_artifact("tokenizer_config.json"),
            content,
            lambda place: [*run(place), "--chat"],
        )
