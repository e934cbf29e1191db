"""The memory bandwidth of this machine and the time of each kind of work, measured once and cached.

The cache has one file per machine, moec version and runtime version in the user's cache directory.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from scipy.optimize import nnls

import moec
from moec.compiler.common.digest import sha256_of_json
from moec.compiler.common.files import write_atomically
from moec.compiler.common.machine import machine
from moec.compiler.measure.estimate.counting import Counts
from moec.targets import get_target

BANDWIDTH_BYTES = 256 * 2**20
FEATURES = ("operations", "experts", "dense", "states")


@dataclass(frozen=True)
class Speeds:
    """Seconds per unit of work for a target and formats on a machine.

    Attributes:
        operations: Seconds per operation, independent of its size.
        experts: Seconds per byte of expert weights.
        dense: Seconds per byte of other weights.
        states: Seconds per byte of states.
        residual: Largest relative error on the models to which the speeds were fitted.
    """

    operations: float
    experts: float
    dense: float
    states: float
    residual: float

    def decode(self, counts: Counts, context: int) -> float:
        """Seconds of a decode step after `context` tokens."""
        return float(np.dot(features(counts, context), [getattr(self, name) for name in FEATURES]))


def features(counts: Counts, context: int) -> list[float]:
    """Units of work of a decode step, in the order of `FEATURES`."""
    return [float(counts.nodes), counts.expert_bytes(), counts.dense_bytes(), float(counts.states_at(context))]


def fit(measured: Sequence[tuple[Counts, int, float]]) -> Speeds:
    """Fit speeds to measured decode steps by non-negative least squares of the relative errors.

    Args:
        measured: Counts, context and seconds of each decode step.
    """
    rows = np.array([features(counts, context) for counts, context, _ in measured])
    seconds = np.array([value for _, _, value in measured])
    scaled = rows / seconds[:, None]
    units = np.where(scaled.max(axis=0) > 0, scaled.max(axis=0), 1.0)
    found, _ = nnls(scaled / units, np.ones(len(seconds)))
    speeds = found / units
    residual = float(np.abs(rows @ speeds / seconds - 1).max())
    return Speeds(**dict(zip(FEATURES, map(float, speeds), strict=True)), residual=residual)


def bandwidth() -> float:
    """Bytes per second that one thread reads from memory: the best of five scalar products."""
    values = np.ones(BANDWIDTH_BYTES // 4, np.float32)
    best = min(_cpu_seconds(lambda: np.dot(values, values)) for _ in range(5))
    return float(values.nbytes / best)


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def known_speeds(
    target: str, dtype: str, formats: Mapping[str, str], measure: Callable[[], Speeds] | None = None
) -> Speeds | None:
    """Speeds of a target and formats on this machine, from the cache or from `measure`.

    Args:
        target: Name of the target.
        dtype: Precision of what is not quantized.
        formats: Tensor class -> format of its quantized weights, from `counting.formats`.
        measure: Measures speeds that are not in the cache; without it, the result is None for these.
    """
    tools = {name: importlib.metadata.version(name) for name in get_target(target).tools}
    key = {
        "target": target,
        "dtype": dtype,
        "formats": dict(formats),
        "machine": machine(),
        "moec": moec.__version__,
        **tools,
    }
    found = cached("speeds", key, None if measure is None else lambda: asdict(measure()))
    return None if found is None else Speeds(**found)


def cached(kind: str, key: Mapping[str, Any], make: Callable[[], Mapping[str, Any]] | None) -> Mapping[str, Any] | None:
    """Cached figures for `key`, or those that `make` measures now; None if there are neither.

    Args:
        kind: Prefix of the file name.
        key: Everything on which the figures depend.
        make: Measures the figures; None: only look into the cache.
    """
    digest = sha256_of_json(key)[:16]
    file = platformdirs.user_cache_path("moec") / f"{kind}-{digest}.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["key"] == json.loads(json.dumps(key)):
            found: Mapping[str, Any] = content["figures"]
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing or damaged, so measure again
    if make is None:
        return None
    figures = dict(make())
    _write(file, {"key": dict(key), "figures": figures})
    return figures


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Write a cache file; an error is ignored, since it only means measuring again."""
    with contextlib.suppress(OSError):
        write_atomically(file, json.dumps(content, indent=2))
