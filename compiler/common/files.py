"""Reading JSON and YAML from untrusted sources with limits, and writing files atomically."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from moec.compiler.common.errors import MoecError, OutputError, first_line

MAX_BYTES = 64 << 20
"""Largest JSON or YAML file that is read; moec.json of a model with 100,000 tensors takes a tenth of that."""
MAX_NODES = 200_000
"""Largest number of values of a YAML file after its aliases are expanded."""

MAX_DEPTH = 100
"""Deepest nesting of brackets in a YAML file: the time that PyYAML takes grows with the open brackets at each step."""

_BadFile = TypeVar("_BadFile", bound=MoecError)


def partial_prefix(path: Path) -> str:
    """Prefix of the temporary name under which `path` is written; the leading dot marks it as no result."""
    return f".{path.name}.partial-"


def _put(partial: Path, path: Path) -> None:
    partial.replace(path)


@contextlib.contextmanager
def replacing(path: Path, put: Callable[[Path, Path], None] = _put) -> Iterator[Path]:
    """Yield a temporary path next to `path`, for a file or a directory that is to become `path`.

    When the block ends without an error, what was written there replaces `path`. Otherwise it is removed, so that
    nobody sees a half-written result.

    Args:
        path: The destination. Its directory is made if it does not exist.
        put: Moves the temporary path to the destination; by default it replaces what is there.

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
            with contextlib.suppress(OSError):  # it was moved, or an earlier error is the one to report
                partial.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file in UTF-8 atomically.

    Raises:
        OSError: The file system refuses.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_output(path: Path, text: str, *, hint: str) -> None:
    """Write a text file that the user asked for, in UTF-8 and atomically.

    Args:
        path: The file.
        text: What it holds.
        hint: What the user can do if it cannot be written.

    Raises:
        OutputError: The file system refuses.
    """
    try:
        write_atomically(path, text)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}", hint=hint) from error


def in_json_types(value: Any) -> Any:
    """`value` in the types of JSON, with infinity and NaN as strings."""
    if isinstance(value, Mapping):
        return {str(key): in_json_types(item) for key, item in value.items()}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Iterable):
        return [in_json_types(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_json(path: Path, error: type[_BadFile], *, hint: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: The file.
        error: Class of the exception to raise.
        hint: What the user can do about a damaged file.

    Raises:
        MoecError: An `error`: the file cannot be read, is too large, is not JSON, or nests deeper than Python allows.
    """
    return parse_json(path, _read(path, "JSON", error, hint), error, hint=hint)


def parse_json(path: Path, data: bytes, error: type[_BadFile], *, hint: str) -> dict[str, Any]:
    """Parse the JSON object in `data`, which was read from `path`; arguments and errors are those of `read_json`."""
    value = _parsed(path, data, json.loads, "JSON", error, hint)
    if not isinstance(value, dict):
        raise error(f"{path}: not a JSON object", hint=hint)
    return value


def read_yaml(path: Path, error: type[_BadFile], *, hint: str) -> dict[str, Any]:
    """Read a file that holds one YAML mapping; arguments as for `read_json`.

    Raises:
        MoecError: As for `read_json`, or its aliases expand to more than `MAX_NODES` values.
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
                f"{path}: it has {size} bytes, and moec reads {kind} files of at most {MAX_BYTES} bytes", hint=hint
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
    """The number of values of `node` after its aliases are expanded.

    Raises:
        ValueError: There are more than `MAX_NODES`, or a node contains itself.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias stands for a value that contains the alias")
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
