"""Measurements are kept as they come, and a kill costs the one that was being written."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.compiler.common.errors import OutputError
from moec.compiler.search.store import Measured, Store

CONTEXT = {"source": "a", "text": "b"}
FIRST = Measured((1.0, 2.0), (0.1, 0.2), ((1.0, 0.5), (1.0, 0.25)))
MORE = Measured((3.0,), (0.3,), ((0.5, 0.5),))
RECIPE, OTHER = {"routing": {"policy": "top-p"}}, {"quantize": {"format": "int8"}}


def test_it_is_there_again(tmp_path: Path) -> None:
    store = Store(tmp_path, CONTEXT)
    store.put(RECIPE, 0, FIRST)
    store.put(OTHER, 0, MORE)
    store.put(RECIPE, 2, MORE)
    for known in (store, Store(tmp_path, CONTEXT)):
        assert known.get(RECIPE) == FIRST + MORE
        assert known.get(OTHER) == MORE
        assert known.get({}) == Measured()
    assert store.get(RECIPE).first(2) == FIRST


def test_another_text_or_checkpoint_is_another_file(tmp_path: Path) -> None:
    Store(tmp_path, CONTEXT).put(RECIPE, 0, FIRST)
    assert Store(tmp_path, {**CONTEXT, "text": "c"}).get(RECIPE) == Measured()


@pytest.mark.parametrize("lost", [1, 5, 40])
def test_a_kill_while_a_line_is_written_costs_that_line(tmp_path: Path, lost: int) -> None:
    store = Store(tmp_path, CONTEXT)
    store.put(OTHER, 0, FIRST)
    store.put(RECIPE, 0, FIRST)
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:-lost])
    again = Store(tmp_path, CONTEXT)
    assert again.get(OTHER) == FIRST
    assert again.get(RECIPE) == Measured()
    again.put(RECIPE, 0, FIRST)
    assert store.path.read_bytes() == whole


def test_a_damaged_line_costs_that_line(tmp_path: Path) -> None:
    store = Store(tmp_path, CONTEXT)
    store.put(RECIPE, 0, FIRST)
    store.path.write_bytes(b'{"key": 3}\nxx\n' + store.path.read_bytes())
    assert Store(tmp_path, CONTEXT).get(RECIPE) == FIRST


def test_two_that_measure_the_same_agree(tmp_path: Path) -> None:
    first, second = Store(tmp_path, CONTEXT), Store(tmp_path, CONTEXT)
    for store in (first, second):
        store.put(RECIPE, 0, FIRST)
    assert Store(tmp_path, CONTEXT).get(RECIPE) == FIRST


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        Store(tmp_path / "file", CONTEXT)
