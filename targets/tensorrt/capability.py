"""Compute capabilities of GPUs, as `8.9`, `89` or `sm_89`."""

from __future__ import annotations

from collections.abc import Iterable

SUPPORTED = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT for RTX builds for."""

DEFAULT = ("8.6", "8.9", "12.0")
DATA_CENTRE = {"9.0": "H100 and H200", "10.0": "B200", "10.3": "B300"}


def parse(wanted: Iterable[str]) -> tuple[str, ...]:
    """Capabilities in their usual form, sorted, each once.

    Raises:
        ValueError: One is none, or TensorRT for RTX does not build for it.
    """
    found = {_one(text) for text in wanted}
    if not found:
        raise ValueError(f"no compute capability is given: {', '.join(SUPPORTED)} are known")
    return tuple(sorted(found, key=lambda text: tuple(map(int, text.split(".")))))


def _one(text: str) -> str:
    digits = text.strip().lower().removeprefix("sm_").removeprefix("sm").replace(".", "")
    name = f"{digits[:-1]}.{digits[-1:]}"
    if name in DATA_CENTRE:
        raise ValueError(
            f"{name} ({DATA_CENTRE[name]}): TensorRT for RTX does not build for it. Classic TensorRT does, on the "
            "machine with that GPU, from the same files: export with --no-engine and run build_engine.py there"
        )
    if name not in SUPPORTED:
        raise ValueError(f"{text} is not among the compute capabilities {', '.join(SUPPORTED)}")
    return name


def sm(capability: str) -> str:
    """`8.9` -> `sm_89`."""
    return "sm_" + capability.replace(".", "")
