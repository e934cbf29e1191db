"""Pages of `moec web` in Chromium: `apt-get install chromium`, Node.js 20, `pytest -m interop`.

Set MOEC_SCREENSHOTS to a folder to keep the pictures.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.compiler.families.tiny_models import tiny_model
from moec.compiler.web.packages import command, pinned_packages
from moec.compiler.web.site import make_site
from tests.support.static_server import serving

pytestmark = pytest.mark.interop
DRIVER = Path(__file__).with_name("drive_page.mjs")
TOOLS = ("playwright-core@1.65.1", "axe-core@4.14.1")
PROMPTS = ("The list of arguments is", "def main():\n    return")
DATA = "model/onnx/model.onnx_data"
COUNT = 64


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages of the page, and with those that drive and judge it."""
    assert shutil.which("npm"), "no npm: install Node.js 20 or later"
    folder = tmp_path_factory.mktemp("node")
    install = ["npm", "install", "--silent", "--ignore-scripts", "--prefix", str(folder), *TOOLS]
    subprocess.run(install, check=True, timeout=600)
    subprocess.run(command(pinned_packages(), str(folder)), shell=True, check=True, timeout=600)
    shutil.copy(DRIVER, folder)
    return folder


Drive = Callable[..., dict[str, Any]]


@pytest.fixture
def drive(node: Path, tmp_path: Path) -> Drive:
    """Opens an address in Chromium and returns what was seen there; see drive_page.mjs for the options."""
    browser = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    assert browser, "no browser: apt-get install chromium"
    numbers = itertools.count()

    def opened(url: str, **options: Any) -> dict[str, Any]:
        profile = str(tmp_path / f"profile-{next(numbers)}")
        asked = {"url": url, "browser": browser, "profile": profile, **options}
        done = subprocess.run(
            ["node", str(node / DRIVER.name), json.dumps(asked)],
            capture_output=True,
            text=True,
            timeout=550,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return seen

    return opened


@pytest.fixture(scope="session")
def second_family(golden_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE with the tokenizer of the golden model."""
    directory = tmp_path_factory.mktemp("qwen3")
    tiny_model("qwen3_moe", vocab_size=4096).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(golden_model / name, directory)
    return directory


BUILDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "second": {},
    "int4": {
        "quantize": "int4",
        "routing": {"policy": "top-p", "parameters": {"mass": 0.8}, "runtime_input": True},
    },
}


@pytest.fixture(scope="session")
def built(
    golden_model: Path, second_family: Path, node: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """Name in `BUILDS` -> artifact and site, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def build(name: str) -> tuple[Path, Path]:
        if name not in made:
            artifact = tmp_path_factory.mktemp(name) / f"olmoe-tiny-{name}"
            source = second_family if name == "second" else golden_model
            moec.export(source, target="onnx", flavor="web", output=artifact, gates=False, **BUILDS[name])
            site = artifact.with_name("site")
            make_site(artifact, site, packages=node)
            made[name] = artifact, site
        return made[name]

    return build


def wanted(artifact: Path, prompt: str, budget: float | None) -> tuple[list[int], str]:
    inputs = {} if budget is None else {"routing_budget": budget}
    generator = moec.load(artifact, inputs=inputs)
    ids = generator.encode(prompt)
    tokens = list(generator.tokens(ids, max_new_tokens=COUNT))
    return tokens, generator.generate(prompt, max_new_tokens=COUNT)


@pytest.mark.parametrize("name", list(BUILDS))
def test_the_page_gives_the_tokens_of_moec_run(name: str, built: Any, drive: Drive) -> None:
    artifact, site = built(name)
    with serving(site) as server:
        seen = drive(server.url, prompts=PROMPTS, count=COUNT, budget=100)
    assert seen["state"] == "ready", seen
    assert "WebAssembly with SIMD" in seen["device"]["Computes with"]
    for prompt, answers in zip(PROMPTS, seen["answers"], strict=True):
        (answer,) = answers
        tokens, text = wanted(artifact, prompt, 1.0 if name == "int4" else None)
        assert answer["tokens"] == tokens
        assert answer["text"] == prompt + text
        assert float(answer["figures"]["rate"]) > 0
        assert answer["figures"]["share"] == "100 %"


def test_the_budget_is_shown_beside_the_full_model(built: Any, drive: Drive, tmp_path: Path, node: Path) -> None:
    artifact, site = built("int4")
    pictures = Path(os.environ.get("MOEC_SCREENSHOTS", tmp_path))
    shots = [
        {"path": str(pictures / f"page-{width}-{scheme}.png"), "width": width, "height": 900, "scheme": scheme}
        for width in (1280, 360)
        for scheme in ("light", "dark")
    ]
    axe = str(node / "node_modules" / "axe-core" / "axe.min.js")
    with serving(site) as server:
        seen = drive(server.url, prompts=PROMPTS[:1], count=COUNT, budget=50, screenshots=shots, axe=axe)
    full, less = seen["answers"][0]
    assert full["tokens"] == wanted(artifact, PROMPTS[0], 1.0)[0]
    assert less["tokens"] != full["tokens"]
    assert full["figures"]["share"] == "100 %"
    assert 35 <= int(less["figures"]["share"].removesuffix(" %")) <= 65
    assert "\u00d7" in less["figures"]["rate"], "the speed relative to the full model"
    assert seen["violations"] == []
    assert seen["width"] <= 0, "the page scrolls sideways"
    assert not [line for line in seen["console"] if "error" in line.partition(":")[0]], seen["console"]


def test_a_broken_download_goes_on_where_it_broke(built: Any, drive: Drive) -> None:
    _, site = built("fp32")
    size = (site / DATA).stat().st_size
    for ranges in (True, False):
        with serving(site, ranges=ranges) as server:
            server.breaks[DATA] = 2
            seen = drive(server.url)
        assert seen["state"] == "ready", seen
        assert f"The download of {DATA} broke; it goes on" in seen["notices"][f"broken:{DATA}"]
        asked = [span for path, span in server.requests if path == DATA]
        assert asked[0] is None
        assert all(span and span.startswith("bytes=") for span in asked[1:])
        if ranges:
            assert server.sent[DATA] < 1.6 * size
    with serving(site) as server:
        server.breaks[DATA] = 1000
        seen = drive(server.url)
    assert seen["state"] == "failed"
    assert f"The download of {DATA} broke" in seen["notices"]["download"]


def test_a_damaged_file_is_named_and_fetched_anew(built: Any, drive: Drive) -> None:
    _, site = built("fp32")
    with serving(site) as server:
        server.damages[DATA] = 1
        seen = drive(server.url)
    assert seen["state"] == "ready"
    assert f"{DATA} came damaged" in seen["notices"][f"damaged:{DATA}"]
    with serving(site) as server:
        server.damages["model/tokenizer.json"] = 1000
        seen = drive(server.url)
    assert seen["state"] == "failed"
    assert "model/tokenizer.json is damaged" in seen["notices"]["damaged"]


DAMAGE = """(async () => {
  const root = await navigator.storage.getDirectory();
  for await (const [name, folder] of root.entries()) {
    if (!name.startsWith("moec-")) continue;
    const file = await folder.getFileHandle("model_onnx_model.onnx_data");
    const size = (await file.getFile()).size;
    const writer = await file.createWritable({ keepExistingData: true });
    await writer.write({ type: "write", position: size - 1000, data: new Uint8Array([1, 2, 3, 4]) });
    await writer.close();
    return size;
  }
})()"""


def test_what_is_stored_is_not_fetched_again_unless_it_is_damaged(built: Any, drive: Drive, tmp_path: Path) -> None:
    _, site = built("fp32")
    size = (site / DATA).stat().st_size
    profile = str(tmp_path / "kept")
    with serving(site) as server:
        assert drive(server.url, profile=profile, evaluate=DAMAGE)["value"] == size
        server.sent.clear()
        seen = drive(server.url, profile=profile)
        assert seen["state"] == "ready"
        assert "is damaged" in seen["notices"][f"stored-damaged:{DATA}"]
        assert 0 < server.sent[DATA] < 9e6
        server.sent.clear()
        seen = drive(server.url, profile=profile, offline=True)
        assert seen["state"] == "ready"
        assert not any(path.startswith("model/") for path in server.sent)
        assert seen["offline"]["state"] == "ready"


def test_without_webgpu_or_threads_the_page_says_so(built: Any, drive: Drive) -> None:
    _, site = built("fp32")
    with serving(site, isolated=False) as server:
        plain = drive(server.url, serviceWorkers="block")
        helped = drive(server.url)
    assert plain["state"] == helped["state"] == "ready"
    assert "not cross-origin isolated" in plain["notices"]["no-threads"]
    assert "1 thread" in plain["device"]["Computes with"]
    assert "no WebGPU" in plain["notices"]["no-webgpu"]
    # The service worker isolates the page where the server does not.
    assert "no-threads" not in helped["notices"]
    threads = min(os.cpu_count() or 1, 8)
    assert f"{threads} thread" in helped["device"]["Computes with"]


def test_too_little_memory_is_told_before_anything_is_fetched(built: Any, drive: Drive, tmp_path: Path) -> None:
    _, site = built("fp32")
    with serving(site) as server:
        seen = drive(server.url, init="Object.defineProperty(navigator, 'deviceMemory', { get: () => 0.25 });")
        assert "this device has 0.3 GB" in seen["notices"]["memory"]
        assert not any(path.startswith("model/") for path, _ in server.requests)
    large = tmp_path / "large"
    shutil.copytree(site, large)
    described = json.loads((large / "site.json").read_text())
    (large / "site.json").write_text(json.dumps({**described, "memory": 5e9}))
    with serving(large) as server:
        seen = drive(server.url)
    assert seen["state"] == "failed"
    assert "WebAssembly has at most 4.3 GB" in seen["notices"]["memory"]


def test_plain_http_is_refused_in_words(built: Any, drive: Drive) -> None:
    _, site = built("fp32")
    with serving(site) as server:
        url = server.url.replace("127.0.0.1", "moec.test")
        seen = drive(url, flags=["--host-resolver-rules=MAP moec.test 127.0.0.1"])
    assert seen["state"] == "failed"
    assert "plain HTTP" in seen["notices"]["insecure"]


LEAVE = """(async () => {
  const answers = [];
  try { await fetch("URL"); answers.push("page"); } catch (error) { answers.push(error.name); }
  const { Engine } = await import("./engine.js");
  const script = `fetch("URL").then(() => postMessage("worker"), (error) => postMessage(error.name));`;
  const worker = new Worker(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));
  answers.push(await new Promise((resolve) => { worker.onmessage = ({ data }) => resolve(data); }));
  return answers;
})()"""


def test_nothing_leaves_the_page(built: Any, drive: Drive, tmp_path: Path) -> None:
    _, site = built("fp32")
    (tmp_path / "other").mkdir()
    with serving(site) as server, serving(tmp_path / "other") as other:
        seen = drive(server.url, evaluate=LEAVE.replace('"URL"', json.dumps(other.url)))
    assert seen["value"] == ["TypeError", "TypeError"]
    assert other.requests == []
