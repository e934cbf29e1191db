"""report.html and summary.html in a real browser without a window, also judged by axe-core.

It needs `apt-get install chromium` and Node.js: `pytest -m interop tests/interop/test_browser.py --pictures=DIR` keeps
the screenshots in DIR.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.report import write as report
from moec.compiler.report.matrix_page import Build, to_html
from moec.compiler.report.schema import read_report

pytestmark = pytest.mark.interop
PHONE, DESK = 360, 1280
LIGHT, DARK = 1, 0
"""Values of Chromium's setting preferredColorScheme."""
CONTRAST = 4.5
"""Smallest ratio of contrast for text: WCAG 2.2, success criterion 1.4.3 (level AA)."""

# What the page says of itself once it is laid out in a frame of the width of a screen.
PROBE = """
<script>
addEventListener("load", () => {
  const frame = document.querySelector("iframe"), page = frame.contentDocument;
  const shown = (node) => node.getBoundingClientRect();
  const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  // Relative luminance by WCAG of a colour of CSS over the colours below it.
  const luminance = (colours) => { pixel.clearRect(0, 0, 1, 1);
    for (const colour of colours) { pixel.fillStyle = colour; pixel.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...pixel.getImageData(0, 0, 1, 1).data].map((value) => value / 255)
      .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const contrast = (node) => { const below = [], style = getComputedStyle(node);
    for (let each = node; each; each = each.parentElement) below.unshift(getComputedStyle(each).backgroundColor);
    const text = node.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [low, high] = [luminance(below), luminance([...below, text])].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05); };
  const texts = [...page.body.querySelectorAll("*")].filter((node) => !["STYLE", "title", "desc"].includes(node.tagName)
    && [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim()));
  const found = {
    width: page.documentElement.scrollWidth,
    height: page.documentElement.scrollHeight,
    plots: [...page.querySelectorAll("svg")].map((node) => [shown(node).width, shown(node).height]),
    letters: [...page.querySelectorAll("svg text")].map((node) => shown(node).height),
    small: [...page.querySelectorAll("th, td, p, caption, dd")]
      .filter((node) => parseFloat(getComputedStyle(node).fontSize) < 12).length,
    focusable: [...page.querySelectorAll("[tabindex], a")].map((node) => { node.focus();
      return page.activeElement === node; }),
    unlabelled: [...page.querySelectorAll("section, [role=region], svg")].filter((node) =>
      !(node.getAttribute("aria-label") || (node.getAttribute("aria-labelledby") || "").split(" ").every((id) =>
        page.getElementById(id)?.textContent.trim()))).length,
    scripts: page.scripts.length,
    contrast: Math.min(...texts.map(contrast)),
    texts: texts.length,
  };
  document.body.dataset.found = JSON.stringify(found);
});
</script>
"""


PACKAGES = ("playwright-core@1.65.1", "axe-core@4.14.1")
SCRIPT = Path(__file__).with_name("check_accessibility.mjs")


def browser() -> str:
    found = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    assert found is not None, "no browser: apt-get install chromium"
    return found


def chromium(*arguments: str | Path) -> str:
    fixed = ("--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--hide-scrollbars")
    command = [browser(), *fixed, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a report in which everything was measured, of a model with 16 layers of 64 experts."""
    directory = tmp_path_factory.mktemp("report")
    tokens = [[(7 * layer + 13 * expert) % 97 for expert in range(64)] for layer in range(16)]
    layers = [
        {"layer": n, "module": f"layers.{n}", "top_k": 8, "kept_share": 0.4 + n / 40, "kept_by_k": [0, *[0.125] * 8],
         "tokens": row}
        for n, row in enumerate(tokens)
    ]  # fmt: skip
    case = {"name": "batch 2, sequence 5", "error": 1e-6, "excused": 0, "positions": 24, "top1": 1.0}
    wall = [[0.004 + 0.0001 * ((17 * turn + call) % 23) for call in range(20)] for turn in range(10)]
    verdicts = (
        Verdict("parity: artifact", Status.PASS, "equal", 5, {"cases": [case], "limit": 1e-4, "seconds": 1.0}),
        Verdict("coverage", Status.PASS, "all", 5, {"steps": {"parity: artifact": {"share": 1.0, "layers": layers}}}),
        Verdict("latency", Status.FAIL, "too slow", 6, {"samples": {"decode128": {"candidate": {"wall": wall}}}}),
    )
    points = [{"bytes": 10**7 * n, "share_of_fp16": n / 9, "predicted_increase": 0.02 / n} for n in range(1, 9)]
    manifest = {
        "model": {"architectures": ["OlmoeForCausalLM"]},
        "tensor_bytes": {"experts_gate_up": 6 * 10**8, "experts_down": 3 * 10**8, "attention": 10**8, "lm_head": 10**7},
        "routing": {"accounting": {"layers": layers}},
        "quantization": {
            "layers": {f"layer {n}": 0.02 + n / 1000 for n in range(16)},
            "auto": {"trade_off": points, "chosen": points[2]},
        },
    }
    report.write(directory, manifest, verdicts, {"capture": 2.0, "gates": 10.0})
    return directory


@pytest.fixture
def page(reported: Path) -> str:
    return (reported / report.HTML).read_text(encoding="utf-8")


@pytest.fixture
def matrix(reported: Path) -> str:
    """The page of a matrix in which cells were built and one failed."""
    found = read_report(reported)
    builds = [Build("bad", "failed", "no such checkpoint: /nowhere", 0.1, None)]
    for number in range(1, 6):
        figures = {"bytes": number * 10**7, "ratio": number / 5, "perplexity_increase": 0.05 / number}
        summary = {**found.summary, **figures, "tokens_per_second": {"decode128": 100.0 * number}}
        made = found.model_copy(update={"summary": summary})
        builds.append(Build(f"model-onnx-int{number}-lean", "built", "", 9.0, made))
    return to_html(builds)


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("scheme", [LIGHT, DARK])
@pytest.mark.parametrize(("kind", "plots"), [("page", 5), ("matrix", 1)])
def test_a_page_fits_is_legible_and_can_be_used_without_a_mouse(
    kind: str, plots: int, scheme: int, width: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    page = request.getfixturevalue(kind)
    frame = f'<iframe width="{width}" height="6000" style="border:0" srcdoc="{html.escape(page)}"></iframe>'
    around = tmp_path / "around.html"
    head = "<!doctype html><meta charset=utf-8><meta name=color-scheme content='light dark'>"
    around.write_text(f"{head}<body style='margin:0'>{frame}{PROBE}")
    colours = f"--blink-settings=preferredColorScheme={scheme}"
    dom = chromium(colours, "--dump-dom", around.as_uri())
    match = re.search(r'data-found="([^"]*)"', dom)
    assert match is not None, dom[:300]
    found = json.loads(html.unescape(match.group(1)))
    assert found["width"] <= width, "the page itself scrolls sideways"
    assert len(found["plots"]) == plots
    assert all(0.8 * min(width, 700) <= plot[0] <= width and plot[1] > 100 for plot in found["plots"])
    assert min(found["letters"]) >= 9, "the letters of a plot are too small"
    assert found["small"] == 0
    assert found["focusable"]
    assert all(found["focusable"])
    assert found["unlabelled"] == found["scripts"] == 0
    assert found["texts"] > 20
    assert found["contrast"] >= CONTRAST
    picture = tmp_path / "page.png"
    chromium(colours, f"--screenshot={picture}", f"--window-size={max(width, 600)},{found['height']}", around.as_uri())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 25_000, "the picture is all but empty"


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script in a folder with what it needs."""
    assert shutil.which("npm"), "no npm: install Node.js 20 or later"
    folder = tmp_path_factory.mktemp("node")
    # playwright-core without its own browsers: the one that is installed is used.
    command = ["npm", "install", "--silent", "--ignore-scripts", "--prefix", str(folder), *PACKAGES]
    subprocess.run(command, check=True, timeout=600)
    shutil.copy(SCRIPT, folder)
    return folder / SCRIPT.name


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["page", "matrix"])
def test_axe_finds_nothing_to_mend(
    kind: str, scheme: str, width: int, judge: Path, pictures: Path, request: pytest.FixtureRequest
) -> None:
    page, picture = pictures / f"{kind}.html", pictures / f"{kind}-{width}-{scheme}.png"
    page.write_text(request.getfixturevalue(kind), encoding="utf-8")
    command = ["node", str(judge), page.as_uri(), str(width), scheme, str(picture), browser()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["violations"] == []
    # It cannot judge letters on a plot, nor what scrolls: the test above measures the contrast of every text.
    assert {each["rule"] for each in found["incomplete"]} <= {"color-contrast"}
    assert {"color-contrast", "svg-img-alt", "document-title", "html-has-lang"} <= set(found["passes"])
    assert picture.stat().st_size > 25_000
