"""Ways to damage a file. None of them is an input that harms a library: they exceed limits that moec has to keep."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Write = Callable[[bytes], bytes]
"""The bytes of a valid file -> the bytes of the damaged one."""

DEPTH = 100_000
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**9,
    -(10**30),
    1e308,
    "text",
    "",
    "../../outside",
    "\u0000",
    [],
    {},
    [[[]]],
    [None, "text", -1],
    {"a": {"b": [1]}},
)
"""Values that take the place of a value of another kind or size."""


def of_bytes() -> dict[str, Write]:
    """Damage that every kind of text file can have."""
    return {
        "empty": lambda data: b"",  # noqa: ARG005
        "zero bytes": lambda data: bytes(len(data)),
        "second half missing": lambda data: data[: len(data) // 2],
        "not UTF-8": lambda data: data[: len(data) // 2] + b"\xff\xfe\xfd" + data[len(data) // 2 :],
        "UTF-16": lambda data: data.decode().encode("utf-16"),
        "a page of HTML": lambda data: b"<!DOCTYPE html><html><body>404</body></html>",  # noqa: ARG005
        "a pointer of Git LFS": lambda data: b"version https://git-lfs.github.com/spec/v1\nsize %d\n" % len(data),
        "random bytes": lambda data: random.Random(0).randbytes(len(data)),
    }


def of_json() -> dict[str, Write]:
    """Damage of a JSON document as a whole."""
    return {
        **of_bytes(),
        "a list": lambda data: b"[]",  # noqa: ARG005
        "a number": lambda data: b"7",  # noqa: ARG005
        "null": lambda data: b"null",  # noqa: ARG005
        "empty object": lambda data: b"{}",  # noqa: ARG005
        "lists nested deeply": lambda data: b"[" * DEPTH + b"]" * DEPTH,  # noqa: ARG005
        "objects nested deeply": lambda data: b'{"a":' * DEPTH + b"1" + b"}" * DEPTH,  # noqa: ARG005
        "a deep value in a valid object": lambda data: _with_text(data, "[" * DEPTH + "]" * DEPTH),
        "a number of 100,000 digits": lambda data: _with_text(data, "9" * DEPTH),
        "a string of 64 MB": lambda data: _with_text(data, '"' + "x" * (64 << 20) + '"'),
        "a million keys": lambda data: _with_text(data, json.dumps({str(i): i for i in range(1_000_000)})),
        "infinity": lambda data: _with_text(data, "Infinity"),
    }


def _with_text(data: bytes, value: str) -> bytes:
    """The document with one more key, whose value is this text."""
    return data.rstrip()[:-1] + b', "more": ' + value.encode() + b"}"


def of_values(document: dict[str, Any], count: int, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """`count` documents in each of which one value, at any depth, is replaced by one of `VALUES`.

    Args:
        document: A valid document.
        count: How many.
        seed: Decides the places and the values.
    """
    chance = random.Random(seed)
    places = list(_places(document))
    for _ in range(count):
        place = chance.choice(places)
        value = chance.choice(VALUES)
        changed = copy.deepcopy(document)
        parent: Any = changed
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = value
        yield f"{'.'.join(map(str, place))} = {json.dumps(value)[:24]}", changed


def _places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values below the top, the first five of a list and the first forty of an object."""
    if isinstance(value, dict):
        items: list[Any] = list(value.items())[:40]
    elif isinstance(value, list):
        items = list(enumerate(value[:5]))
    else:
        return
    for key, child in items:
        yield (*before, key)
        yield from _places(child, (*before, key))


def of_yaml() -> dict[str, Write]:
    """Damage of a YAML document as a whole."""
    layers = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12))
    return {
        **of_bytes(),
        "a list": lambda data: b"- 1\n- 2\n",  # noqa: ARG005
        "a scalar": lambda data: b"hello",  # noqa: ARG005
        "aliases of aliases": lambda data: data + f"\nl0: &l0 [1]\n{layers}\n".encode(),
        "an alias of itself": lambda data: data + b"\nloop: &loop [*loop]\n",
        "lists nested deeply": lambda data: data + b"\ndeep: " + b"[" * 2_000 + b"]" * 2_000 + b"\n",
        "a Python object": lambda data: data + b"\nobject: !!python/object:builtins.dict {}\n",
        "two documents": lambda data: data + b"\n---\n" + data,
        "one key twice": lambda data: data + b"\n" + data,
        "a tab": lambda data: data + b"\n\tkey: value\n",
        "keys that are lists": lambda data: data + b"\n? [a, b]\n: 1\n",
        "an unknown key": lambda data: data + b"\nno_such_key: 1\n",
        "a date": lambda data: data + b"\nrevision: 2026-11-28\n",
        "a million keys": lambda data: data + b"\n" + b"".join(b"k%d: 1\n" % i for i in range(100_000)),
    }
