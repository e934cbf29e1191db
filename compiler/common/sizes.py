"""Amounts with a unit, such as 2GB or 12ms. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping

from moec.compiler.common.errors import UsageError

BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

_AMOUNT = re.compile(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]+)")


def amount(text: str, units: Mapping[str, float], where: str) -> float:
    """A positive number with a unit, in the smallest unit.

    Args:
        text: What the user gave, such as "1.5GB".
        units: Name of each unit -> its size.
        where: What has this value, for the message.

    Raises:
        UsageError: It is not a positive number with one of these units.
    """
    match = _AMOUNT.fullmatch(text)
    if not match or match[2] not in units or not float(match[1]):
        raise UsageError(
            f"{where} has the value '{text}'", hint=f"give a positive number with a unit: {', '.join(units)}"
        )
    return float(match[1]) * units[match[2]]


def byte_count(text: str, where: str) -> int:
    """A size in bytes; see `amount`."""
    return int(amount(text.strip(), BYTES, where))


def size_text(count: float) -> str:
    """Bytes with a decimal unit, such as "1.5 MB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
