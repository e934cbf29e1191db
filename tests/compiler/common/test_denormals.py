"""Denormal floats are zeros inside the block, in this thread, and nowhere else."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from moec.compiler.common import denormals
from moec.compiler.common.denormals import can_flush_denormals, denormals_as_zeros


def tenth() -> float:
    """A tenth of the smallest normal float32, which is denormal."""
    return float(np.finfo(np.float32).tiny * np.float32(0.1))


def test_inside_the_block_alone() -> None:
    assert can_flush_denormals()
    with pytest.raises(KeyError), denormals_as_zeros():  # noqa: PT012 - the block ends by the error
        assert tenth() == 0
        raise KeyError
    assert tenth() > 0


def test_other_threads_keep_theirs() -> None:
    go, done, found = threading.Event(), threading.Event(), list[float]()

    def other() -> None:
        go.wait()
        found.append(tenth())
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with denormals_as_zeros():
        go.set()
        done.wait()
        assert tenth() == 0
    thread.join()
    assert found[0] > 0


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denormals, "_library", lambda: None)
    assert not can_flush_denormals()
    with denormals_as_zeros():
        assert tenth() > 0
