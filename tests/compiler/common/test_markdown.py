"""Tables in Markdown."""

from __future__ import annotations

from moec.compiler.common.markdown import table


def test_a_table() -> None:
    text = table(["model", "reason"], [["a", "one\n line"], ["b", "x | y"]])
    assert text.splitlines() == ["| model | reason |", "|---|---|", "| a | one line |", "| b | x \\| y |"]
