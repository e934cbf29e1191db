"""Workers on Ray, whose part in it is played here; the real one is in tests/interop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from moec.compiler.common.errors import MoecError
from moec.compiler.search import workers
from moec.compiler.search.workers import Task, on_ray

NOTHING = {"losses": (), "divergences": (), "kept": ()}


class Call:
    """A future of Ray."""

    def __init__(self, ready: bool, value: Any = None) -> None:
        self.ready, self.value = ready, value


class Actor:
    """A worker that ends when it gets a deadly task. While it restarts, other tasks fail at once, as in Ray 2.60."""

    RESTART = 30
    """How often others answer before the worker runs again."""

    def __init__(self, cluster: Cluster, room: bool) -> None:
        self.cluster, self.room, self.restarting = cluster, room, list[Call]()
        self.down = 0
        self.pid = SimpleNamespace(options=self._options)
        self.evaluate = SimpleNamespace(remote=self._evaluate)

    def _options(self, *, max_task_retries: int) -> Any:
        assert max_task_retries == -1
        return SimpleNamespace(remote=self._pid)

    def _pid(self) -> Call:
        call = Call(self.room and not self.down, self.cluster.start_error)
        if self.down:
            self.restarting.append(call)
        return call

    def _evaluate(self, task: dict[str, Any]) -> Call:
        if self.down:
            return Call(True, ConnectionError("restarts"))
        if self.cluster.deadly.get(task["stop"], 0):
            self.cluster.deadly[task["stop"]] -= 1
            self.down = self.RESTART
            return Call(True, ConnectionError("died"))
        return Call(self.room, {**NOTHING, "losses": (task["stop"],)})

    def tick(self) -> None:
        """Time passes."""
        self.down = max(0, self.down - 1)
        if not self.down:
            for call in self.restarting:
                call.ready = True


class Cluster:
    """As much of Ray as `on_ray` uses: actors for which there is no room never answer."""

    exceptions = SimpleNamespace(RayActorError=ConnectionError, RayTaskError=ValueError)

    def __init__(self, cores: int) -> None:
        self.cores, self.free, self.reserved = cores, float(cores), list[float]()
        self.actors = list[Actor]()
        self.deadly = dict[int, int]()
        """Last window of a task -> how many workers it ends."""
        self.start_error: Exception | None = None

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.cores)}

    def remote(self, *, num_cpus: float, max_restarts: int) -> Callable[[type], Any]:  # noqa: ARG002
        def made(*_: Any) -> Any:
            self.reserved.append(num_cpus)
            ready = self.free >= num_cpus
            self.free -= num_cpus if ready else 0.0
            self.actors.append(Actor(self, ready))
            return self.actors[-1]

        return lambda _kind: SimpleNamespace(remote=made)

    def wait(self, calls: list[Call], *, num_returns: int) -> tuple[list[Call], list[Call]]:
        for _ in range(2 * Actor.RESTART):
            for actor in self.actors:
                actor.tick()
            if any(call.ready for call in calls):
                break
        ready = [call for call in calls if call.ready][:num_returns]
        assert ready, "waits for ever"
        return ready, [call for call in calls if call not in ready]

    def get(self, call: Call) -> Any:
        if isinstance(call.value, Exception):
            raise call.value
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


@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_a_worker_that_restarts_costs_no_other_task(cluster: Cluster) -> None:
    """Of nine tasks, one ends a worker once and one ends every worker that it meets."""
    cluster.deadly = {3: 1, 5: 99}
    evaluator: Any = SimpleNamespace(shared_subject=SimpleNamespace())
    with on_ray(evaluator, 2) as run:
        results = dict(run([Task({}, 0, stop) for stop in range(1, 10)]))
    assert results.pop(4) is None
    assert {index: found.losses for index, found in results.items() if found} == {
        index: (index + 1,) for index in range(9) if index != 4
    }
    assert cluster.deadly == {3: 0, 5: 99 - workers.TRIES}


@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_a_worker_that_cannot_start_is_an_error(cluster: Cluster) -> None:
    cluster.start_error = ConnectionError("no such checkpoint on this node")
    evaluator: Any = SimpleNamespace(shared_subject=SimpleNamespace())
    with on_ray(evaluator, 2) as run, pytest.raises(MoecError, match="cannot start: no such checkpoint"):
        list(run([Task({}, 0, 4)]))
