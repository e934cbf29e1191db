"""Matrices of builds: cells, cache, failures, executors, and what survives a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml

from moec import cli
from moec.compiler.build import batch, executors, worker
from moec.compiler.build.cache import Cache
from moec.compiler.build.matrix import Cell, read_matrix
from moec.compiler.build.worker import Outcome, Task
from moec.compiler.common.artifact import read_manifest, verify, write_manifest
from moec.compiler.common.errors import MissingExtraError, UsageError
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.frontend.source import Digests
from moec.compiler.ir.program import Program
from moec.compiler.pipeline import captures
from moec.compiler.pipeline import export as pipeline
from moec.compiler.pipeline.recipe import make_recipe, read_recipe

Tiny = Callable[[str], Path]
PASSED = (Verdict("parity: artifact", Status.PASS, "equal", 5),)


def matrix(path: Path, text: str) -> tuple[Cell, ...]:
    (path / "m.yaml").write_text(text)
    return read_matrix(path / "m.yaml")


def test_cells_are_the_product_of_the_axes(tmp_path: Path) -> None:
    cells = matrix(
        tmp_path,
        """
models: [./a, hub/b]
targets: [onnx, {target: tflite, options: {context: 64}}]
quantize: {wide: none, narrow: {format: int4, calibration: texts}}
routing: [off, {policy: top-p, budget: 0.7}]
common: {dtype: fp16}
""",
    )
    assert len(cells) == 16
    by_name = {cell.name: cell.fields for cell in cells}
    assert by_name["a-onnx-wide-off"] == {
        "dtype": "fp16",
        "checkpoint": str(tmp_path / "a"),
        "target": "onnx",
        "quantize": None,
        "routing": None,
    }
    last = by_name["b-tflite-64-narrow-top-p-0.7"]
    assert last["quantize"] == {"format": "int4", "calibration": str(tmp_path / "texts")}
    assert last["routing"] == {"policy": "top-p", "budget": 0.7}
    for fields in by_name.values():
        make_recipe(fields)


def test_an_axis_of_one_value_is_no_part_of_the_name(tmp_path: Path) -> None:
    assert [cell.name for cell in matrix(tmp_path, "models: [x/y]\ntargets: [onnx]\nquantize: [int8]\n")] == ["y-onnx"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("models: [a]\n", "no targets"),
        ("models: [a]\ntarget: [onnx]\n", "unknown key 'target'"),
        ("models: a\ntargets: [onnx]\n", "a list or a mapping"),
        ("models: [a, x/a]\ntargets: [onnx]\n", "two cells have the name a-onnx"),
        ("models: [a]\ntargets: [onnx]\ncommon: {dtyp: fp16}\n", "unknown recipe key 'dtyp'"),
        ("[", "cannot be read as YAML"),
        ("3", "a mapping of keys"),
    ],
)
def test_what_is_wrong_with_a_matrix_is_said(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        matrix(tmp_path, text)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[str]:
    """Build in this process, without gates that pass nothing of a fake target; collects the cells that were built."""
    request.getfixturevalue("fake_target")
    names: list[str] = []

    capture_of = request.getfixturevalue("capture_of")

    def captured_once(checkpoint: Checkpoint, *, dtype: torch.dtype) -> Program:
        program: Program = capture_of(checkpoint.directory, dtype)
        return program

    def inline(tasks: Sequence[Task], _jobs: int) -> Iterator[Outcome]:
        for task in tasks:
            names.append(task.name)
            yield worker.build(task)

    monkeypatch.setitem(executors.EXECUTORS, "process", inline)  # type: ignore[arg-type]
    monkeypatch.setattr(pipeline, "prove", lambda *_: PASSED)
    monkeypatch.setattr(captures, "capture", captured_once)
    return names


def cells_of(checkpoint: Path, *more: dict[str, Any]) -> tuple[Cell, ...]:
    fields = {"checkpoint": str(checkpoint), "target": "fake"}
    return tuple(Cell(f"cell-{number}", {**fields, **part}) for number, part in enumerate(({}, *more)))


def run(cells: Sequence[Cell], tmp_path: Path) -> dict[str, Outcome]:
    return {found.name: found for found in batch.build_matrix(cells, tmp_path / "out", cache=tmp_path / "cache")}


def test_a_bad_cell_fails_alone_and_the_rest_is_cached(tiny_checkpoint: Tiny, tmp_path: Path, built: list[str]) -> None:
    cells = cells_of(
        tiny_checkpoint("olmoe"),
        {"options": {"block_size": 8}},
        {"options": {"fault": "refuse"}},
        {"options": {"fault": "crash"}},
        {"dtype": "fp64"},
        {"checkpoint": str(tmp_path / "nowhere")},
    )
    first = run(cells, tmp_path)
    assert [found.status for found in first.values()] == ["built", "built", "failed", "failed", "failed", "failed"]
    assert [found.exit_code for found in first.values()] == [0, 0, 4, 70, 2, 10]
    assert "it was told to" in first["cell-2"].summary
    assert "a fault that nobody foresaw" in first["cell-3"].summary
    assert batch.exit_code(list(first.values())) == 1
    assert batch.exit_code([first["cell-0"], first["cell-2"]]) == 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "cell-0", "cell-1", "summary.html", "summary.json", "summary.xml",
    ]  # fmt: skip
    suites = {
        suite.get("name"): suite for suite in ElementTree.parse(tmp_path / "out" / "summary.xml").iter("testsuite")
    }
    assert list(suites) == ["cell-0", "cell-1", "cell-2", "cell-3", "cell-4", "cell-5"]
    assert [case.get("name") for case in suites["cell-0"]] == ["parity: artifact"]
    refused = suites["cell-2"].find("testcase/error")
    assert refused is not None
    assert refused.get("message") == first["cell-2"].summary
    page = (tmp_path / "out" / "summary.html").read_text()
    assert "2 built, 4 failed" in page
    assert '<a href="cell-1/report.html">cell-1</a>' in page
    assert "cell-2/report.html" not in page
    assert page.count("it was told to") == 1
    built.clear()
    second = run(cells, tmp_path)
    assert [found.status for found in second.values()][:2] == ["cached", "cached"]
    assert built == ["cell-2", "cell-3", "cell-4", "cell-5"]
    assert all(second[name].seconds < 1 for name in ("cell-0", "cell-1"))
    assert second["cell-0"].verdicts == {"parity: artifact": "pass"}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [cell["status"] for cell in summary["cells"]] == [found.status for found in second.values()]
    assert (summary["missing"], summary["exit_code"]) == ([], 1)


def test_the_cache_fills_another_output(tiny_checkpoint: Tiny, tmp_path: Path, built: list[str]) -> None:
    cells = cells_of(tiny_checkpoint("olmoe"))
    run(cells, tmp_path)
    first, second = tmp_path / "out" / "cell-0", tmp_path / "other" / "cell-0"
    (found,) = batch.build_matrix(cells, tmp_path / "other", cache=tmp_path / "cache")
    assert found.status == "cached"
    assert verify(second) == verify(first)
    assert (second / "model.bin").stat().st_ino == (first / "model.bin").stat().st_ino
    assert (second / "report.json").stat().st_ino != (first / "report.json").stat().st_ino
    # A report that is written anew concerns one of them alone.
    (second / "report.json").write_text("{}")
    assert batch.build_matrix(cells, tmp_path / "out", cache=tmp_path / "cache")[0].status == "cached"
    assert built == ["cell-0"]


def test_an_entry_that_was_changed_is_built_again(tiny_checkpoint: Tiny, tmp_path: Path, built: list[str]) -> None:
    cells = cells_of(tiny_checkpoint("olmoe"))
    run(cells, tmp_path)
    with (tmp_path / "out" / "cell-0" / "model.bin").open("r+b") as file:
        file.write(b"changed")
    assert run(cells, tmp_path)["cell-0"].status == "built"
    verify(tmp_path / "out" / "cell-0")
    assert run(cells, tmp_path)["cell-0"].status == "cached"
    assert built == ["cell-0", "cell-0"]


def test_what_fails_a_gate_is_kept_for_examination_and_not_cached(
    tiny_checkpoint: Tiny, tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "prove", lambda *_: (Verdict("latency", Status.FAIL, "too slow", 6),))
    cells = cells_of(tiny_checkpoint("olmoe"))
    for _ in range(2):
        found = run(cells, tmp_path)["cell-0"]
        assert (found.status, found.exit_code, found.summary) == ("failed", 6, "latency: too slow")
    assert read_manifest(tmp_path / "out" / "cell-0")
    assert len(built) == 2


def test_an_artifact_of_an_earlier_matrix_does_not_stand_for_a_failure(
    tiny_checkpoint: Tiny, tmp_path: Path, built: list[str]
) -> None:
    run(cells_of(tiny_checkpoint("olmoe")), tmp_path)
    broken = [Cell("cell-0", {"checkpoint": "x", "target": "fake", "options": {"fault": "refuse"}})]
    assert run(broken, tmp_path)["cell-0"].status == "failed"
    assert not (tmp_path / "out" / "cell-0").exists()
    assert built


def test_the_key_follows_what_decides_the_artifact(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint("olmoe"), copy)
    fields = {"checkpoint": str(tiny_checkpoint("olmoe")), "target": "onnx"}
    text = tmp_path / "text.txt"
    text.write_text("one")
    cache = Cache(tmp_path / "cache")

    def key(**more: Any) -> str:
        return cache.key(make_recipe({**fields, **more}))

    same = key()
    assert key(checkpoint=str(copy)) == same
    assert key(dtype="fp16") != same
    quantized = key(quantize={"format": "int4", "calibration": str(text)})
    text.write_text("two")
    assert key(quantize={"format": "int4", "calibration": str(text)}) != quantized
    (copy / "tokenizer.json").write_text("{}")
    assert key(checkpoint=str(copy)) != same
    baseline = tmp_path / "baseline"
    baseline.mkdir()
    keys = set()
    for content in ("one", "two"):
        write_manifest(baseline, {"recipe": {"target": content}})
        keys.add(key(latency={"baseline": str(baseline)}))
    assert len(keys) == 2
    assert same not in keys


def test_paths_of_a_matrix_are_relative_to_its_file(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(
        "models: [./m]\ntargets: [onnx]\ncommon: {latency: {baseline: last/}, quality: {text: t.txt}}\n"
        "quantize: [{format: int4, calibration: c.txt}]\n"
    )
    fields = read_matrix(path)[0].fields
    assert fields["latency"]["baseline"] == str(tmp_path / "last")
    assert fields["quality"]["text"] == str(tmp_path / "t.txt")
    assert fields["quantize"]["calibration"] == str(tmp_path / "c.txt")
    (tmp_path / "r.yaml").write_text("checkpoint: ./m\ntarget: onnx\nlatency: {baseline: last/}\n")
    assert read_recipe(tmp_path / "r.yaml")["latency"] == fields["latency"]


def test_a_matrix_of_too_many_cells(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    axis = "[" + ", ".join(str(index) for index in range(300)) + "]"
    path.write_text(f"models: {axis}\ntargets: {axis}\nrouting: {axis}\n")
    with pytest.raises(UsageError, match="27000000 cells"):
        read_matrix(path)


def test_digests_are_remembered_and_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path, memory = tmp_path / "x.json", tmp_path / "memory" / "digests.json"
    path.write_text("{}")
    digests = Digests(memory)
    first = digests.of(path)
    digests.save()
    known = json.loads(memory.read_text())
    known[str(path)][1] = "remembered"
    memory.write_text(json.dumps(known))
    assert list(Digests(memory).of(path).values()) == ["remembered"]
    path.write_text("[ ]")
    assert Digests(memory).of(path) != first
    assert "remembered" not in Digests(memory).of(path).values()


def environment(fake_target: dict[str, str]) -> dict[str, str]:
    return {**fake_target, "OMP_NUM_THREADS": "1"}


def test_a_kill_leaves_no_process_and_loses_no_cell(
    tiny_checkpoint: Tiny, tmp_path: Path, fake_target: dict[str, str]
) -> None:
    """Real processes: one cell is done, the second pauses in its middle when the command is killed."""
    import psutil

    (tmp_path / "m.yaml").write_text(
        f"models: [{tiny_checkpoint('olmoe')}]\n"
        "targets: {bad: nothing, slow: {target: fake, options: {delay: 600}}}\n"
    )
    command = [sys.executable, "-c", "from moec.cli import main; main()", "build", str(tmp_path / "m.yaml")]
    places = ["-o", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "-j", "1", "--json"]
    with subprocess.Popen([*command, *places], env=environment(fake_target), stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 200
            while not (tmp_path / "out" / "in-the-middle").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            children = psutil.Process(process.pid).children()
        finally:
            os.kill(process.pid, signal.SIGKILL)
    assert len(children) == 1
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [cell["status"] for cell in summary["cells"]] == ["failed"]
    assert "unknown target 'nothing'" in summary["cells"][0]["summary"]
    assert len(summary["missing"]) == 1


def test_a_process_that_dies_is_a_failed_cell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(executors.sys, "executable", "/bin/false")
    (found,) = executors.in_processes([Task("a", {}, str(tmp_path / "a"), str(tmp_path / "c"))], 1)
    assert (found.status, found.exit_code) == ("failed", 70)
    assert "its process died (exit code 1)" in found.summary


def test_ray_is_an_extra_and_unknown_executors_have_a_near_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError) as missing:
        list(executors.on_ray([], 1))
    assert missing.value.hint == "pip install 'moec[ray]'"
    with pytest.raises(UsageError) as unknown:
        batch.build_matrix([], tmp_path, cache=tmp_path, executor="rya")
    assert "did you mean 'ray'" in unknown.value.hint


def test_build_shows_a_table_and_ends_with_the_code_of_the_failure(
    tiny_checkpoint: Tiny, tmp_path: Path, built: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.yaml").write_text(
        f"models: [{tiny_checkpoint('olmoe')}]\ntargets: {{good: fake, bad: {{target: fake, dtype: fp64}}}}\n"
    )
    command = ["build", str(tmp_path / "m.yaml"), "-o", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert cli.dispatch(command) == 2
    shown = capsys.readouterr()
    assert "1 built, 0 cached, 1 failed" in shown.out
    assert "cells" in shown.err
    assert cli.dispatch([*command, "--json", "-q"]) == 2
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [cell["status"] for cell in cells] == ["cached", "failed"]
    assert built


def test_the_examples_for_pipelines_name_commands_and_recipes_that_exist() -> None:
    folder = Path(__file__).resolve().parents[3] / "examples" / "ci"
    cells = read_matrix(folder / "matrix.yaml")
    assert len(cells) == 4
    for cell in cells:
        make_recipe(cell.fields)
    application = cli._application([])
    known = {command.name for command in (*application.registered_commands, *application.registered_groups)}
    for path in folder.glob("*.yml"):
        # moec is installed from its repository or a wheel, not from an index.
        assert re.findall(r"pip install .*?(\S+)\n", path.read_text()) == ['"$MOEC"']
        assert re.search(r"MOEC: moec\[\w+\] @ git\+https://", path.read_text())
    for path in (folder / "github-actions.yml", folder / "gitlab-ci.yml"):
        text = path.read_text()
        assert isinstance(yaml.safe_load(text), dict)
        used = set(re.findall(r"\bmoec (\w+) ?[\"\-\n]", text))
        assert {"build", "diff", "doctor"} <= used <= known
