"""Measures in a separate process, which contains neither the compiler nor torch nor an earlier artifact.

`measure` starts `python -m moec.compiler.measure.latency.process`, which reads a job from standard input and prints
lines of JSON: progress, then the result. The process opens artifacts only through their Runner.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from moec.compiler.common.artifact import read_manifest
from moec.compiler.common.errors import ArtifactError, UsageError
from moec.compiler.common.model_config import context_length, read_config
from moec.compiler.measure.latency.demands import TIMES, Cold, Demand, Workload
from moec.compiler.measure.latency.sampling import Plan, growth, longest, pinned, sample
from moec.compiler.measure.latency.timings import CANDIDATE
from moec.targets import get_target
from moec.targets.runners import Runner, last_logits

Told = Callable[[int, int], None]


def measure(job: Mapping[str, Any], told: Told = lambda *_: None) -> dict[str, Any]:
    """Run `warm` or `cold` in a new process.

    Args:
        job: "kind" ("warm" or "cold") and the arguments of that function.
        told: Called with the seconds spent and the seconds allowed.

    Returns:
        The result of the function.

    Raises:
        ArtifactError: The process failed; the message has the last line of its stderr.
    """
    command = [sys.executable, "-m", "moec.compiler.measure.latency.process"]
    threads = {name: str(job["threads"]) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    result: dict[str, Any] | None = None
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads},
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdin.write(json.dumps(job))
        child.stdin.close()
        for line in child.stdout:
            answer = json.loads(line)
            if "result" in answer:
                result = answer["result"]
            else:
                told(*answer["progress"])
        errors = child.stderr.read().strip()
    if result is None or child.returncode:
        reason = errors.splitlines()[-1] if errors else f"exit code {child.returncode}"
        raise ArtifactError(f"{', '.join(job['artifacts'].values())}: cannot be measured: {reason}")
    return result


def warm(
    artifacts: Mapping[str, str],
    contexts: tuple[int, ...],
    demands: tuple[Demand, ...],
    threads: int,
    seconds: float,
    told: Told,
    rounds: int | None = None,
) -> dict[str, Any]:
    """Measure interleaved calls of artifacts by `sampling.sample`; contexts that do not fit are left out.

    Args:
        artifacts: Name, such as "candidate" or "baseline" -> directory.
        contexts: Prompt lengths in tokens.
        demands: Demands on workloads; sampling ends when they are decided.
        threads: Threads of the runtimes.
        seconds: Longest sampling time.
        told: Called with the seconds spent and the seconds allowed.
        rounds: Number of sessions; None: until the demands are decided.
    """
    order = list(artifacts)

    def opened(session: int) -> dict[str, Runner]:
        turned = order[::-1] if session % 2 else order
        return {name: open_artifact(Path(artifacts[name]), threads) for name in turned}

    with pinned(threads) as cpus:
        runners = opened(0)
        configs = {name: read_config(Path(path) / "config.json") for name, path in artifacts.items()}
        most = [longest(runner, context_length(configs[name])) for name, runner in runners.items()]
        facts = {name: dict(runner.facts()) for name, runner in runners.items()}
        fitting = tuple(c for c in contexts if all(limit is None or c + growth(c) <= limit for limit in most))
        del runners
        vocab_size = min(_vocab_size(Path(path)) for path in artifacts.values())
        met = tuple(
            demand for demand in demands if isinstance(demand.subject, Workload) and demand.subject.context in fitting
        )
        found = sample(opened, Plan(fitting, met, threads, seconds, vocab_size, rounds), told)
    return {
        "series": {name: {k: asdict(v) for k, v in each.items()} for name, each in found.series.items()},
        "unstable": found.unstable,
        "left_out": sorted(set(contexts) - set(fitting)),
        "cpus": list(cpus),
        "load_average": psutil.getloadavg()[0],
        "runners": facts,
    }


def starts(
    directory: Path, context: int, threads: int, count: int, run: Callable[[Mapping[str, Any], Told], dict[str, Any]]
) -> dict[str, list[float]]:
    """Figures of `count` starts, each in a process of its own, and the size of the files.

    Args:
        directory: The artifact.
        context: Tokens of the prompt.
        threads: Threads of the runtime.
        count: Number of starts.
        run: Runs a job, as `measure` does.

    Returns:
        Load time and time to first token in seconds, and peak memory in bytes, of every start; the size in bytes.
    """
    job = {"kind": "cold", "artifacts": {CANDIDATE: str(directory)}, "context": context, "threads": threads}
    each = [run(job, lambda *_: None) for _ in range(count)]
    size = float(sum((directory / name).stat().st_size for name in read_manifest(directory)["files"]))
    figures = {str(key): [float(start[key]) for start in each] for key in (*TIMES, Cold.PEAK_RSS)}
    return {**figures, str(Cold.SIZE): [size]}


def cold(artifacts: Mapping[str, str], context: int, threads: int) -> dict[str, float]:
    """Measure one start: seconds to open the artifact, seconds to the first token, and peak memory in bytes."""
    directory = Path(artifacts[CANDIDATE])
    ids = np.random.default_rng(0).integers(0, _vocab_size(directory), (1, context), dtype=np.int64)
    start = time.perf_counter()
    runner = open_artifact(directory, threads)
    opened = time.perf_counter()
    int(last_logits(runner, ids, start=True)[0].argmax())
    answered = time.perf_counter()
    return {Cold.LOAD: opened - start, Cold.FIRST_TOKEN: answered - start, Cold.PEAK_RSS: _peak_rss()}


def open_artifact(directory: Path, threads: int) -> Runner:
    """The Runner of an artifact, whatever its target."""
    name = str(read_manifest(directory).get("recipe", {}).get("target"))
    return get_target(name).open(directory, threads=threads)


def _vocab_size(directory: Path) -> int:
    return int(read_manifest(directory)["model"]["vocab_size"])


def _peak_rss() -> float:
    """Peak memory in bytes, on Linux from VmHWM, since `ru_maxrss` includes the parent's memory at the fork."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def plain_demand(demand: Demand) -> dict[str, Any]:
    """A demand as a mapping for a job."""
    return asdict(demand)


def _demand(plain: Mapping[str, Any]) -> Demand:
    return Demand(plain["key"], Workload(**plain["subject"]), plain["statistic"], plain["limit"])


def main() -> None:
    """Read a job from standard input and print its result."""
    # JSON goes to the original stdout; other output, such as that of a runtime, is redirected to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.load(sys.stdin)

    def told(done: int, total: int) -> None:
        print(json.dumps({"progress": [done, total]}), file=answers, flush=True)

    kind, arguments = job.pop("kind"), job
    try:
        if kind == "cold":
            result: Mapping[str, Any] = cold(**arguments)
        else:
            arguments["demands"] = tuple(_demand(item) for item in arguments["demands"])
            result = warm(**arguments, told=told)
    except (ArtifactError, UsageError) as error:
        raise SystemExit(error.message) from error
    print(json.dumps({"result": result}), file=answers, flush=True)


if __name__ == "__main__":
    main()
