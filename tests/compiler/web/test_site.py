"""The folder of `moec web`: its files, their digests, and what it tells the page of the model."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import moec
from moec import cli
from moec.compiler.common.errors import ArtifactError, OutputError, UsageError
from moec.compiler.web import site
from moec.targets import get_target
from moec.targets.onnx.states import zeros

PAGE = Path(site.__file__).parent / "page"


@pytest.fixture(autouse=True)
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages are a single stand-in."""

    def copy(destination: Path, _folder: Path | None) -> tuple[str, ...]:
        destination.mkdir()
        (destination / "some.js").write_text("")
        return ("some.js",)

    monkeypatch.setattr(site, "copy_packages", copy)


@pytest.fixture(scope="module")
def artifact(golden_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model for browsers, in int4, with a policy whose threshold is an input."""
    directory = tmp_path_factory.mktemp("web") / "golden"
    routing = {"policy": "top-p", "parameters": {"mass": 0.8}, "runtime_input": True}
    moec.export(
        golden_model, target="onnx", flavor="web", quantize="int4", routing=routing, output=directory, gates=False
    )
    return directory


@pytest.fixture
def made(artifact: Path, tmp_path: Path) -> Path:
    site.make_site(artifact, tmp_path / "site")
    return tmp_path / "site"


def described(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / site.SITE).read_text())
    return content


def test_every_file_has_the_digest_of_moec_json_and_those_of_its_pieces(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "PIECE_BYTES", 100_000)
    site.make_site(artifact, tmp_path / "site")
    content = described(tmp_path / "site")
    digests = json.loads((artifact / "moec.json").read_text())["files"]
    names = set()
    for entry in content["files"]:
        data = (tmp_path / "site" / entry["path"]).read_bytes()
        name = entry["path"].removeprefix("model/")
        names.add(name)
        assert entry["bytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        if name not in {"moec.json", "onnx/model_q4.onnx"}:
            assert entry["sha256"] == digests[name]
        pieces = [data[start : start + content["piece_size"]] for start in range(0, len(data), content["piece_size"])]
        assert entry["pieces"] == [hashlib.sha256(piece).hexdigest() for piece in pieces]
    assert max(len(entry["pieces"]) for entry in content["files"]) > 10
    assert names == {
        "moec.json", "tokenizer.json", "tokenizer_config.json", "onnx/model_q4.onnx", "onnx/model_q4.onnx_data"
    }  # fmt: skip
    assert content["bytes"] == sum(entry["bytes"] for entry in content["files"])


def test_what_the_page_is_told_of_the_model(made: Path, artifact: Path) -> None:
    content = described(made)
    assert (content["name"], content["end_tokens"], content["start_tokens"]) == ("golden", [0], [0])
    assert "16 experts, of which a token uses 4, in int4." in content["facts"]
    assert content["sampling"] == {
        "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0
    }  # fmt: skip
    assert content["drawn"]["temperature"] == 1.0
    assert content["model"] == {"graph": "model/onnx/model_q4.onnx", "data": ["model/onnx/model_q4.onnx_data"]}
    assert content["probe"] == moec.load(artifact).encode(site.PROBE)
    assert [layer["experts"] for layer in content["routing"]] == [16] * 4
    assert content["budget"]["full"] == 1.0
    assert 0.3 < content["budget"]["default_share"] < 0.9
    assert content["session"] == {"qdq_matmulnbits_accuracy_level": "0", "disable_quant_qdq": "1"}
    for files in content["runtimes"].values():
        assert set(files) == {"module", "loader", "wasm"}
    assert {*content["page"]} == {*(path.name for path in PAGE.iterdir()), "vendor/some.js"}
    assert all((made / name).is_file() for name in content["page"])


def test_the_graph_of_the_page_computes_what_the_artifact_does_and_tells_the_routing(
    made: Path, artifact: Path
) -> None:
    content = described(made)
    options = ort.SessionOptions()
    for name, value in content["session"].items():
        options.add_session_config_entry(f"session.{name}", value)
    graph = str(made / content["model"]["graph"])
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    runner = moec.load(artifact).runner
    ids = np.arange(5, 25, dtype=np.int64)[None]
    want = runner.prefill(ids)
    specs = {spec.name: spec for spec in session.get_inputs()}
    assert content["budget"]["input"] in specs, "it must be an input without a default"
    states = {name: zeros(spec, 1, 0) for name, spec in specs.items() if name.startswith("past")}
    outputs = ["logits", *(layer[role] for layer in content["routing"] for role in ("indices", "weights"))]

    def run(budget: float) -> list[Any]:
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(20)[None]}
        return list(session.run(outputs, {**feeds, **states, "routing_budget": np.asarray(budget, np.float32)}))

    logits, *routing = run(0.8)
    assert np.abs(logits - want).max() <= 1e-5 * np.abs(want).max()
    assert all(rows.shape == (20, 4) for rows in routing)
    used = [np.count_nonzero(weights) for weights in routing[1::2]]
    full = [np.count_nonzero(weights) for weights in run(content["budget"]["full"])[2::2]]
    assert full == [80] * 4
    assert sum(used) < sum(full)
    share = next(value for known, value in content["budget"]["curve"] if known > 0.45)
    assert 0.3 < sum(np.count_nonzero(weights) for weights in run(share)[2::2]) / sum(full) < 0.65


def test_what_the_session_does_with_weights_depends_on_their_size() -> None:
    def told(size: int, decoded: int) -> tuple[set[str], float]:
        found = site._contents([{"bytes": size}], [], decoded)
        return set(found["session"]) - {"qdq_matmulnbits_accuracy_level"}, found["memory"] - site.RUNTIME_BYTES

    assert told(10**8, 8 * 10**8) == ({"disable_quant_qdq"}, 10**9)
    assert told(2 * 10**8, 16 * 10**8) == ({"disable_quant_qdq", "disable_prepacking"}, 2 * 10**9)
    assert told(10**9, 8 * 10**9) == ({"disable_prepacking"}, 2 * 10**9)


def test_a_chat_template_reaches_the_page(artifact: Path, tmp_path: Path) -> None:
    assert described_of(artifact, tmp_path)["chat"] is None
    config = json.loads((artifact / "tokenizer_config.json").read_text())
    changed = tmp_path / "chat"
    shutil.copytree(artifact, changed)
    (changed / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ bos_token }}hi"}))
    chat = described_of(changed, tmp_path)["chat"]
    assert chat["template"] == "{{ bos_token }}hi"
    assert chat["special_tokens"]["bos_token"] == "<|endoftext|>"


def described_of(artifact: Path, _tmp_path: Path) -> dict[str, Any]:
    manifest = json.loads((artifact / "moec.json").read_text())
    return site.describe(artifact, manifest, get_target("onnx").open_for_browser(artifact))


def test_what_cannot_become_a_page_is_refused(
    artifact: Path, golden_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(artifact, broken)
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json differs"):
        site.make_site(broken, tmp_path / "site")
    assert not (tmp_path / "site").exists()
    with pytest.raises(UsageError, match="tflite target does not run in a browser"):
        get_target("tflite").open_for_browser(artifact)
    moec.export(golden_model, target="onnx", flavor="genai", output=tmp_path / "genai", gates=False)
    with pytest.raises(UsageError, match="caches have the form of onnxruntime-genai"):
        site.make_site(tmp_path / "genai", tmp_path / "site")
    monkeypatch.setattr("moec.targets.onnx.page_graph.DATA_LIMIT", 1000)
    with pytest.raises(UsageError, match="too large for a browser"):
        site.make_site(artifact, tmp_path / "site")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("")
    with pytest.raises(OutputError):
        site.make_site(artifact, tmp_path / "full")


def test_the_command(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(["web", str(artifact), "-o", str(tmp_path / "site"), "--title", "A model", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    content = described(tmp_path / "site")
    assert content["name"] == "A model"
    assert found["model_bytes"] == content["bytes"]
    total = sum(path.stat().st_size for path in (tmp_path / "site").rglob("*") if path.is_file())
    assert found["page_bytes"] + found["model_bytes"] == total


def test_nothing_leaves_the_page() -> None:
    texts: Callable[[str], list[str]] = lambda pattern: [path.read_text() for path in sorted(PAGE.glob(pattern))]  # noqa: E731
    (html,) = texts("*.html")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert rules["script-src"] == "'self' 'wasm-unsafe-eval'"
    for text in (html, *texts("*.js"), *texts("*.css")):
        assert not re.search(r"https?://(?!localhost)\w", text)
    assert not re.search(r"<script(?! type=\"module\" src=)|\son\w+=|style=", html), "inline code is not allowed"


def test_every_control_of_the_page_has_a_name() -> None:
    html = (PAGE / "index.html").read_text()
    labelled = set(re.findall(r'<label[^>]* for="([^"]+)"', html)) | set(
        re.findall(r'<label[^>]*>(?:(?!</label>).)*<input id="([^"]+)"', html, re.S)
    )
    for name in re.findall(r'<(?:input|textarea) id="([^"]+)"', html):
        assert name in labelled, name
    used = {name for path in PAGE.glob("*.js") for name in re.findall(r'\$\("([\w-]+)"\)', path.read_text())}
    assert used - set(re.findall(r'id="([^"]+)"', html)) == {"device-memory-of-webassembly"}
