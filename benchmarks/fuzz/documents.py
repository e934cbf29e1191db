"""Turns the bytes of a fuzzer into a damaged document: each chooses a place in a valid one, or what happens there.

A fuzzer that changes bytes of JSON mostly makes what is not JSON. Here the bytes are a list of edits of a valid
document, so that coverage of the checks behind the parser grows; the last edit may be of the bytes of the file.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Sequence
from typing import Any

SCALARS: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**63,
    -(10**30),
    0.5,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "0",
    "text",
    "../../outside",
    "/etc/passwd",
    "\u0000",
    "\ud800",
    "x" * 5000,
    "1%",
    "nan%",
    [],
    {},
    [[]],
    {"": None},
    [None, "text", -1],
    {"a": {"b": [1]}},
)
MOST_EDITS = 6


class Bytes:
    """Takes numbers from the bytes of a fuzzer; 0 when they are used up."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def below(self, limit: int) -> int:
        """A number from 0 to `limit` - 1, of two bytes if one is not enough."""
        taken = self.data[self.place : self.place + (1 if limit <= 256 else 2)]
        self.place += len(taken) or 1
        return int.from_bytes(taken, "little") % limit

    @property
    def used_up(self) -> bool:
        """Whether no byte is left."""
        return self.place >= len(self.data)


def places(document: Any) -> list[tuple[Any, ...]]:
    """Paths of all values of a document, that of the whole first."""
    found, left = list[tuple[Any, ...]](), list[tuple[tuple[Any, ...], Any]]([((), document)])
    while left:
        path, value = left.pop()
        found.append(path)
        if isinstance(value, dict):
            left += [((*path, key), child) for key, child in value.items()]
        elif isinstance(value, list):
            left += [((*path, index), child) for index, child in enumerate(value)]
    return found


def edited(document: Any, source: Bytes, words: Sequence[str]) -> Any:
    """A copy of a document after some edits.

    Args:
        document: A valid document.
        source: Chooses the edits.
        words: Keys and texts that the reader knows.
    """
    found = pickle.loads(pickle.dumps(document))  # a copy, three times as fast as copy.deepcopy
    for _ in range(1 + source.below(MOST_EDITS)):
        if source.used_up:
            break
        found = _edit(found, source, words)
    return found


def _edit(document: Any, source: Bytes, words: Sequence[str]) -> Any:
    paths = places(document)
    path = paths[source.below(len(paths))]
    if not path:
        return document if source.below(4) else _value(document, paths, source, words)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    key, kind = path[-1], source.below(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[words[source.below(len(words))]] = parent.pop(key)
    elif kind == 2 and isinstance(parent, dict):
        parent[words[source.below(len(words))]] = _value(document, paths, source, words)
    elif kind == 3 and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    elif kind == 4 and isinstance(parent[key], str):
        parent[key] += words[source.below(len(words))]
    elif kind == 5 and type(parent[key]) in (int, float):
        parent[key] = (parent[key] - 1, -parent[key], parent[key] * 1000, str(parent[key]))[source.below(4)]
    else:
        parent[key] = _value(document, paths, source, words)
    return document


def _value(document: Any, paths: Sequence[tuple[Any, ...]], source: Bytes, words: Sequence[str]) -> Any:
    """A scalar, a word, or a copy of another part of the document."""
    kind = source.below(4)
    if kind == 0:
        return words[source.below(len(words))]
    if kind == 1:
        value = document
        for key in paths[source.below(len(paths))]:
            value = value[key]
        return copy.deepcopy(value)
    return copy.deepcopy(SCALARS[source.below(len(SCALARS))])


def text_of(document: Any) -> bytes:
    """A document as JSON; what UTF-8 cannot hold stays escaped."""
    return json.dumps(document).encode()


def damaged(data: bytes, source: Bytes) -> bytes:
    """The bytes of a file, in one of eight cases after one edit of them."""
    if source.below(8) or not data:
        return data
    place, kind = source.below(len(data)), source.below(4)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes([source.below(256)]) + data[place + 1 :]
    if kind == 2:
        return data[:place] + data[place : place + 40] * 3 + data[place:]
    return data[:place] + data[place + 1 + source.below(32) :]
