"""Whole searches of a tiny model: they repeat themselves, go on after a kill, and survive their workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moec.compiler.common.errors import UsageError
from moec.compiler.search import workers
from moec.compiler.search.evaluation import Evaluator
from moec.compiler.search.front_file import read_front
from moec.compiler.search.report import to_html
from moec.compiler.search.session import Finished, _formats, open_search
from moec.compiler.search.truth import conclude
from moec.compiler.search.workers import Task, in_processes
from moec.quantize.formats import parse_format
from moec.quantize.planning.sensitivity import size_of
from moec.targets import get_target

Search = Callable[..., tuple[Any, Any, Finished]]


def front_of(finished: Finished) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    archive = finished.search.archive
    return [(item.genome, archive.row(item.values)) for item in archive.front]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What several tests compare with; filled by the first."""
    return {"directory": tmp_path_factory.mktemp("whole")}


@pytest.fixture
def reference(whole: dict[str, Any], search: Search) -> dict[str, Any]:
    if "finished" not in whole:
        whole["settings"], whole["found"], whole["finished"] = search(whole["directory"])
    return whole


def test_the_front_is_measured_and_grows(reference: dict[str, Any]) -> None:
    finished = reference["finished"]
    search = finished.search
    volumes = [generation.volume for generation in search.generations]
    assert volumes == sorted(volumes)
    assert len(volumes) == 4
    assert len(search.archive.found) <= 0.6 * len(search.seen)
    initial = [item for item in search.archive.found.values() if item.generation == 0]
    assert len(initial) <= 8
    assert all(item.complete for item in search.archive.front)
    assert any(item.predicted for item in search.archive.found.values())


def test_a_seed_decides_all(reference: dict[str, Any], search: Search, tmp_path: Path) -> None:
    again = search(tmp_path / "same")[2]
    assert front_of(again) == front_of(reference["finished"])
    assert list(again.search.seen) == list(reference["finished"].search.seen)
    other = search(tmp_path / "other", seed=1)[2]
    assert list(other.search.seen) != list(reference["finished"].search.seen)


@pytest.mark.parametrize("share", [0.1, 0.45, 0.9])
def test_it_goes_on_where_it_was_killed(
    reference: dict[str, Any], search: Search, tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = reference["directory"].glob("evaluations-*.jsonl")
    content = file.read_bytes()
    left = content[: int(share * len(content))]
    (tmp_path / file.name).write_bytes(left)
    asked: list[int] = []
    evaluate = Evaluator.evaluate
    monkeypatch.setattr(Evaluator, "evaluate", lambda *given: asked.append(1) or evaluate(*given))
    again = search(tmp_path)[2]
    assert front_of(again) == front_of(reference["finished"])
    assert (tmp_path / file.name).read_bytes() == content
    assert len(asked) == content.count(b"\n") - left.count(b"\n")


def test_searches_share_what_they_measured(
    reference: dict[str, Any], search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("it was measured before")

    monkeypatch.setattr(Evaluator, "evaluate", never)
    again = search(tmp_path, store=reference["directory"])[2]
    assert front_of(again) == front_of(reference["finished"])


def test_processes_find_the_same_and_survive_one_that_is_killed(
    reference: dict[str, Any], search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    ask = workers._Process.ask

    def dying(process: workers._Process, task: Task) -> Any:
        if not killed and task.sections:
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)
        return ask(process, task)

    monkeypatch.setattr(workers._Process, "ask", dying)
    again = search(tmp_path, jobs=2)[2]
    assert killed
    assert again.lost == 0
    assert [genome for genome, _ in front_of(again)] == [genome for genome, _ in front_of(reference["finished"])]


def test_what_kills_every_worker_is_given_up_alone(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = workers._Process.ask
    fatal = {"routing": {"removed": [[0], [0]]}}

    def dying(process: workers._Process, task: Task) -> Any:
        if task.sections == fatal:
            os.kill(process.pid, signal.SIGKILL)
        return ask(process, task)

    monkeypatch.setattr(workers._Process, "ask", dying)
    tasks = [Task({}, 0, 4), Task(fatal, 0, 4), Task({}, 4, 8)]
    with in_processes(evaluator, 1) as run:
        found = dict(run(tasks))
    assert found[1] is None
    assert found[0] is not None
    assert found[2] is not None
    assert found[0].losses == pytest.approx(evaluator.evaluate({}, 0, 4).losses)


def test_three_objectives_with_formats_are_concluded(search: Search, tmp_path: Path) -> None:
    settings, found, finished = search(tmp_path, objectives="perplexity,expert-flops,size", generations=1, members=1)
    assert {gene.kind for gene in found.space.genes} == {"rule", "level", "prune", "format"}
    front = conclude(found, finished, tmp_path, executor="local", jobs=1, progress=lambda *_: None)
    assert read_front(tmp_path) == front
    assert len(front.members) == len(list((tmp_path / "front").glob("*.yaml")))
    built = [member for member in front.members if member.artifact]
    assert len(built) == 1
    assert built[0].artifact is not None
    assert built[0].artifact.held_out is not None
    # The interpreter and the runtime read the same text; the codes of a recipe are calibrated anew when it is built.
    error = built[0].artifact.held_out.perplexity.value - built[0].held_out.perplexity.value
    assert abs(error) < 0.05
    page = to_html(front)
    for member in front.members:
        assert f'id="member-{member.name}"' in page
        assert f'href="#member-{member.name}"' in page
    assert page.count("in the pretrained model (before) and in this recipe (after)") == len(front.members)
    for member in front.members:
        for layer, before in zip(member.layers, front.pretrained_tokens, strict=True):
            assert len(layer.tokens) == len(before)
            assert sum(layer.tokens) <= sum(before)
            assert layer.tokens.count(0) >= layer.removed
    assert settings.members == 1


def test_palettes_are_varied_where_the_target_has_them(evaluator: Evaluator) -> None:
    for name, expected in (("coreml", True), ("onnx", False)):
        target = get_target(name)
        formats = _formats(evaluator, target, target.Options(), storage=True)
        assert [("palettize4" in each) for each in formats] == [expected] * len(evaluator.parts)
        for part, each in zip(evaluator.parts, formats, strict=True):
            sizes = [size_of(evaluator.program, part.names, parse_format(text)) for text in each]
            assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("limits", "message"),
    [({"size": 1000.0}, "--max-size 0.00 MB"), ({"expert-flops": 0.01}, "--max-expert-flops 1.0%")],
)
def test_limits_that_nothing_can_meet_are_refused_before_the_search(
    reference: dict[str, Any], tmp_path: Path, limits: dict[str, float], message: str
) -> None:
    settings = reference["settings"].model_copy(update={"limits": limits, "objectives": "perplexity,expert-flops,size"})
    with pytest.raises(UsageError, match=message) as error:
        open_search(settings, tmp_path, lambda *_: None)
    assert "the least is" in error.value.hint


def test_the_hint_for_unmet_limits_gives_the_nearest_recipe(search: Search, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no measured recipe meets all limits") as error:
        search(tmp_path, limits={"divergence": 1e-9, "expert-flops": 0.6}, generations=0)
    assert "the nearest recipe has" in error.value.hint
    assert "expert-flops" in error.value.hint


def test_a_limit_is_kept(search: Search, tmp_path: Path) -> None:
    finished = search(tmp_path, limits={"expert-flops": 0.7}, generations=1)[2]
    rows = [item.values["expert-flops"] for item in finished.search.archive.front]
    assert rows
    assert max(rows) <= 0.7


def test_four_objectives_are_searched_by_reference_directions(search: Search, tmp_path: Path) -> None:
    finished = search(tmp_path, objectives="perplexity,divergence,expert-flops,size", generations=1)[2]
    assert type(finished.search._algorithm).__name__ == "NSGA3"
    assert finished.search.archive.front


def test_a_budget_of_time_ends_it(search: Search, tmp_path: Path) -> None:
    assert len(search(tmp_path, budget=0.001, generations=None)[2].search.generations) == 1
    # What was begun when it was killed is done again, whatever the clock says.
    file = tmp_path / "generations.jsonl"
    file.write_text(file.read_text() + '{"number": 1, "seconds": 0.5}\n{"num')
    assert len(search(tmp_path, budget=0.001, generations=None)[2].search.generations) == 2
