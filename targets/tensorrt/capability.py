"""Compute capabilities of GPUs, written `8.9`, `89` or `sm_89`."""

from __future__ import annotations

from collections.abc import Iterable

SUPPORTED = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT for RTX supports."""

DEFAULT = ("8.6", "8.9", "12.0")
DATA_CENTRE = {"9.0": "H100 and H200", "10.0": "B200", "10.3": "B300"}


def parse(wanted: Iterable[str]) -> tuple[str, ...]:
    """Parse compute capabilities into the form `8.9`, sorted and without duplicates.

    Raises:
        ValueError: One is not a compute capability, or TensorRT for RTX does not support it.
    """
    found = {_parse_one(text) for text in wanted}
    if not found:
        raise ValueError(f"no compute capability given; supported are {', '.join(SUPPORTED)}")
    return tuple(sorted(found, key=lambda text: tuple(map(int, text.split(".")))))


def _parse_one(text: str) -> str:
    digits = text.strip().lower().removeprefix("sm_").removeprefix("sm").replace(".", "")
    name = f"{digits[:-1]}.{digits[-1:]}"
    if name in DATA_CENTRE:
        raise ValueError(
            f"{name} ({DATA_CENTRE[name]}) is not supported by TensorRT for RTX. Classic TensorRT supports it: export "
            "with --no-engine and run build_engine.py on the machine with that GPU"
        )
    if name not in SUPPORTED:
        raise ValueError(f"{text} is not one of the compute capabilities {', '.join(SUPPORTED)}")
    return name


def sm(capability: str) -> str:
    """`8.9` -> `sm_89`."""
    return "sm_" + capability.replace(".", "")
