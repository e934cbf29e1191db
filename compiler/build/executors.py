"""Executors that build the cells of a matrix: in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

from moec.compiler.build.worker import INTERNAL, Outcome, Task, build, failed
from moec.compiler.common.errors import MissingExtraError
from moec.compiler.common.threads import available_cores, threads_of_each

Executor = Callable[[Sequence[Task], int], Iterator[Outcome]]


def in_processes(tasks: Sequence[Task], jobs: int) -> Iterator[Outcome]:
    """Build `jobs` cells at a time, each in a new process, and yield outcomes as they are ready.

    The processes share the cores equally.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads_of_each(jobs))}
    running: set[subprocess.Popen[str]] = set()
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_in_process, task, environment, running) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            for process in tuple(running):
                process.kill()


def _in_process(task: Task, environment: Mapping[str, str], running: set[subprocess.Popen[str]]) -> Outcome:
    with subprocess.Popen(
        [sys.executable, "-m", "moec.compiler.build.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(environment),
    ) as process:
        running.add(process)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        # A dead worker is noticed below. The pipe stays open, because the worker exits when it closes.
        with contextlib.suppress(BrokenPipeError):
            os.write(process.stdin.fileno(), (json.dumps(asdict(task)) + "\n").encode())
        with ThreadPoolExecutor(1) as reader:
            complaints = reader.submit(process.stderr.read)
            lines = process.stdout.read().splitlines()
            said = complaints.result().strip().splitlines()
        code = process.wait()
        running.discard(process)
    if lines:
        return Outcome(**json.loads(lines[-1]))
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return failed(task, f"its process died ({how}){': ' + said[-1] if said else ''}", INTERNAL, 0.0)


def on_ray(tasks: Sequence[Task], jobs: int) -> Iterator[Outcome]:
    """Build the cells on the Ray cluster that RAY_ADDRESS names, or on a local one that is started for it.

    Checkpoints, outputs and the cache must have the same paths on every node. A cell takes 1 / `jobs` of the cores of a
    machine like this one. A worker that dies is restarted once.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    cores = max(1, available_cores() // jobs)
    with ray_cluster() as ray:
        remote: Any = ray.remote(num_cpus=cores, max_retries=1)(_on_node)
        waiting = {remote.remote(asdict(task), list(sys.path)): task for task in tasks}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            task = waiting.pop(ready)
            try:
                yield Outcome(**ray.get(ready))
            except ray.exceptions.RayError as error:
                yield failed(task, f"its worker died: {' '.join(str(error).split())[:200]}", INTERNAL, 0.0)


@contextlib.contextmanager
def ray_cluster() -> Iterator[Any]:
    """The module `ray`, connected to the cluster that RAY_ADDRESS names, or to one that is started here and ended.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("ray is not installed", hint="pip install 'moec[ray]'")
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(configure_logging=False, log_to_driver=False, include_dashboard=False)
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def _on_node(task: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """Build one cell in a Ray worker, which imports moec from the driver's path."""
    sys.path[:] = [*sys.path, *(entry for entry in path if entry not in sys.path)]
    return asdict(build(Task(**task)))


EXECUTORS: Mapping[str, Executor] = {"process": in_processes, "ray": on_ray}
