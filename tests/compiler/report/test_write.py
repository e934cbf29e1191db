"""The report in its three forms, read back as its readers would."""

import json
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from moec.compiler.common.artifact import REPORTS
from moec.compiler.common.errors import ArtifactError, OutputError
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.report import schema as report_schema
from moec.compiler.report import write as report
from moec.compiler.report.page import Section, sections, to_html

ROOT = Path(__file__).resolve().parents[3]
COVERAGE = {
    "steps": {
        "parity: artifact": {
            "share": 0.75,
            "layers": [
                {"layer": 0, "module": "layers.0.experts", "tokens": [10, 3]},
                {"layer": 1, "module": "layers.1.experts", "tokens": [13, 0]},
            ],
        }
    }
}
CASE = {"name": "batch <1>", "error": float("inf"), "excused": 0, "positions": 4, "top1": 0.5}
VERDICTS = (
    Verdict("parity: artifact", Status.FAIL, "a <b> & c", 5, {"cases": [CASE], "limit": 1e-4, "seconds": 1.5}),
    Verdict("coverage", Status.PASS, "3 of 4 experts", 5, COVERAGE),
    Verdict("latency", Status.NOT_RUN, "no GPU", 6),
)
MEASURED = Verdict(
    "latency",
    Status.PASS,
    "within the budget",
    6,
    {"samples": {"decode128": {"candidate": {"wall": [[0.001 * (1 + i % 7) for i in range(25)]] * 4}}}},
)
LAYERS = [
    {"module": f"layers.{i}", "top_k": 4, "kept_share": 0.5 + i / 8, "kept_by_k": [0, 0.5, 0.5, 0, 0], "tokens": [i, 9]}
    for i in range(3)
]
POINTS = [{"bytes": 10_000_000 * i, "share_of_fp16": i / 4, "predicted_increase": 0.02 / i} for i in (1, 2, 3)]
MANIFEST = {
    "model": {"architectures": ["TinyForCausalLM"]},
    "recipe": {"target": "onnx"},
    "tools": {"torch": "2.13.0", "moec": "0.1"},
    "passes": [{"name": "fold", "rejections": [{"source": "fold", "where": "layers.0", "reason": "dynamic"}]}],
    "rejections": [{"source": "onnx", "where": "layers.1", "reason": "no kernel"}],
    "tensor_bytes": {"experts": 4_000_000, "attention": 1000},
}
PAGING = [{"memory_share": 0.5, "hit_rate": 0.75, "read_share": 0.03125}]
FULL = {
    **MANIFEST,
    "routing": {"accounting": {"layers": LAYERS, "paging": PAGING}},
    "quantization": {
        "layers": {"layer 0": 0.02, "layer 1": 0.03},
        "auto": {"trade_off": POINTS, "chosen": POINTS[1]},
    },
}
TIMINGS = {"capture": 2.0, "gates": 0.5}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(b"12345")
    report.write(tmp_path, MANIFEST, VERDICTS, TIMINGS)
    return tmp_path


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A report in which everything was measured."""
    (tmp_path / "model.onnx").write_bytes(b"12345")
    report.write(tmp_path, FULL, (*VERDICTS[:2], MEASURED), TIMINGS)
    return tmp_path


def test_the_published_schema_is_that_of_the_model() -> None:
    published = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    assert published == report_schema.json_schema()


def test_json_holds_every_documented_key(written: Path) -> None:
    content = json.loads((written / report.JSON).read_text())
    assert list(content) == list(report_schema.Report.model_fields)
    assert content["schema_version"] == 1
    assert content["exit_code"] == 5
    assert [verdict["status"] for verdict in content["verdicts"]] == ["fail", "pass", "not run"]
    assert content["verdicts"][0]["figures"]["cases"][0]["error"] == "inf"
    assert content["files"] == {"model.onnx": 5}
    assert [item["where"] for item in content["rejections"]] == ["layers.0", "layers.1"]
    assert list(content["versions"]) == ["moec", "torch"]
    assert content["machine"]["cores"] >= 1
    assert content["machine"]["memory_bytes"] > 0


def test_a_second_report_replaces_the_first_and_does_not_list_it(written: Path) -> None:
    report.write(written, MANIFEST, VERDICTS[1:2], TIMINGS)
    content = json.loads((written / report.JSON).read_text())
    assert content["files"] == {"model.onnx": 5}
    assert content["exit_code"] == 0


def test_the_names_are_those_that_the_artifact_does_not_hash() -> None:
    assert {report.JSON, report.HTML, report.JUNIT} <= REPORTS


def test_junit_has_one_case_per_gate_and_passes_nothing_that_did_not_run(written: Path) -> None:
    root = ElementTree.parse(written / report.JUNIT).getroot()
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("3", "1", "1")
    cases = {case.get("name"): case for case in root.iter("testcase")}
    failure = cases["parity: artifact"].find("failure")
    assert failure is not None
    assert failure.get("message") == "a <b> & c"
    assert cases["parity: artifact"].get("time") == "1.500"
    assert cases["latency"].find("skipped") is not None
    assert [child.tag for child in cases["coverage"]] == ["system-out"]


class _Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not match."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_html_is_whole_and_needs_no_network(written: Path) -> None:
    source = (written / report.HTML).read_text(encoding="utf-8")
    page = _Page(source)
    assert not page.all("script")
    assert not page.all("link")
    assert "http" not in source
    assert "TinyForCausalLM" in page.text
    assert "a <b> & c" in page.text  # escaped in the source, or it would be a tag
    for text in ("✗ fail", "✓ pass", "○ not run", "batch <1>", "inf", "4.0 MB", "2.00 s", "no kernel", "2.13.0"):
        assert text in page.text


def test_the_page_begins_with_the_summary(written: Path) -> None:
    content = json.loads((written / report.JSON).read_text())
    assert content["summary"]["target"] == "onnx"
    page = _Page((written / report.HTML).read_text(encoding="utf-8"))
    assert page.text.index("TinyForCausalLM -> onnx") < page.text.index("Verdicts")
    assert page.text.index("moec chat .") < page.text.index("Verdicts")
    older = {**content, "summary": {}}
    assert "Summary" not in _Page(to_html(older)).text


def test_html_is_accessible(written: Path) -> None:
    source = (written / report.HTML).read_text(encoding="utf-8")
    page = _Page(source)
    assert page.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert "prefers-color-scheme: dark" in source
    assert len(page.all("caption")) == len(page.all("table")) == 8
    assert all("scope" in head for head in page.all("th"))
    assert all(
        part.get("aria-labelledby") in {head.get("id") for head in page.all("h2")} for part in page.all("section")
    )
    regions = [part for part in page.all("div") if part.get("role") == "region"]
    assert regions
    assert all(part.get("tabindex") == "0" for part in regions)
    assert [tag for tag, _ in page.tags if tag in ("h1", "main", "header")] == ["header", "h1", "main"]


def test_the_heat_map_marks_experts_that_were_not_reached(written: Path) -> None:
    page = _Page((written / report.HTML).read_text(encoding="utf-8"))
    cells = [cell for cell in page.all("td") if "--v" in (cell.get("style") or "")]
    assert len(cells) == 4
    assert [cell.get("class") for cell in cells] == ["number", "number", "number", "none"]
    assert cells[2]["style"] == "--v:1.00"


def test_a_report_without_figures_is_a_page_too(tmp_path: Path) -> None:
    report.write(tmp_path, {}, (), {})
    assert "moec report: artifact" in _Page((tmp_path / report.HTML).read_text()).text


def test_a_directory_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        report.write(tmp_path / "missing", MANIFEST, VERDICTS, TIMINGS)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "cannot be read"), ("{}", "schema_version"), ('{"schema_version": 9', "Invalid JSON")],
)
def test_a_damaged_report_is_a_clear_error(tmp_path: Path, content: str | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / report.JSON).write_text(content)
    with pytest.raises(ArtifactError, match=complaint):
        report_schema.read_report(tmp_path)


def test_a_report_of_another_version_is_refused(written: Path) -> None:
    assert report_schema.read_report(written).exit_code == 5
    path = written / report.JSON
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(ArtifactError, match="schema version 2, this moec reads 1"):
        report_schema.read_report(written)


def _sections(directory: Path) -> dict[str, Section]:
    return {section.key: section for section in sections(json.loads((directory / report.JSON).read_text()))}


def test_what_was_not_measured_is_said_and_never_left_out(written: Path, full: Path) -> None:
    report.write(written, MANIFEST, VERDICTS, TIMINGS)
    empty = {key for key, section in _sections(written).items() if not section.parts}
    assert empty == {"latency", "utilisation", "slots", "paging", "errors", "trade-off"}
    page = _Page((written / report.HTML).read_text(encoding="utf-8"))
    assert page.text.count("Not measured: ") == len(empty)
    report.write(full, FULL, (*VERDICTS[:2], MEASURED), TIMINGS)
    assert all(section.parts for section in _sections(full).values())
    assert "50.0%75.0%3.1%" in "".join(_Page((full / report.HTML).read_text(encoding="utf-8")).text.split())


def test_every_plot_has_title_description_and_its_figures_in_a_table(full: Path) -> None:
    source = (full / report.HTML).read_text(encoding="utf-8")
    page = _Page(source)
    plots = page.all("svg")
    assert len(plots) == 5
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for plot in plots:
        assert plot["role"] == "img"
        assert set((plot["aria-labelledby"] or "").split()) <= set(ids)
    for section in _sections(full).values():
        assert all(part.table is not None for part in section.parts)
    for text in ("p50", "4.000 ms", "k = 2", "62.5%", "0.0300", "+1.000%", "chosen"):
        assert text in page.text
    assert len(source) < 60_000


def test_bars_and_points_lie_where_their_figures_are(full: Path) -> None:
    parts = _sections(full)
    bars = ElementTree.fromstring(parts["slots"].parts[0].plot or "").findall("rect")
    heights = [float(bar.get("height", "")) for bar in bars]
    assert heights[1] / heights[0] == pytest.approx(0.625 / 0.5, rel=1e-2)
    curve = ElementTree.fromstring(parts["trade-off"].parts[0].plot or "")
    (ring,) = [circle for circle in curve.findall("circle") if circle.get("class") == "marked"]
    assert (ring.get("cx"), ring.get("cy")) in {(c.get("cx"), c.get("cy")) for c in curve.findall("circle[@r='3.5']")}
    histogram = ElementTree.fromstring(parts["latency"].parts[0].plot or "")
    assert sum(float(bar.get("height", "")) > 0 for bar in histogram.findall("rect")) == 7
