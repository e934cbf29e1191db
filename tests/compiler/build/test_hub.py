"""Publishing to the Hugging Face Hub: huggingface_hub's own client against a stand-in of the Hub's HTTP API."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from moec import cli
from moec.compiler.common.artifact import verify
from moec.compiler.common.verdict import Status, Verdict
from tests.compiler.build.test_publish import FAILED, PASSED, artifact

FIGURES = {"increase": 0.0123}
MEASURED = (PASSED, Verdict("quality", Status.PASS, "within 2 %", 7, FIGURES))


class Hub(ThreadingHTTPServer):
    """What a client may see of repositories: their files, tags and visibility."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tags: dict[str, list[str]] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_arguments: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        _, _, _, owner, name, *rest = self.path.partition("?")[0].split("/")
        repo = f"{owner}/{name}"
        if rest == ["refs"]:
            tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": "c"} for tag in self.server.tags[repo]]
            self.answer({"branches": [], "converts": [], "tags": tags})
        elif rest[:1] == ["tree"]:
            files = self.server.files[repo]
            self.answer([{"type": "file", "path": path, "size": len(text), "oid": "0"} for path, text in files.items()])
        else:
            self.answer({"error": self.path}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.create(json.loads(body))
            return
        if self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
            return
        _, _, _, owner, name, *rest = self.path.split("/")
        repo = f"{owner}/{name}"
        if rest[0] == "preupload":
            asked = json.loads(body)["files"]
            found = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked]
            self.answer({"files": found})
        elif rest[0] == "commit":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[repo][value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "deletedFile":
                    del self.server.files[repo][value["path"]]
            self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/abc123", "commitOid": "abc123"})
        else:
            self.server.tags[repo].append(json.loads(body)["tag"])
            self.answer({})

    def create(self, asked: dict[str, Any]) -> None:
        if self.headers["Authorization"] != "Bearer mine":
            self.answer({"error": "Invalid username or password."}, 401)
            return
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.server.files:
            self.answer({"error": "exists", "url": f"{self.server.url}/{repo}"}, 409)
            return
        self.server.files[repo] = {".gitattributes": b"*.bin filter=lfs"}
        # huggingface_hub 2 sends the visibility, release 1 whether it is private.
        self.server.private[repo] = asked.get("visibility") == "private" or asked.get("private") is True
        self.server.tags[repo] = []
        self.answer({"url": f"{self.server.url}/{repo}"})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", "mine")
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def publish(place: Path, hub: Hub | None, *flags: str, name: str = "me/tiny") -> int:
    registry = ("--registry", hub.url) if hub else ()
    return cli.dispatch(["publish", str(place), "--to", "hub", "--name", name, *registry, *flags])


def metadata_of(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_a_repository_is_the_artifact_with_a_card(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = artifact(tmp_path / "out", *MEASURED)
    (place / "README.md").write_text("of the artifact")
    (tmp_path / "secret").write_text("mine")
    (place / "link").symlink_to(tmp_path / "secret")
    assert publish(place, hub, "--as", "v1", "--base-model", "allenai/OLMoE-1B-7B-0924", "--license", "apache-2.0") == 0
    assert capsys.readouterr().out == f"me/tiny v1: {hub.url}/me/tiny/commit/abc123\n"
    files = hub.files["me/tiny"]
    assert files.keys() == {
        ".gitattributes", "README.md", "model.bin", "moec.json", "report.html", "report.json", "report.xml",
    }  # fmt: skip
    assert hub.private == {"me/tiny": True}
    assert hub.tags == {"me/tiny": ["v1"]}
    card = files["README.md"].decode()
    assert metadata_of(card) == {
        "license": "apache-2.0",
        "base_model": "allenai/OLMoE-1B-7B-0924",
        "pipeline_tag": "text-generation",
        "library_name": "moec",
        "tags": ["moec", "mixture-of-experts", "fake"],
    }
    assert "| perplexity | +1.23% against the source model |" in card
    assert "| quality | pass | within 2 % |" in card
    assert "hf download me/tiny --local-dir model\n" in card
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for name, text in files.items():
        (downloaded / name).write_bytes(text)
    assert verify(downloaded) == verify(place)


def test_a_new_version_replaces_the_files_of_the_old_one(hub: Hub, tmp_path: Path) -> None:
    first = artifact(tmp_path / "a")
    (first / "old.txt").write_text("old")
    assert publish(first, hub, "--as", "v1", "--public") == 0
    assert hub.private == {"me/tiny": False}
    assert "old.txt" in hub.files["me/tiny"]
    assert publish(artifact(tmp_path / "b", weights="other"), hub) == 0
    assert hub.files["me/tiny"]["model.bin"] == b"other"
    assert "old.txt" not in hub.files["me/tiny"]
    assert ".gitattributes" in hub.files["me/tiny"]
    assert hub.tags == {"me/tiny": ["v1"]}


def test_what_the_hub_refuses_is_said(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = artifact(tmp_path / "out")
    assert publish(place, hub, "--as", "v1") == 0
    assert publish(place, hub, "--as", "v1") == 11
    assert "me/tiny: version v1 exists already" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "another")
    assert publish(place, hub) == 11
    said = capsys.readouterr().err
    assert f"{hub.url}: me/tiny: " in said
    assert "HF_TOKEN" in said
    assert publish(place, hub, name="me/ti--ny") == 2
    hub.shutdown()
    hub.server_close()
    assert publish(place, hub) == 11


@pytest.mark.parametrize("name", ["tiny", "me/tiny/v1", "/tiny", "me/..", "me:x/tiny"])
def test_names_that_are_no_repository(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(artifact(tmp_path / "out"), None, "--dry-run", name=name) == 2
    assert "--name: " in capsys.readouterr().err


def test_a_dry_run_lists_the_files_and_shows_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", None)  # nobody may ask the Hub
    place = artifact(tmp_path / "out", *MEASURED)
    assert publish(place, None, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "model.bin" in said
    assert "---\npipeline_tag: text-generation\n" in said
    assert publish(place, None, "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"]["model.bin"] == len("weights")
    assert found["card"] in said
    assert (found["ok"], "location" in found) == (True, False)
    failed = artifact(tmp_path / "failed", replace(FAILED))
    assert publish(failed, None, "--dry-run") == 9


def test_a_dry_run_of_a_directory_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = artifact(tmp_path / "out")
    flags = ["publish", str(place), "--to", "dir", "--name", "m"]
    assert cli.dispatch([*flags, "--registry", str(tmp_path / "registry"), "--dry-run"]) == 0
    assert "model.bin" in capsys.readouterr().out
    assert not (tmp_path / "registry").exists()
    assert cli.dispatch(flags) == 2
    assert "--registry is missing" in capsys.readouterr().err
    assert cli.dispatch([*flags, "--registry", str(tmp_path), "--license", "mit"]) == 2
    assert "for --to hub" in capsys.readouterr().err
