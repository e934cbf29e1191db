"""Pages of mapped files: which are in this process, locked or given back."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from moec.compiler.common.mapped_files import PAGE, Advice, MappedFile

PAGES = 64


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[tuple[Path, MappedFile]]:
    """A file of 64 pages, of which all but the first four are mapped, privately and for writing as runtimes do it."""
    path = tmp_path / "a name with spaces"
    path.write_bytes(bytes(range(PAGES)) * PAGE)
    with (
        path.open("r+b") as file,
        mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, offset=4 * PAGE) as held,
    ):
        yield path, MappedFile(path)
        held.close()


def amount(path: Path, key: str) -> int:
    """Bytes of a row of /proc/self/smaps, of all mappings of `path`."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith(f"{key}:"):
            total += int(line.split()[1]) * 1024
    return total


def test_only_what_is_mapped_has_an_address(mapped: tuple[Path, MappedFile]) -> None:
    _, file = mapped
    start = file.address(4 * PAGE, 1)
    assert start is not None
    assert file.address(10 * PAGE + 5, PAGE) == start + 6 * PAGE + 5
    assert file.address(60 * PAGE, 4 * PAGE) is not None
    assert file.address(60 * PAGE, 4 * PAGE + 1) is None
    assert file.address(3 * PAGE, 2 * PAGE) is None
    file.advise(0, PAGE, Advice.DONTNEED)
    assert file.lock(0, PAGE) == ""


def test_pages_are_locked_without_a_copy_and_given_back(mapped: tuple[Path, MappedFile]) -> None:
    path, file = mapped
    assert amount(path, "Rss") == 0
    file.advise(4 * PAGE, 60 * PAGE, Advice.RANDOM)
    assert file.lock(20 * PAGE + 7, 8 * PAGE) == ""
    assert amount(path, "Locked") >= 9 * PAGE
    assert amount(path, "Anonymous") == 0, "it was written to"
    file.lock(40 * PAGE, 8 * PAGE)
    before = amount(path, "Rss")
    assert before >= 17 * PAGE


@pytest.mark.parametrize("cache", [False, True])
def test_pages_are_given_back_as_a_whole(cache: bool, mapped: tuple[Path, MappedFile]) -> None:
    path, file = mapped
    start = file.address(4 * PAGE, 1)
    assert start is not None
    file.read_ahead(4 * PAGE, 60 * PAGE)
    file._library.mlock2 = lambda *_: -1  # pages that are locked cannot be given back
    file.lock(4 * PAGE, 60 * PAGE)
    assert amount(path, "Rss") == 60 * PAGE
    file.give_back(10 * PAGE + 1, 2 * PAGE - 2, cache=cache)
    assert amount(path, "Rss") == 60 * PAGE, "no page lies in it as a whole"
    file.give_back(10 * PAGE + 1, 3 * PAGE - 1, cache=cache)
    assert amount(path, "Rss") == 58 * PAGE
    file.give_back(4 * PAGE, 60 * PAGE, cache=cache)
    assert amount(path, "Rss") == 0


def test_a_range_of_several_mappings_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "parts"
    path.write_bytes(bytes(range(PAGES)) * PAGE)
    with path.open("rb") as file:
        parts = [
            mmap.mmap(file.fileno(), 8 * PAGE, access=mmap.ACCESS_READ, offset=start * PAGE) for start in (0, 16, 40)
        ]
    for part in parts:
        sum(part[::PAGE])
    mapped = MappedFile(path)
    assert len(mapped.mappings) == 3
    assert amount(path, "Rss") == 24 * PAGE
    mapped.give_back(4 * PAGE, 40 * PAGE, cache=False)
    assert amount(path, "Rss") == 8 * PAGE
    for part in parts:
        part.close()


def test_a_refusal_to_lock_has_a_reason_and_the_pages_are_read(mapped: tuple[Path, MappedFile]) -> None:
    path, file = mapped
    file._library.mlock2 = lambda *_: -1
    assert file.lock(20 * PAGE, 8 * PAGE)
    assert amount(path, "Rss") >= 8 * PAGE
    assert amount(path, "Locked") == 0
