"""Threads on a shared machine, and in a container that may use a part of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from moec.compiler.common import control_groups, threads


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A quiet machine of 8 cores without control groups; the value is where their files are put."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8)  # noqa: ARG005
    monkeypatch.setattr(os, "getloadavg", lambda: (0.3, 9.0, 9.0))
    monkeypatch.setattr(control_groups, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(control_groups, "OWN_CGROUPS", tmp_path / "own")
    threads.cpu_quota.cache_clear()
    yield tmp_path
    threads.cpu_quota.cache_clear()


def put(where: Path, own: str, files: Mapping[str, str]) -> None:
    """Write /proc/self/cgroup and files of control groups."""
    (where / "own").write_text(own)
    for name, text in files.items():
        path = where / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_the_command_line_lets_threads_sleep_unless_told_otherwise(given: str | None, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    code = (
        "import os, sys; from moec import cli; sys.argv = ['moec', '--version']\n"
        "try: cli.main()\n"
        "finally: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{expected} False"


@pytest.mark.parametrize(("load", "spins"), [(0.3, True), (8.0, True), (8.5, False)])
def test_threads_do_not_spin_on_a_shared_machine(load: float, spins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
    assert threads.should_spin() is spins


def test_a_whole_machine_is_left_to_the_runtime() -> None:
    assert (threads.available_cores(), threads.threads_for(0), threads.threads_for(3)) == (8, 0, 3)
    assert threads.environment() == {"OMP_WAIT_POLICY": "PASSIVE"}


def test_threads_follow_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5})
    assert (threads.available_cores(), threads.threads_for(0), threads.threads_for(3)) == (2, 2, 3)
    assert threads.should_spin(), "the cores are its own"


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "300000 100000"}, 0.5),
        ("0::/../outside", {"cpu.max": "400000 100000"}, 4.0),
        ("4:memory:/m\n2:cpu,cpuacct:/d/1", {"cpu,cpuacct/d/1/cpu.cfs_quota_us": "300000",
         "cpu,cpuacct/d/1/cpu.cfs_period_us": "100000"}, 3.0),
        ("1:cpu:/d", {"cpu/d/cpu.cfs_quota_us": "-1", "cpu/d/cpu.cfs_period_us": "100000"}, None),
        # The name is that on the host, and the container sees its own group as the root.
        ("2:cpuacct,cpu:/docker/1f", {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 2.5),
        ("0::/", {"cpu.max": "nonsense"}, None),
        ("0::/\n1:cpu:/", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, 2.0),
    ],
)  # fmt: skip
def test_the_quota_of_control_groups(own: str, files: dict[str, str], quota: float | None, machine: Path) -> None:
    put(machine, own, files)
    assert threads.cpu_quota() == quota


@pytest.mark.parametrize(("quota", "cores"), [("250000", 2), ("50000", 1), ("6400000", 8)])
def test_threads_follow_the_quota(quota: str, cores: int, machine: Path) -> None:
    put(machine, "0::/", {"cpu.max": f"{quota} 100000"})
    assert threads.available_cores() == cores
    assert threads.threads_for(0) == (cores if cores < 8 else 0)
    assert threads.environment() == {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(cores)}
    assert not threads.should_spin(), "spinning is paid for"


def test_sessions_of_onnx_runtime_follow(machine: Path) -> None:
    from moec.targets.onnx.runner import session_options

    spinning = "session.intra_op.allow_spinning"
    put(machine, "0::/", {"cpu.max": "200000 100000"})
    options: Any = session_options(0)
    assert (options.intra_op_num_threads, options.get_session_config_entry(spinning)) == (2, "0")


@pytest.mark.parametrize(
    ("given", "jobs", "threads_each"), [(None, 2, 4), (None, 3, 2), (None, 20, 1), ("1", 2, 1), ("8", 2, 4), ("", 2, 4)]
)
def test_processes_share_the_cores(
    given: str | None, jobs: int, threads_each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable may be one that moec itself has set for a quota."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert threads.threads_of_each(jobs) == threads_each
