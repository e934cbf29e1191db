"""The page of a matrix: what was measured of each cell, and why cells failed."""

from pathlib import Path
from typing import Any

import pytest

from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.report.matrix_page import Build, to_html
from moec.compiler.report.schema import Report, read_report
from moec.compiler.report.write import write


def report_of(directory: Path, size: int, **figures: Any) -> Report:
    directory.mkdir()
    (directory / "model.onnx").write_bytes(b"0" * size)
    quality = Verdict("quality", Status.PASS if figures else Status.NOT_RUN, "", 7, figures)
    manifest = {"model_files": ["model.onnx"], "source": {"bytes": 4_000_000}}
    write(directory, manifest, (Verdict("parity: artifact", Status.PASS, "equal", 5), quality), {})
    return read_report(directory)


@pytest.fixture
def builds(tmp_path: Path) -> list[Build]:
    return [
        Build("wide", "built", "", 12.3, report_of(tmp_path / "wide", 2_000_000, increase=0.001)),
        Build("a b", "cached", "", 0.1, report_of(tmp_path / "narrow", 1_000_000, increase=0.02)),
        Build("bad", "failed", "no <kernel>", 1.0, None),
    ]


def test_a_page_of_what_was_measured(builds: list[Build]) -> None:
    page = to_html(builds)
    assert "<h1>moec build: 1 built, 1 cached, 1 failed</h1>" in page
    for text in ('<a href="a%20b/report.html">a b</a>', "✗ failed", "2 pass", "2.00 MB", ">0.25<", "+2.00%", "12.3 s"):
        assert text in page
    assert "no &lt;kernel&gt;" in page
    assert page.count("<circle") == 2
    assert "<polyline" not in page
    assert "Not measured" not in page
    assert "<script" not in page


def test_one_cell_has_no_trade_off_and_no_failures(tmp_path: Path) -> None:
    assert "<circle" not in to_html([Build("a", "built", "", 1.0, report_of(tmp_path / "a", 10, increase=0.1))])
    page = to_html([Build("one", "built", "", 1.0, report_of(tmp_path / "one", 10))])
    assert "Not measured: it needs two cells with a perplexity" in page
    assert "Failures" not in page
    assert "1 pass, 1 not run" in page
