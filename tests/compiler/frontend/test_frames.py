"""Frames of nested calls lie in one chunk."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable

from moec.compiler.frontend.frames import with_large_frame

CALLS = 200


def leaf() -> None:
    """Of a frame larger than that of its caller, so that a border can lie between them."""


leaf.__code__ = leaf.__code__.replace(co_stacksize=100)


def pages_mapped_by_calls(depth: int) -> int:
    """Page faults of CALLS calls below `depth` frames."""
    if depth:
        return pages_mapped_by_calls(depth - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        leaf()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def most(run: Callable[[int], int]) -> int:
    """The worst depth out of those that cross several borders, on a stack that nobody else has used."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.extend(run(depth) for depth in range(600)))
    thread.start()
    thread.join()
    return max(found)


@with_large_frame
def below(depth: int) -> int:
    """Arguments and results are as they were."""
    return pages_mapped_by_calls(depth)


def test_no_border_lies_below_a_roomy_frame() -> None:
    assert most(pages_mapped_by_calls) >= CALLS  # what it is good for, still
    assert most(below) < CALLS / 4


def test_the_function_stays_as_it_was() -> None:
    code = leaf.__code__
    made = with_large_frame(leaf)
    assert leaf.__code__ is code
    assert (made.__name__, made.__doc__, made()) == ("leaf", leaf.__doc__, None)
