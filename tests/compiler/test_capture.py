"""Capture leaves the process as it found it."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest

from moec.compiler import capture as module
from moec.compiler.capture import capture
from moec.compiler.checkpoint import Checkpoint
from moec.compiler.errors import UnsupportedModelError


@pytest.mark.parametrize("fails", [False, True])
def test_the_garbage_collector_is_as_before(
    fails: bool, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    during: list[tuple[int, int, int]] = []
    shapes = module._state_shapes

    def watched(*args: object) -> object:
        during.append(gc.get_threshold())
        if fails:
            raise UnsupportedModelError("no")
        return shapes(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_state_shapes", watched)
    before, checkpoint = gc.get_threshold(), Checkpoint.open(tiny_checkpoint("mixtral"))
    if fails:
        with pytest.raises(UnsupportedModelError):
            capture(checkpoint)
    else:
        capture(checkpoint)
    assert during != [before]
    assert gc.get_threshold() == before
