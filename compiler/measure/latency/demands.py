"""Demands on an artifact: budgets of latency and size, and the largest regression from a baseline."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from moec.compiler.common.errors import UsageError
from moec.compiler.common.sizes import BYTES, amount

DEFAULT_CONTEXT = 128
"""Prompt length of a budget without a number: `decode` means `decode128`."""

SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
EXAMPLE = "such as decode.p50=12ms,prefill128.p90=300ms,first_token=1s,load=2s,peak_rss=1.5GB,size=400MB"

_WORKLOAD = re.compile(r"(decode|prefill)([1-9][0-9]*)?\.(p50|p90|p99)")


class Cold(StrEnum):
    """Figures of a start in a new process, and the size of the files."""

    LOAD = "load"
    FIRST_TOKEN = "first_token"
    PEAK_RSS = "peak_rss"
    SIZE = "size"


TIMES = (Cold.LOAD, Cold.FIRST_TOKEN)


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of call: a prefill of `context` tokens, or a decode step after `context` tokens."""

    phase: str
    context: int

    def __str__(self) -> str:
        return f"{self.phase}{self.context}"


@dataclass(frozen=True, slots=True)
class Demand:
    """A limit on a figure.

    Attributes:
        key: The key as the user wrote it.
        subject: A workload, or a figure of a cold start.
        statistic: "p50", "p90", "p99", "ratio" (to the baseline), or "" for a single value.
        limit: The largest allowed value, in seconds or bytes, or as a ratio.
    """

    key: str
    subject: Workload | Cold
    statistic: str
    limit: float


def parse_budgets(given: str | Mapping[str, str | float]) -> tuple[Demand, ...]:
    """Parse budgets from "decode.p50=12ms,size=400MB" or the mapping of a recipe.

    Raises:
        UsageError: A key is unknown or given twice, or a value is not a positive number with a unit.
    """
    if isinstance(given, str):
        pairs = [item.partition("=")[::2] for item in given.split(",") if item.strip()]
    else:
        pairs = [(key, str(value)) for key, value in given.items()]
    found: dict[str, Demand] = {}
    for key, text in pairs:
        demand = _budget(key.strip(), text.strip())
        name = f"{demand.subject}.{demand.statistic}"
        if name in found:
            raise UsageError(f"latency budget: {key.strip()} is given twice", hint="give each key once")
        found[name] = demand
    if not found:
        raise UsageError("the latency budget is empty", hint=EXAMPLE)
    return tuple(found.values())


def _budget(key: str, text: str) -> Demand:
    if key in set(Cold):
        subject = Cold(key)
        units = SECONDS if subject in TIMES else BYTES
        return Demand(key, subject, "p50" if subject in TIMES else "", _amount(key, text, units))
    if not (match := _WORKLOAD.fullmatch(key)):
        raise UsageError(f"latency budget: unknown key '{key}'", hint=f"decode and prefill need a quantile; {EXAMPLE}")
    phase, context, statistic = match.groups()
    workload = Workload(phase, int(context or DEFAULT_CONTEXT))
    return Demand(key, workload, statistic, _amount(key, text, SECONDS))


def _amount(key: str, text: str, units: Mapping[str, float]) -> float:
    return amount(text, units, f"latency budget: {key}")


def regressions(contexts: tuple[int, ...], most: float) -> tuple[Demand, ...]:
    """The demands that decode and prefill at every context take at most `1 + most` times as long as the baseline."""
    return tuple(
        Demand(f"{phase}{context}", Workload(phase, context), "ratio", 1 + most)
        for context in contexts
        for phase in ("decode", "prefill")
    )
