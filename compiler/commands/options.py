"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run modelling code that the checkpoint brings along.")
]
Revision = Annotated[str | None, typer.Option(metavar="BRANCH|TAG|COMMIT", help="Which revision of a hub id to take.")]
ArtifactDirectory = Annotated[Path, typer.Argument(metavar="DIRECTORY", help="The artifact.")]


def _sampling(text: str) -> Any:
    """A flag that goes over the model's own generation_config.json."""
    return typer.Option(help=f"{text} (default: the model's own)", rich_help_panel="Sampling")


MaxNewTokens = Annotated[int, typer.Option(min=1, help="At most so many new tokens.")]
Temperature = Annotated[float | None, _sampling("Divides the logits; 0 takes the most likely token.")]
TopK = Annotated[int | None, _sampling("Draw among the k most likely tokens; 0 means all.")]
TopP = Annotated[float | None, _sampling("Draw among the likeliest tokens that together reach p.")]
MinP = Annotated[float | None, _sampling("Leave out tokens below p times the likeliest one.")]
RepetitionPenalty = Annotated[float | None, _sampling("Above 1, tokens that occurred become less likely.")]
Seed = Annotated[int, typer.Option(help="Seed of the draws.", rich_help_panel="Sampling")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; may be repeated.")
]
Stats = Annotated[bool, typer.Option("--stats", help="Print counts and tokens per second on stderr.")]
Threads = Annotated[int, typer.Option(help="Threads of the runtime; 0 leaves it to the runtime.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="NAME=VALUE", help="Set an input that has a default, such as routing_budget."),
]
