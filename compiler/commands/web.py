"""`moec web`: an artifact as a web page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moec.compiler.commands.options import ArtifactDirectory, OutputConsole


def web(
    console: OutputConsole,
    directory: ArtifactDirectory,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")],
    packages: Annotated[
        Path | None, typer.Option(metavar="DIRECTORY", help="Folder with the npm packages. (default: npm fetches them)")
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page. (default: the name of the artifact)")] = "",
) -> int:
    """Make a web page that runs a model in the browser: a folder for any static server."""
    with console.progress() as progress:
        from moec.compiler.web.site import make_site

        site = make_site(directory, output, packages=packages, title=title, progress=progress)
    found = {"directory": str(site.directory), "model_bytes": site.model_bytes, "page_bytes": site.page_bytes}

    def show() -> None:
        console.line(
            f"{site.directory}: a page of {site.page_bytes / 1e6:.1f} MB and a model of {site.model_bytes / 1e6:.1f} MB"
        )
        console.line(f"serve it with: python -m http.server --bind 127.0.0.1 --directory {site.directory} 8000")

    console.result(found, show)
    return 0
