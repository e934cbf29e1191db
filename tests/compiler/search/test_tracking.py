"""A search as a run of MLflow, with a stand-in of its client; `tests/interop/test_extras.py` has the real one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moec import cli
from moec.compiler.build import mlflow_server
from moec.compiler.search import tracking
from moec.compiler.search.front_file import Front
from tests.support.mlflow_stand_in import stand_in

LONG = "x" * 900
URI = "http://127.0.0.1:1"
HELD = {"perplexity": {"value": 0.01, "low": 0.0, "high": 0.02}, "values": {"size": 5.0, "perplexity": 0.01}}
MEMBER: dict[str, Any] = {
    "name": "00",
    "recipe": "front/00.yaml",
    "command": "",
    "values": {},
    "predicted": None,
    "generation": 0,
    "layers": [],
    "formats": {},
    "held_out": HELD,
}
FRONT = Front.model_validate(
    {
        "moec": "0.1.0",
        "settings": {"checkpoint": "/models/tiny", "limits": {"size": 3.0}, "seed": 0, "text": None, "held_out": LONG},
        "source": {},
        "texts": {},
        "objectives": ["perplexity", "size"],
        "worst": {},
        "hypervolume": {"search": 0.3, "held_out": 0.25},
        "individuals": 9,
        "measured": 4,
        "given_up": 0,
        "lost": 0,
        "single_choices": 2,
        "seconds": 7.0,
        "members": [MEMBER, {**MEMBER, "held_out": {**HELD, "values": {"size": 3.0, "perplexity": 0.02}}}],
        "not_told_apart": [],
        "surrogate": {"rank_correlation": None, "individuals": 0, "misleads": False, "predicted": [], "measured": []},
        "generations": [
            {"number": number, "individuals": 5 + number, "measured": 2, "volume": 0.1 * number, "front": 1}
            for number in range(3)
        ],
    }
)


class Client:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.parameters: dict[str, str] = {}
        self.metrics: list[tuple[str, float, int]] = []
        self.files: list[tuple[str, str]] = []
        self.ended = self.asked = False

    def search_experiments(self, max_results: int) -> list[Any]:
        self.asked = max_results == 1
        return []

    def get_experiment_by_name(self, name: str) -> Any:
        assert name == "tiny"

    def create_experiment(self, name: str) -> str:
        assert name == "tiny"
        return "7"

    def create_run(self, experiment: str, tags: dict[str, str]) -> Any:
        assert (experiment, tags) == ("7", {"moec": "search"})
        return SimpleNamespace(info=SimpleNamespace(run_id="run"))

    def log_param(self, _run: str, key: str, value: str) -> None:
        self.parameters[key] = value

    def log_metric(self, _run: str, key: str, value: float, step: int) -> None:
        self.metrics.append((key, value, step))

    def log_artifact(self, _run: str, path: str) -> None:
        self.files.append((Path(path).name, ""))

    def log_artifacts(self, _run: str, path: str, place: str) -> None:
        self.files += [(file.name, place) for file in sorted(Path(path).iterdir())]

    def set_terminated(self, _run: str) -> None:
        self.ended = True


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    found = Client()
    stand_in(found, monkeypatch)
    return found


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    (tmp_path / "front").mkdir()
    for name in ("front.json", "report.html", "search.json", "front/00.yaml", "front/01.yaml"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_a_run_has_settings_progress_results_and_the_front(client: Client, finished: Path) -> None:
    assert tracking.log(finished, FRONT, URI) == {"experiment": "tiny", "run": "run"}
    assert client.parameters == {
        "checkpoint": "/models/tiny",
        "limits.size": "3.0",
        "seed": "0",
        "held_out": "x" * 500,
        "moec": "0.1.0",
    }
    progress = [(value, step) for key, value, step in client.metrics if key == "hypervolume"]
    assert progress == [(0, 0), (0.1, 1), (0.2, 2)]
    results = {key: value for key, value, step in client.metrics if step == 2}
    assert (results["hypervolume.held_out"], results["least.size"], results["least.perplexity"]) == (0.25, 3.0, 0.01)
    assert "surrogate.rank_correlation" not in results
    assert client.files == [
        ("front.json", ""),
        ("report.html", ""),
        ("search.json", ""),
        ("00.yaml", "front"),
        ("01.yaml", "front"),
    ]
    assert client.ended


def test_a_server_that_is_not_there_is_said_before_the_search(
    client: Client,
    golden_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(**_: Any) -> None:
        raise OSError("connection refused")

    monkeypatch.setattr(client, "search_experiments", refuse)
    command = ["search", str(golden_model), "-t", "onnx", "-o", str(tmp_path / "s"), "--mlflow", URI]
    assert cli.dispatch(command) == 11
    assert "MLflow refuses: connection refused" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    monkeypatch.setattr(mlflow_server.importlib.util, "find_spec", lambda _: None)
    assert cli.dispatch([*command, "--json"]) == 8
    assert json.loads(capsys.readouterr().out)["error"]["hint"] == "pip install 'moec[mlflow]'"


def test_a_finished_search_that_cannot_be_logged_can_be_logged_later(
    client: Client, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moec.compiler.commands import search

    def refuse(*_: Any) -> None:
        raise RuntimeError("no space")

    monkeypatch.setattr(search, "_resumed", lambda *_: (finished, None))
    monkeypatch.setattr(search, "_run", lambda *_, **__: FRONT)
    assert cli.dispatch(["search", str(finished), "--resume", "--mlflow", URI]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "MLflow: run run of experiment tiny"
    monkeypatch.setattr(client, "log_param", refuse)
    assert cli.dispatch(["search", str(finished), "--resume", "--mlflow", URI]) == 11
    said = " ".join(capsys.readouterr().err.split())
    assert "the search is finished, but not logged" in said
    assert f"moec search {finished} --resume --mlflow {URI}" in said
