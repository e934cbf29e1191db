"""report.html: the interactive plot of the front, which needs no network, and the page without it."""

from __future__ import annotations

import json
import re
import sys

import pytest

from moec.compiler.search.front_file import Front
from moec.compiler.search.report import to_html

SIZES = (4e6, 5e6, 9e6)


def member(number: int, size: float) -> dict[str, object]:
    increase = 0.004 * (3 - number)
    interval = {"value": increase, "low": increase - 0.002, "high": increase + 0.003}
    values = {"perplexity": increase, "expert-flops": 0.5 + 0.1 * number, "size": size}
    return {
        "name": f"{number:02d}",
        "recipe": f"front/{number:02d}.yaml",
        "command": "moec export",
        "values": values,
        "predicted": None,
        "generation": 1,
        "layers": [{"rule": "top-p mass=0.9", "kept": 0.7, "removed": 0}],
        "formats": {},
        "held_out": {"perplexity": interval, "values": values},
    }


def front(*objectives: str) -> Front:
    volumes = {"search": 0.4, "held_out": 0.39}
    return Front.model_validate(
        {
            "moec": "0",
            "settings": {"checkpoint": "models/</script>", "target": "onnx"},
            "source": {},
            "texts": {},
            "objectives": list(objectives),
            "worst": {"perplexity": 0.1, "expert-flops": 1.01, "size": 2e7},
            "hypervolume": volumes,
            "individuals": 9,
            "measured": 3,
            "given_up": 0,
            "lost": 0,
            "single_choices": 2,
            "seconds": 1.0,
            "members": [member(number, size) for number, size in enumerate(SIZES)],
            "not_told_apart": [],
            "surrogate": {
                "rank_correlation": None,
                "individuals": 0,
                "misleads": False,
                "predicted": [],
                "measured": [],
            },
            "generations": [],
        }
    )


def plotted(page: str) -> list[dict[str, object]]:
    """The traces that the page passes to plotly."""
    start = page.index("Plotly.newPlot(")
    found: list[dict[str, object]] = json.JSONDecoder().raw_decode(page, page.index("[", start))[0]
    return found


def test_the_front_is_interactive_and_offline() -> None:
    page = to_html(front("perplexity", "expert-flops", "size"))
    assert page.count("Plotly.newPlot(") == 1
    assert not re.search(r"<(script|link)[^>]*(src|href)\s*=", page)
    first, second, third = plotted(page)
    assert (first["visible"], second["visible"], third["visible"]) == (True, False, False)
    assert first["x"] == pytest.approx([50, 60, 70])
    assert first["y"] == pytest.approx([1.2, 0.8, 0.4])
    assert first["marker"]["color"] == pytest.approx([4, 5, 9])  # type: ignore[index]
    assert first["error_y"]["array"] == pytest.approx([0.3] * 3)  # type: ignore[index]
    assert first["error_y"]["arrayminus"] == pytest.approx([0.2] * 3)  # type: ignore[index]
    assert "error_y" not in third
    assert first["customdata"] == ["00", "01", "02"]
    assert "95 % [+1.00%, +1.50%]" in str(first["hovertext"])
    assert 'location.hash = "member-"' in page
    for name in ("00", "01", "02"):
        assert f'id="member-{name}"' in page
    assert page == to_html(front("perplexity", "expert-flops", "size"))


def test_two_objectives_need_no_menu() -> None:
    page = to_html(front("perplexity", "size"))
    (only,) = plotted(page)
    assert "colorbar" not in only["marker"]  # type: ignore[operator]
    assert '"updatemenus":[]' in page.replace(" ", "") or "updatemenus" not in page[page.index("Plotly.newPlot(") :]


def test_without_plotly_the_page_has_no_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    page = to_html(front("perplexity", "expert-flops", "size"))
    assert "<script" not in page
    assert 'href="#member-01"' in page
