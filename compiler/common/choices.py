"""Options with a fixed set of values, each defined together with its meaning."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Choice(StrEnum):
    """A value of an option: `NAME = "value", "what it means"`."""

    meaning: str

    def __new__(cls, value: str, meaning: str) -> Self:
        """Make a member, which is its value as a string."""
        member = str.__new__(cls, value)
        member._value_, member.meaning = value, meaning
        return member

    @classmethod
    def meanings(cls) -> str:
        """All values with what they mean, for the help of an option."""
        return "; ".join(f"{member}: {member.meaning}" for member in cls)
