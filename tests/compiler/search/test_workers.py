"""Workers on Ray, whose part in it is played here; the real one is in tests/interop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from moec.compiler.search import workers
from moec.compiler.search.workers import Task, on_ray

NOTHING = {"losses": (), "divergences": (), "kept": ()}


class Call:
    """A future of Ray."""

    def __init__(self, ready: bool, value: Any = None) -> None:
        self.ready, self.value = ready, value


class Cluster:
    """As much of Ray as `on_ray` uses: actors for which there is no room never answer."""

    exceptions = SimpleNamespace(RayActorError=ConnectionError, RayTaskError=ValueError)

    def __init__(self, cores: int) -> None:
        self.cores, self.free, self.reserved = cores, float(cores), list[float]()

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.cores)}

    def remote(self, *, num_cpus: float, max_restarts: int) -> Callable[[type], Any]:  # noqa: ARG002
        def made(*_: Any) -> Any:
            self.reserved.append(num_cpus)
            ready = self.free >= num_cpus
            self.free -= num_cpus if ready else 0.0
            return SimpleNamespace(
                pid=SimpleNamespace(remote=lambda: Call(ready)),
                evaluate=SimpleNamespace(remote=lambda task: Call(ready, {**NOTHING, "losses": (task["stop"],)})),
            )

        return lambda _kind: SimpleNamespace(remote=made)

    def wait(self, calls: list[Call], *, num_returns: int) -> tuple[list[Call], list[Call]]:
        ready = [call for call in calls if call.ready][:num_returns]
        assert ready, "waits for ever"
        return ready, [call for call in calls if call not in ready]

    def get(self, call: Call) -> Any:
        return call.value


@pytest.fixture
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster(request.param)

    @contextlib.contextmanager
    def opened() -> Iterator[Cluster]:
        yield found

    monkeypatch.setattr(workers, "ray_cluster", opened)
    monkeypatch.setattr(workers, "asdict", lambda item: vars(item))
    monkeypatch.setattr(workers, "available_cores", lambda: 2)
    return found


@pytest.mark.parametrize(
    ("cluster", "jobs", "reserved"), [(2, 1, 2), (2, 2, 1), (2, 3, 0.5), (2, 4, 0.5), (8, 4, 1)], indirect=["cluster"]
)
def test_all_workers_have_room(cluster: Cluster, jobs: int, reserved: float) -> None:
    evaluator: Any = SimpleNamespace(shared_subject=SimpleNamespace())
    with on_ray(evaluator, jobs) as run:
        for _ in range(2):
            results = dict(run([Task({}, 0, stop) for stop in range(1, 10)]))
            assert {index: found.losses for index, found in results.items() if found} == {i: (i + 1,) for i in range(9)}
    assert cluster.reserved == [reserved] * jobs
    assert cluster.free >= 0


@pytest.mark.parametrize("cluster", [4], indirect=True)
def test_a_worker_that_ray_keeps_waiting_gets_no_task(cluster: Cluster) -> None:
    cluster.free = 1.0  # somebody else has the others
    evaluator: Any = SimpleNamespace(shared_subject=SimpleNamespace())
    with on_ray(evaluator, 3) as run:
        assert len(list(run([Task({}, 0, 4)] * 7))) == 7
