"""Files: what somebody else may have written is read with limits, and what moec writes appears whole or not at all."""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from moec.compiler.common.errors import MoecError, first_line

MAX_BYTES = 64 << 20
"""Largest JSON or YAML file that is read: moec.json of a model with 100,000 tensors takes a tenth of it."""
MAX_NODES = 200_000
"""Most values that a YAML file may stand for once its aliases are written out."""

MAX_DEPTH = 100
"""Deepest nesting of brackets in a YAML file: PyYAML looks back over all that are open at each step."""

_BadFile = TypeVar("_BadFile", bound=MoecError)


def partial_prefix(path: Path) -> str:
    """What the name starts with under which `path` is written; files that start with a dot are nobody's result."""
    return f".{path.name}.partial-"


def _put(partial: Path, path: Path) -> None:
    partial.replace(path)


@contextlib.contextmanager
def beside(path: Path, put: Callable[[Path, Path], None] = _put) -> Iterator[Path]:
    """Yield a free path next to `path`: what is written there, a file or a directory, takes the place of `path`.

    It does so when the block ends well, and vanishes when it does not, so that nobody ever sees a half of it.

    Args:
        path: Its directory is made where there is none.
        put: Moves the first path to the second, by replacing what is there unless told otherwise.

    Raises:
        OSError: The file system refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(partial_prefix(path) + secrets.token_hex(8))
    try:
        yield partial
        put(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # it is not there, and else what went wrong before is what counts
                partial.unlink()


def write_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8, by `beside`.

    Raises:
        OSError: The file system refuses.
    """
    with beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: Path, error: type[_BadFile], *, hint: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: The file.
        error: What is raised.
        hint: What the user can do about a damaged one.

    Raises:
        MoecError: `error`: it cannot be read, is too large, is no JSON, or nests deeper than Python can follow.
    """
    return parse_json(path, _read(path, "JSON", error, hint), error, hint=hint)


def parse_json(path: Path, data: bytes, error: type[_BadFile], *, hint: str) -> dict[str, Any]:
    """The JSON object in `data`, which was read from `path`; arguments and errors are those of `read_json`."""
    value = _parsed(path, data, json.loads, "JSON", error, hint)
    if not isinstance(value, dict):
        raise error(f"{path}: not a JSON object", hint=hint)
    return value


def read_yaml(path: Path, error: type[_BadFile], *, hint: str) -> dict[str, Any]:
    """Read a file that holds one YAML mapping, and refuse one whose aliases stand for more than `MAX_NODES` values.

    Args: as for `read_json`.

    Raises:
        MoecError: As for `read_json`.
    """
    value = _parsed(path, _read(path, "YAML", error, hint), _load_yaml, "YAML", error, hint)
    if not isinstance(value, dict):
        raise error(f"{path}: not a mapping of keys", hint=hint)
    return {str(key): item for key, item in value.items()}


def _read(path: Path, kind: str, error: type[_BadFile], hint: str) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise error(
                f"{path}: {size} bytes, and no {kind} file that moec reads is larger than {MAX_BYTES}", hint=hint
            )
        return path.read_bytes()
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror or cause}", hint=hint) from cause


def _parsed(path: Path, data: bytes, parse: Any, kind: str, error: type[_BadFile], hint: str) -> Any:
    try:
        return parse(data.decode("utf-8"))
    except RecursionError as cause:
        raise error(f"{path}: cannot be read as {kind}: it nests too deeply", hint=hint) from cause
    except (ValueError, yaml.YAMLError) as cause:
        reason = " ".join(str(cause).split()) if kind == "YAML" else first_line(cause)
        raise error(f"{path}: cannot be read as {kind}: {reason}", hint=hint) from cause


def _load_yaml(text: str) -> Any:
    opened = itertools.accumulate((c in "[{") - (c in "]}") for c in text if c in "[]{}")
    if max(opened, default=0) > MAX_DEPTH:
        raise ValueError("it nests too deeply")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values `node` stands for; an alias counts each time that it is used.

    Raises:
        ValueError: More than `MAX_NODES`, or a node that holds itself.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias stands for a value that holds it")
        return known[id(node)]
    known[id(node)] = 0  # while it is being counted
    total = 1 + sum(_count(child, known) for child in _children(node))
    if total > MAX_NODES:
        raise ValueError(f"its aliases stand for more than {MAX_NODES} values")
    known[id(node)] = total
    return total


def _children(node: yaml.Node) -> Sequence[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else ()
