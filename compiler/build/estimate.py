"""`moec estimate`: bytes, FLOPs, latency, memory and the cost of a million tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

import moec
from moec.compiler.build.estimate_calibration import speeds
from moec.compiler.common.errors import UsageError
from moec.compiler.common.machine import machine
from moec.compiler.common.progress import Progress
from moec.compiler.common.validation import validate
from moec.compiler.measure.estimate.counting import Counts, count, formats
from moec.compiler.measure.estimate.devices import Device, load_device
from moec.compiler.measure.estimate.speeds import bandwidth, cached
from moec.compiler.pipeline.captures import Captures
from moec.compiler.pipeline.program import build_program
from moec.compiler.pipeline.recipe import make_recipe
from moec.passes.routing.policies.table import policy_type
from moec.targets import get_target
from moec.targets.base import Phase, cannot_measure

HERE = "this machine, one thread"


@dataclass(frozen=True)
class EstimateRequest:
    """The configuration to estimate.

    Attributes:
        checkpoint: Directory or hub id.
        target: Name of the target.
        quantize: Format of the weights; `auto`, which needs measurements, is refused.
        dtype: Precision of what is not quantized.
        routing: Name of a policy, or None.
        kept_share: Share of the pretrained top-k that the policy keeps.
        context: Tokens in the KV cache before the decode step.
        device: Name of a device profile; None is this machine.
        price_per_hour: Price of the device per hour.
        trust_remote_code: Whether to run modelling code of the checkpoint.
        revision: Branch, tag or commit of a hub id.
    """

    checkpoint: str
    target: str
    quantize: str = "none"
    dtype: str = "fp32"
    routing: str | None = None
    kept_share: float = 1.0
    context: int = 128
    device: str | None = None
    price_per_hour: float | None = None
    trust_remote_code: bool = False
    revision: str | None = None


def estimate(wanted: EstimateRequest, progress: Progress) -> dict[str, Any]:
    """The estimate as a mapping for JSON. No weight is read.

    Raises:
        UsageError: The format is `auto`, the device or policy is unknown, or the policy has no budget.
        MoecError: As for an export.
    """
    if wanted.quantize == "auto":
        raise UsageError(
            "--quantize auto cannot be estimated: it chooses formats by measuring the model",
            hint="give a format, such as int4",
        )
    if wanted.device is not None:
        load_device(wanted.device)
    if wanted.routing is not None:
        policy_type(wanted.routing)
        if not 0 < wanted.kept_share < 1:
            raise UsageError(
                f"the saving of {wanted.routing} depends on its budget, and none is given",
                hint="give the share of the top-k that it keeps, such as --expert-budget 0.6",
            )
    return predict(*count_program(wanted), wanted, progress)


def predict(counts: Counts, stored: Mapping[str, str], wanted: EstimateRequest, progress: Progress) -> dict[str, Any]:
    """The estimate from the counts of a Program; `stored` are its formats, from `counting.formats`."""
    device = None if wanted.device is None else load_device(wanted.device)
    where = _device(device) if device else here()
    found = {
        "weights": {"bytes": counts.size, "by_class": dict(counts.weight_bytes)},
        "parameters": {"total": counts.parameters, "active": counts.active},
        "per_token": {
            "bytes": sum(counts.read_bytes.values()) + counts.states_at(wanted.context),
            "flops": counts.flops + counts.state_flops_at(wanted.context),
            "context": wanted.context,
        },
        "states": {"bytes_per_token": counts.state_bytes, "bytes_fixed": counts.fixed_state_bytes},
        "device": where,
    }
    return {**found, **_latency(wanted, counts, stored, where, device, progress)}


def count_program(wanted: EstimateRequest, captures: Captures | None = None) -> tuple[Counts, dict[str, str]]:
    """The counts of the Program of a configuration, and its formats; `captures` are those of other configurations."""
    fields: dict[str, Any] = {"checkpoint": wanted.checkpoint, "target": wanted.target, "dtype": wanted.dtype}
    recipe = make_recipe(
        {
            **fields,
            "quantize": {"format": wanted.quantize, "rounding": "rtn"},
            "revision": wanted.revision,
            "trust_remote_code": wanted.trust_remote_code,
        }
    )
    target = get_target(wanted.target)
    options = validate(target.Options, {}, where=f"options of target {target.name}")
    skips = target.capabilities(options, Phase.DECODE).skips_experts
    program = build_program(recipe, captures)
    return count(program, wanted.kept_share if skips else 1.0), formats(program)


def _device(device: Device) -> dict[str, Any]:
    return device.model_dump()


def here() -> dict[str, Any]:
    """This machine as a device: its bandwidth is measured once."""
    key = {"machine": machine(), "moec": moec.__version__}
    measured = cached("bandwidth", key, lambda: {"bandwidth": bandwidth()})
    assert measured is not None
    memory = int(psutil.virtual_memory().total)
    return {"name": HERE, "bandwidth": measured["bandwidth"], "memory": memory, "flops": None, "verified": True}


def _latency(
    wanted: EstimateRequest,
    counts: Counts,
    stored: Mapping[str, str],
    where: dict[str, Any],
    device: Device | None,
    progress: Progress,
) -> dict[str, Any]:
    """The roofline (a lower bound), on this machine also the time by measured speeds; memory; cost."""
    read = sum(counts.read_bytes.values()) + counts.states_at(wanted.context)
    roofline = read / where["bandwidth"]
    if where["flops"]:
        roofline = max(roofline, (counts.flops + counts.state_flops_at(wanted.context)) / where["flops"])
    found: dict[str, Any] = {"decode": {"roofline": roofline, "estimate": None, "residual": None}}
    if device is None and not cannot_measure(get_target(wanted.target)):
        measured = speeds(wanted.target, wanted.dtype, stored, progress)
        assert measured is not None
        found["decode"] |= {"estimate": measured.decode(counts, wanted.context), "residual": measured.residual}
    needed = counts.size + counts.states_at(wanted.context)
    found["memory"] = {"needed": needed, "available": where["memory"], "fits": needed <= where["memory"]}
    if wanted.price_per_hour is not None:
        seconds = found["decode"]["estimate"] or roofline
        found["cost_per_million_tokens"] = wanted.price_per_hour / 3600 * seconds * 1e6
    return found


def _states(states: Mapping[str, int]) -> str:
    """The size of the states of a sequence; those of recurrent layers do not grow."""
    growing = f"{states['bytes_per_token'] / 1e3:.3g} kB per token"
    fixed = states["bytes_fixed"]
    return f"{growing} and {fixed / 1e3:.3g} kB whatever the context" if fixed else growing


def describe(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The estimate as rows for people."""
    decode, memory, device = found["decode"], found["memory"], found["device"]
    unverified = "" if device["verified"] else " (figures not verified)"
    bound = f"at least {decode['roofline'] * 1e3:.3g} ms, by bandwidth and peak FLOP/s"
    rows = [
        ("weights", f"{found['weights']['bytes'] / 1e6:.1f} MB"),
        (
            "parameters",
            f"{found['parameters']['total'] / 1e6:.1f} M, {found['parameters']['active'] / 1e6:.1f} M active",
        ),
        ("states", _states(found["states"])),
        ("one token reads", f"{found['per_token']['bytes'] / 1e6:.1f} MB after {found['per_token']['context']} tokens"),
        ("one token computes", f"{found['per_token']['flops'] / 1e9:.3g} GFLOP"),
        ("device", f"{device['name']}{unverified}, {device['bandwidth'] / 1e9:.1f} GB/s"),
        ("decode", bound),
    ]
    if decode["estimate"] is not None:
        rows.append(
            ("decode, estimated", f"{decode['estimate'] * 1e3:.3g} ms (calibration within {decode['residual']:.0%})")
        )
    fits = "fits" if memory["fits"] else "does not fit"
    rows.append(("memory", f"{fits}: {memory['needed'] / 1e6:.0f} MB of {memory['available'] / 1e6:.0f} MB"))
    if "cost_per_million_tokens" in found:
        rows.append(("a million tokens", f"{found['cost_per_million_tokens']:.4g} in the unit of the price"))
    return rows
