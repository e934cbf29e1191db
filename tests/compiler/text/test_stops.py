"""Stop strings, wherever the text is cut."""

import itertools

import pytest

from moec.compiler.common.errors import UsageError
from moec.compiler.text.stops import StopStrings


def words(longest: int) -> list[str]:
    return ["".join(word) for size in range(1, longest + 1) for word in itertools.product("ab", repeat=size)]


def shown(stops: list[str], text: str, size: int) -> str:
    filtered = StopStrings(stops)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    return "".join([*(filtered.add(piece) for piece in pieces), filtered.end()])


def test_the_text_ends_before_the_first_occurrence() -> None:
    for text, stop, size in itertools.product(words(6), words(3), (1, 2, 3)):
        assert shown([stop], text, size) == text.split(stop)[0]


def test_of_two_stop_strings_none_is_shown() -> None:
    for text, one, other, size in itertools.product(words(5), words(3), words(3), (1, 5)):
        before = shown([one, other], text, size)
        assert text.startswith(before)
        assert one not in before
        assert other not in before
        assert before == text or text[len(before) :].startswith((one, other))


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    filtered = StopStrings(["User:", "\n\n"])
    pieces = ("Yes", ".\n", "Use", "d", "\n", "\nNo")
    assert [filtered.add(piece) for piece in pieces] == ["Yes", ".", "\n", "Used", "", ""]
    assert filtered.found
    assert (filtered.add("more"), filtered.end()) == ("", "")


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopStrings(["a", ""])
