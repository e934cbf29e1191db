"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run modelling code that the checkpoint brings along.")
]
Revision = Annotated[str | None, typer.Option(metavar="BRANCH|TAG|COMMIT", help="Which revision of a hub id to take.")]
ArtifactDirectory = Annotated[Path, typer.Argument(metavar="DIRECTORY", help="The artifact.")]
