"""Device profiles in `devices/*.yaml`: published figures with their sources."""

from __future__ import annotations

import importlib.resources

import yaml
from pydantic import BaseModel, ConfigDict, Field

from moec.compiler.common.validation import unknown


class Device(BaseModel):
    """Peak figures of a device, which a runtime does not reach."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="Name for people.")
    bandwidth: float = Field(gt=0, description="Memory bandwidth, bytes per second.")
    memory: int = Field(gt=0, description="Memory, bytes, including what other software uses.")
    flops: float | None = Field(default=None, gt=0, description="Peak FLOP per second in 16 bits, dense; if published.")
    source: str = Field(description="Where the figures are from.")
    verified: bool = Field(description="Whether somebody compared this file with the source.")


def device_names() -> tuple[str, ...]:
    """Names of the profiles, sorted."""
    folder = importlib.resources.files("moec").joinpath("compiler", "measure", "estimate", "devices")
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


def load_device(name: str) -> Device:
    """The device profile `name`.

    Raises:
        UsageError: The device is unknown; the hint has the nearest name.
    """
    if name not in device_names():
        raise unknown(name, device_names(), "unknown device", "the devices")
    file = importlib.resources.files("moec").joinpath("compiler", "measure", "estimate", "devices", f"{name}.yaml")
    return Device.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
