"""The commands that a user of a new artifact is likely to want; a target chooses three."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NextStep:
    """A command for an artifact that was just built.

    Attributes:
        command: The command line, with `{directory}` for the artifact and `{checkpoint}` for what it was built from.
        does: What it does, in a few words.
    """

    command: str
    does: str


CHAT = NextStep("moec chat {directory}", "holds a conversation")
SERVE = NextStep("moec serve {directory}", "serves OpenAI's HTTP API")
VALIDATE = NextStep("moec validate {directory} --against {checkpoint}", "runs the gates where it will be used")
