"""Inserts the results of a benchmark into a page of the documentation."""

from __future__ import annotations

from pathlib import Path


def put(text: str, page: Path, *, name: str = "table") -> None:
    """Write `text` between the markers of `page` with this name; a page or markers that are missing are made."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    if begin not in before:
        before += f"{begin}\n{end}\n"
    head, _, rest = before.partition(begin)
    page.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")
