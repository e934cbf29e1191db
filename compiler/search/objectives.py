"""The objectives of a search, all of which are minimized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moec.compiler.common.errors import UsageError
from moec.compiler.common.validation import unknown
from moec.compiler.measure.estimate.devices import Device
from moec.quantize.planning.auto import parse_size
from moec.targets import base


@dataclass(frozen=True)
class Objective:
    """One quantity to minimize.

    Attributes:
        name: Its name on the command line and in files.
        title: Its name in reports.
        unit: "share" (0.01 is 1 %), "nats", "bytes" or "seconds".
        by_running: Whether the model must run on text to measure it; other objectives are computed from the recipe.
        routing: Whether it depends on the slots that a policy drops.
        storage: Whether it depends on formats and pruned experts.
    """

    name: str
    title: str
    unit: str
    by_running: bool = False
    routing: bool = False
    storage: bool = False


PERPLEXITY = Objective("perplexity", "increase of perplexity", "share", True, True, True)
DIVERGENCE = Objective("divergence", "KL divergence per token", "nats", True, True, True)
EXPERT_FLOPS = Objective(
    "expert-flops", "expert FLOPs executed, as a share of the pretrained model's", "share", routing=True
)
SIZE = Objective("size", "bytes of all weights", "bytes", storage=True)
MEMORY = Objective("memory", "bytes of weights and states", "bytes", storage=True)
BYTES = Objective("bytes-per-token", "bytes read per token", "bytes", routing=True, storage=True)
DECODE = Objective("decode.p50", "estimated seconds of a decode step", "seconds", routing=True, storage=True)
PREFILL = Objective("prefill.p50", "estimated seconds of a prefill", "seconds", routing=True)
OBJECTIVES: Mapping[str, Objective] = {
    item.name: item for item in (PERPLEXITY, DIVERGENCE, EXPERT_FLOPS, SIZE, MEMORY, BYTES, DECODE, PREFILL)
}
MOST = 6
"""Maximum number of objectives; with more, nearly every individual is on the front."""


def parse_objectives(text: str) -> tuple[Objective, ...]:
    """Objectives from "perplexity,size".

    Raises:
        UsageError: A name is unknown or repeated, there are too few or too many, or none measures quality or cost.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in OBJECTIVES:
            raise unknown(name, OBJECTIVES, "unknown objective", "the objectives")
    if len(set(names)) < len(names):
        raise UsageError(f"--objectives {text}: an objective is repeated", hint="name each objective once")
    if not 2 <= len(names) <= MOST:
        raise UsageError(
            f"--objectives {text}: {len(names)} objectives were given, but a search takes 2 to {MOST}",
            hint="for example --objectives perplexity,expert-flops,size",
        )
    found = tuple(OBJECTIVES[name] for name in names)
    if not any(item.by_running for item in found):
        raise UsageError(
            f"--objectives {text}: none of them measures the quality of the model, so the worst model would win",
            hint="add perplexity or divergence",
        )
    if all(item.by_running for item in found):
        raise UsageError(
            f"--objectives {text}: none of them measures a cost, so the pretrained model would win",
            hint="add expert-flops, size, bytes-per-token, memory, decode.p50 or prefill.p50",
        )
    return found


def check_objectives(
    objectives: Sequence[Objective], target: base.Target, options: base.TargetOptions, device: Device | None
) -> None:
    """Refuse objectives that the target or the device does not support.

    Raises:
        UsageError: The target executes dropped slots, or the FLOP/s of the device are unknown.
    """
    capable = {phase: target.capabilities(options, phase) for phase in base.Phase}
    phases = {EXPERT_FLOPS.name: base.Phase.DECODE, PREFILL.name: base.Phase.PREFILL}
    for item in objectives:
        phase = phases.get(item.name)
        if phase is not None and not capable[phase].skips_experts:
            raise UsageError(
                f"objective {item.name}: target {target.name} also executes the experts of dropped slots in {phase} "
                f"({capable[phase].reason})",
                hint="leave it out; every target supports size, memory and perplexity",
            )
        if item is PREFILL and (device is None or device.flops is None):
            raise UsageError(
                f"objective {item.name}: the FLOP/s of {'this machine' if device is None else device.name} are unknown",
                hint="choose a device whose profile has them (--device), or use decode.p50",
            )


def parse_limit(objective: Objective, text: str) -> float:
    """Parse a limit such as 1%, 0.01, 300MB or 12ms.

    Raises:
        UsageError: It cannot be parsed, or is negative.
    """
    try:
        value = _parsed(objective, text.strip().lower())
    except ValueError as error:
        raise UsageError(
            f"--max-{objective.name} {text}: not a {_KIND[objective.unit]}", hint=_LIKE[objective.unit]
        ) from error
    if value < 0:
        raise UsageError(f"--max-{objective.name} {text}: a limit cannot be negative", hint=_LIKE[objective.unit])
    return value


def _parsed(objective: Objective, text: str) -> float:
    if objective.unit == "bytes":
        try:
            return float(parse_size(text.replace("x", "?"), 0))
        except UsageError as error:
            raise ValueError(error.message) from error
    scale = 1.0
    if objective.unit == "share" and text.endswith("%"):
        text, scale = text[:-1], 0.01
    if objective.unit == "seconds":
        for suffix, factor in (("ms", 1e-3), ("us", 1e-6), ("s", 1.0)):
            if text.endswith(suffix):
                text, scale = text.removesuffix(suffix), factor
                break
    return float(text) * scale


_KIND = {"share": "share", "nats": "number", "bytes": "size", "seconds": "time"}
_LIKE = {"share": "write 1% or 0.01", "nats": "write 0.02", "bytes": "write 300MB or 1.5GB", "seconds": "write 12ms"}


def shown(objective: Objective, value: float) -> str:
    """Format a value for display."""
    if objective.unit == "share":
        return f"{value:+.2%}" if objective is PERPLEXITY else f"{value:.1%}"
    if objective.unit == "bytes":
        return f"{value / 1e6:.2f} MB"
    return f"{value * 1e3:.3g} ms" if objective.unit == "seconds" else f"{value:.2e}"


_SCALES = {"share": (100.0, "%"), "nats": (1.0, "nats"), "bytes": (1e-6, "MB"), "seconds": (1e3, "ms")}


def scaled(objective: Objective, value: float) -> float:
    """A value in the unit of plots: %, nats, MB or ms."""
    return value * _SCALES[objective.unit][0]


def axis(objective: Objective) -> str:
    """Title of the axis of an objective."""
    return f"{objective.name}, {_SCALES[objective.unit][1]}"


def dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the first is not worse in any objective and better in at least one."""
    pairs: list[tuple[Any, Any]] = list(zip(first, second, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
