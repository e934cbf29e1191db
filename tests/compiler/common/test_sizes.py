"""Sizes with units."""

import pytest

from moec.compiler.common.errors import UsageError
from moec.compiler.common.sizes import byte_count, size_text


@pytest.mark.parametrize(
    ("text", "count"), [("2GB", 2 * 10**9), (" 1.5 GiB", 3 * 2**29), (".5MB", 500_000), ("7B", 7), ("64KiB", 2**16)]
)
def test_a_size_has_a_unit(text: str, count: int) -> None:
    assert byte_count(text, "--memory") == count


@pytest.mark.parametrize("text", ["", "2", "GB", "-1GB", "0MB", "2 gb", "1GB2", "inf GB"])
def test_anything_else_is_refused_with_the_place(text: str) -> None:
    with pytest.raises(UsageError, match="--memory has the value") as caught:
        byte_count(text, "--memory")
    assert "GiB" in caught.value.hint


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_500_000, "1.5 MB"), (2_340_000_000, "2.34 GB")]
)
def test_a_size_for_people(count: int, text: str) -> None:
    assert size_text(count) == text
