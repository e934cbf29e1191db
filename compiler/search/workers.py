"""Workers that measure individuals: this process, several local processes, or actors of a Ray cluster.

A worker opens the model once and then measures one individual after another. When a worker dies, its individual is
given to another one; an individual that has ended two workers is not tried again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moec.compiler.build.executors import ray_cluster
from moec.compiler.common.errors import MoecError
from moec.compiler.common.threads import available_cores, threads_of_each
from moec.compiler.search.evaluation import Evaluator, Subject
from moec.compiler.search.store import Measured

TRIES = 2
"""Number of workers that an individual may end before it is not tried again."""


@dataclass(frozen=True)
class Task:
    """The windows [start, stop) of the variant that these sections of a recipe describe."""

    sections: Mapping[str, Any]
    start: int
    stop: int


Run = Callable[[Sequence[Task]], Iterator[tuple[int, Measured | None]]]
"""Tasks -> index and result of each as they finish; None for a task that ended too many workers."""


@contextlib.contextmanager
def here(evaluator: Evaluator, _jobs: int) -> Iterator[Run]:
    """Measure one individual at a time in this process."""

    def run(tasks: Sequence[Task]) -> Iterator[tuple[int, Measured | None]]:
        for index, task in enumerate(tasks):
            yield index, evaluator.evaluate(task.sections, task.start, task.stop)

    yield run


class _Process:
    """A worker process; see `moec.compiler.search.worker`."""

    def __init__(self, subject: Subject, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moec.compiler.search.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self._say(asdict(subject))

    def _say(self, what: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def ask(self, task: Task) -> Measured:
        """The result of a task.

        Raises:
            OSError: The process has ended.
            MoecError: The evaluation failed.
        """
        self._say(asdict(task))
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise BrokenPipeError("the worker ended")
        found = json.loads(answer)
        if "error" in found:
            raise MoecError(found["error"])
        return Measured.of(found)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def end(self) -> None:
        """End the process and wait for it."""
        self._process.kill()
        self._process.communicate()


class _Pool:
    """Worker processes, each with a thread that sends it tasks."""

    def __init__(self, subject: Subject, jobs: int) -> None:
        self._subject, self._jobs = subject, jobs
        self._threads = threads_of_each(jobs)
        self.alive: dict[int, _Process] = {}

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Measured | None]]:
        """See `Run`.

        Raises:
            MoecError: An evaluation failed with an error.
        """
        waiting, done = deque((index, 0) for index in range(len(tasks))), queue.Queue[Any]()
        for number in range(min(self._jobs, len(tasks))):
            threading.Thread(target=self._serve, args=(number, tasks, waiting, done), daemon=True).start()
        for _ in tasks:
            index, found = done.get()
            if isinstance(found, MoecError):
                raise found
            yield index, found

    def _serve(
        self, number: int, tasks: Sequence[Task], waiting: deque[tuple[int, int]], done: queue.Queue[Any]
    ) -> None:
        """Send tasks to one process until none is left; restart the process if it dies."""
        while waiting:
            with contextlib.suppress(IndexError):  # another thread took the last one
                index, tries = waiting.popleft()
                try:
                    done.put((index, self._process(number).ask(tasks[index])))
                except MoecError as error:
                    done.put((index, error))
                except (OSError, ValueError):
                    self.alive.pop(number).end()
                    if tries + 1 < TRIES:
                        waiting.append((index, tries + 1))
                    else:
                        done.put((index, None))

    def _process(self, number: int) -> _Process:
        if number not in self.alive:
            self.alive[number] = _Process(self._subject, self._threads)
        return self.alive[number]

    def end(self) -> None:
        """End all processes."""
        for process in self.alive.values():
            process.end()


@contextlib.contextmanager
def in_processes(evaluator: Evaluator, jobs: int) -> Iterator[Run]:
    """Measure in `jobs` local processes, which share the cores."""
    pool = _Pool(evaluator.shared_subject, jobs)
    try:
        yield pool.run
    finally:
        pool.end()


@contextlib.contextmanager
def on_ray(evaluator: Evaluator, jobs: int) -> Iterator[Run]:
    """Measure in `jobs` actors of the cluster that RAY_ADDRESS names, or of a local cluster.

    The checkpoint, the texts and the directory of the search must have the same path on every node.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    with ray_cluster() as ray:
        cores = _reserved(jobs, int(ray.cluster_resources().get("CPU", 1)))
        actor: Any = ray.remote(num_cpus=cores, max_restarts=-1)(_Actor)
        actors = [actor.remote(asdict(evaluator.shared_subject), list(sys.path)) for _ in range(jobs)]
        # Ray keeps an actor for which no node has room waiting, and what it is asked with it. While it restarts one, a
        # task fails at once, as if it had ended the worker; with retries, the call waits until the actor runs.
        starting, free = {_running(worker): worker for worker in actors}, deque[Any]()

        def run(tasks: Sequence[Task]) -> Iterator[tuple[int, Measured | None]]:
            waiting = deque((index, 0) for index in range(len(tasks)))
            running: dict[Any, tuple[int, int, Any]] = {}
            while waiting or running:
                while waiting and free:
                    (index, tries), worker = waiting.popleft(), free.popleft()
                    running[worker.evaluate.remote(asdict(tasks[index]))] = (index, tries, worker)
                (ready,), _ = ray.wait([*running, *starting], num_returns=1)
                if ready in starting:
                    try:
                        ray.get(ready)
                    except ray.exceptions.RayActorError as error:
                        raise MoecError(f"a worker cannot start: {' '.join(str(error).split())[:300]}") from error
                    free.append(starting.pop(ready))
                    continue
                index, tries, worker = running.pop(ready)
                try:
                    found = Measured.of(ray.get(ready))
                    free.append(worker)
                    yield index, found
                except ray.exceptions.RayActorError:
                    starting[_running(worker)] = worker
                    if tries + 1 < TRIES:
                        waiting.append((index, tries + 1))
                    else:
                        yield index, None
                except ray.exceptions.RayTaskError as error:
                    raise MoecError(f"a worker failed: {' '.join(str(error.cause).split())[:300]}") from error

        yield run


def _running(worker: Any) -> Any:
    """A call that an actor answers as soon as it runs."""
    return worker.pid.options(max_task_retries=-1).remote()


def _reserved(jobs: int, cores: int) -> float:
    """Cores that each of `jobs` actors reserves in a cluster of `cores`: whole ones, or a unit fraction of one.

    So many fractions fill each node's cores without a rest that no actor fits into.
    """
    return max(1, available_cores() // jobs) if jobs <= cores else 1 / math.ceil(jobs / cores)


class _Actor:
    """A worker on Ray that imports moec from the same path as the driver."""

    def __init__(self, subject: dict[str, Any], path: list[str]) -> None:
        sys.path[:] = [*sys.path, *(entry for entry in path if entry not in sys.path)]
        self._evaluator = Evaluator(Subject(**subject))
        self._evaluator.use_codes()

    def evaluate(self, task: dict[str, Any]) -> dict[str, Any]:
        """The result of a task as a mapping."""
        return asdict(self._evaluator.evaluate(**task))

    def pid(self) -> int:
        """Process id of the actor."""
        return os.getpid()


def opened(executor: str, evaluator: Evaluator, jobs: int) -> contextlib.AbstractContextManager[Run]:
    """Start the workers of an executor: "local" or "ray"."""
    if executor == "ray":
        return on_ray(evaluator, jobs)
    return in_processes(evaluator, jobs) if jobs > 1 else here(evaluator, jobs)


EXECUTORS = ("local", "ray")
