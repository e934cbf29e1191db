"""Inserts the results of a benchmark into a page of the documentation."""

from __future__ import annotations

from pathlib import Path

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def put(text: str, page: Path) -> None:
    """Write `text` between the markers of `page`; a missing page is created with only the markers."""
    before, _, rest = (page.read_text(encoding="utf-8") if page.is_file() else f"{BEGIN}\n{END}\n").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
