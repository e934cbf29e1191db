"""The extras `ray` and `mlflow`, each installed beside what is installed here, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.environments import environment

pytestmark = pytest.mark.interop
ROOT = Path(__file__).resolve().parents[2]

PUBLISH = """
import json, sys
from pathlib import Path
import mlflow
from moec.compiler.build.publish import publish
directory, store = Path(sys.argv[1]), sys.argv[2]
versions = [publish(directory, "mlflow", store, "olmoe")["version"] for _ in range(2)]
client = mlflow.MlflowClient(store, store)
found = client.get_model_version("olmoe", "2")
files = sorted(Path(found.source.removeprefix("file://")).iterdir())
print(json.dumps({"versions": versions, "tags": dict(found.tags), "files": [path.name for path in files]}))
"""

ALIASES = """
import json, sys
from moec.compiler.build.publish import registry_at
place = registry_at(sys.argv[1])
for version in ("1", "2"):
    place.promote("olmoe", version, "prod", note="", allow_failed=False)
before = dict(place.describe("olmoe")["aliases"])
event = place.rollback("olmoe", "prod", note="slower")
found = place.describe("olmoe")
print(json.dumps({"before": before, "after": found["aliases"], "names": place.names(),
                  "actions": [event["action"] for event in found["history"]], "replaced": event.replaced}))
"""

TRACK = """
import json, sys
from pathlib import Path
import mlflow
from moec.compiler.search import tracking
from tests.compiler.search.test_tracking import FRONT
directory, store = Path(sys.argv[1]), sys.argv[2]
tracking.check(store)
run = tracking.log(directory, FRONT, store)["run"]
client = mlflow.MlflowClient(store, store)
found = client.get_run(run)
print(json.dumps({
    "status": found.info.status,
    "seed": found.data.params["seed"],
    "volumes": [metric.value for metric in client.get_metric_history(run, "hypervolume")],
    "files": sorted(item.path for item in client.list_artifacts(run)),
}))
"""

SEARCH = """
import json, sys, threading, time
from pathlib import Path
import psutil
from moec.compiler.search.session import open_search, run_search
from moec.compiler.search.settings import make_settings

def kill_one(file):
    \"\"\"As soon as something has been measured.\"\"\"
    while not list(file.parent.glob(file.name)):
        time.sleep(0.01)
    workers = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [""])[0].startswith("ray::_Actor")]
    workers[0].kill()
    killed.append(workers[0].pid)

fields = json.loads(sys.argv[1])
folder, executor, killed = Path(sys.argv[2]), sys.argv[3], []
if executor == "ray":
    threading.Thread(target=kill_one, args=(folder / "evaluations-*.jsonl",), daemon=True).start()
found = open_search(make_settings(fields), folder, lambda *_: None)
done = run_search(found, folder, executor=executor, jobs=int(sys.argv[4]), store=None, progress=lambda *_: None)
archive = done.search.archive
front = [[*item.genome] for item in archive.front]
print(json.dumps({"front": front, "lost": done.lost, "individuals": len(done.search.seen), "killed": len(killed),
                  "measured": len(archive.found)}))
"""


def beside(extra: str) -> Path:
    """The python of an environment that sees what is installed here and has an extra too."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return environment(f"beside-{extra}", extras[extra], beside=True)


def run(python: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    found = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / ".links"), os.environ.get("PYTHONPATH", "")])}
    command = [str(python), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**found, **environment})


def test_a_matrix_on_a_local_ray(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(f"models: [{tiny_checkpoint('olmoe')}]\ntargets: {{bad: nothing, good: onnx}}\n")
    places = ("-o", tmp_path / "out", "--cache", tmp_path / "cache", "--executor", "ray", "--json", "-q")
    program = "from moec.cli import main; main()"
    for status in ("built", "cached"):
        done = run(beside("ray"), "-c", program, "build", tmp_path / "m.yaml", *places)
        cells = json.loads(done.stdout)["cells"]
        assert [cell["status"] for cell in cells] == ["failed", status], done.stderr
        assert done.returncode == 2
    assert (tmp_path / "out" / f"{tiny_checkpoint('olmoe').name}-good" / "model.onnx").is_file()


def test_a_search_on_a_local_ray_survives_a_worker_that_is_killed(golden_model: Path, tmp_path: Path) -> None:
    fields = {
        "checkpoint": str(golden_model),
        "target": "onnx",
        "objectives": "perplexity,expert-flops",
        "windows": 4,
        "window": 32,
        "population": 32,
        "generations": 3,
    }
    answers = []
    for executor in ("local", "ray"):
        done = run(
            beside("ray"),
            "-c",
            SEARCH,
            json.dumps(fields),
            tmp_path / executor,
            executor,
            "2" if executor == "ray" else "1",
        )
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout.splitlines()[-1]))
    here, there = answers
    assert (here["killed"], there["killed"]) == (0, 1)
    assert there["lost"] == 0
    assert there["front"] == here["front"]
    assert len(there["front"]) > 2


def test_versions_in_mlflow(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    import moec

    moec.export(str(tiny_checkpoint("olmoe")), target="onnx", output=tmp_path / "out")
    store = f"file://{tmp_path / 'store'}"
    # The client alone has no database; a server would.
    done = run(beside("mlflow"), "-c", PUBLISH, tmp_path / "out", store, MLFLOW_ALLOW_FILE_STORE="true")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["versions"] == ["1", "2"]
    assert {"moec.json", "model.onnx", "report.json"} <= set(found["files"])
    assert found["tags"]["moec.gate.parity_artifact"] == "pass"
    assert found["tags"]["moec.digest"] == json.loads((tmp_path / "out" / "moec.json").read_text())["digest"]
    done = run(beside("mlflow"), "-c", ALIASES, store, MLFLOW_ALLOW_FILE_STORE="true")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["before"], found["after"], found["replaced"]) == ({"prod": "2"}, {"prod": "1"}, "2")
    assert (found["actions"], found["names"]) == (["promote", "promote", "rollback"], ["olmoe"])


def test_a_search_in_mlflow(tmp_path: Path) -> None:
    (tmp_path / "search" / "front").mkdir(parents=True)
    for name in ("front.json", "report.html", "search.json", "front/00.yaml"):
        (tmp_path / "search" / name).write_text("{}")
    store = f"file://{tmp_path / 'store'}"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    places = {"MLFLOW_ALLOW_FILE_STORE": "true", "PYTHONPATH": os.pathsep.join([str(ROOT / ".links"), path])}
    done = run(beside("mlflow"), "-c", TRACK, tmp_path / "search", store, **places)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["status"], found["seed"]) == ("FINISHED", "0")
    assert found["volumes"] == [0.0, 0.1, 0.2]
    assert found["files"] == ["front", "front.json", "report.html", "search.json"]
