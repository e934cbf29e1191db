"""`moec inspect`, `moec doctor` and `moec families`: information about models and this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from moec.compiler.commands.artifacts import packed_rows
from moec.compiler.commands.console import Console
from moec.compiler.commands.options import OutputConsole, Revision, Trust, resolved


def inspect(
    console: OutputConsole,
    location: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|DIRECTORY",
            help="Checkpoint, hub id or artifact.",
            callback=lambda given: str(resolved(Path(given))),
        ),
    ],
    text: Annotated[str | None, typer.Option(help="Colour this text by the experts that each token uses.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="The checkpoint of the artifact, for --text.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> int:
    """Show layers, experts, parameters, states, what can be captured, and files."""
    from moec.compiler.report.describe import describe

    if text is not None:
        with console.progress():
            from moec.compiler.commands.token_view import coloured, experts_by_token

            view = experts_by_token(location, text, against, trust_remote_code=trust_remote_code)
        console.result({"tokens": view}, lambda: console.show(coloured(view)))
        return 0
    with console.progress():
        from moec.compiler.report import inspect as inspection

        found = inspection.inspect(location, revision=revision, trust_remote_code=trust_remote_code)
        if found["kind"] == "artifact":
            from moec.compiler.run.packing import packed_of

            found["packed"] = packed_of(Path(location).expanduser())

    def show() -> None:
        if "summary" in found:
            console.summary(found["summary"])
            console.line("")
        console.rows([*describe(found), *(packed_rows(found["packed"]) if found.get("packed") else ())])

    console.result(found, show)
    return 0


def doctor(console: OutputConsole) -> int:
    """Show which targets can be built, run and measured here, and the pip commands that add the others."""
    with console.progress():
        from moec.compiler.commands.doctor import doctor as examine

        found = examine()

    def show() -> None:
        console.rows(found["environment"].items())
        console.line("")
        columns = ("build", "run", "measure")
        rows = [(name, *(facts.get(column, "") for column in columns)) for name, facts in found["targets"].items()]
        console.rows(rows, header=("target", *columns))
        console.line("")
        commands = [(f"moec {name}", facts["run"]) for name, facts in found["commands"].items()]
        console.rows(commands, header=("command", "run"))
        if found["gaps"]:
            console.line("\nTo add what is missing:")
            width = max(map(len, found["gaps"]))
            lines = [f"{command:{width}}  # {', '.join(adds)}" for command, adds in found["gaps"].items()]
            console.line("\n".join(lines))

    console.result(found, show)
    return 0


def families(
    console: OutputConsole,
    names: Annotated[list[str] | None, typer.Argument(help="Families; all if none is named.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Build a tiny model of each family, capture it and prove it.")
    ] = False,
    target: Annotated[str | None, typer.Option("--target", "-t", help="Lower to this target too.")] = None,
    recipe: Annotated[
        list[Path] | None,
        typer.Option("--recipe", help="Build each family by this recipe without a checkpoint; may be repeated."),
    ] = None,
    released: Annotated[
        bool, typer.Option("--released", help="Check released models, each for every target in four configurations.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option(help="With --released: file of results; only missing ones are built and added.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the table (Markdown) here.")] = None,
) -> int:
    """List the model families of which moec has tiny models, or check what works for each."""
    from moec.compiler.commands.flags import given

    if released:
        return _released(console, names or (), target, resume, output)
    with console.progress():
        from moec.compiler.families import families_page as checks
        from moec.compiler.pipeline.recipe import read_recipe

    chosen = checks.choose(names or ())
    if not check:
        console.result({"families": list(chosen)}, lambda: console.line("\n".join(chosen)))
        return 0
    with console.progress() as progress:
        recipes = {path.stem: {**read_recipe(path), **given({"target": target})} for path in recipe or ()}
        if target and not recipes:
            recipes = {target: {"target": target}}
        rows = checks.check(chosen, recipes, progress=progress)
    flags = [("--target", target), *(("--recipe", path) for path in recipe or ()), ("-o", output)]
    words = [
        "moec families",
        *(names or ()),
        "--check",
        *(f"{flag} {value}" for flag, value in flags if value is not None),
    ]
    page = checks.markdown(rows, " ".join(words))
    if output is not None:
        checks.write_page(output, page)
    console.result({"families": [row.as_dict() for row in rows]}, lambda: console.line(page))
    return 0


def _released(
    console: Console, names: Sequence[str], target: str | None, resume: Path | None, output: Path | None
) -> int:
    from dataclasses import asdict

    from moec.compiler.families import released_page
    from moec.compiler.families.families_page import write_page

    chosen = released_page.choose(names)
    with console.progress() as progress:
        targets = (target,) if target else released_page.TARGETS
        cells = released_page.check(chosen, targets, resume=resume, progress=progress)
    flags = [("--target", target), ("--resume", resume), ("-o", output)]
    words = ["moec families", *names, "--released", *(f"{flag} {value}" for flag, value in flags if value is not None)]
    page = released_page.markdown(cells, " ".join(words))
    if output is not None:
        write_page(output, page)
    console.result({"released": [asdict(cell) for cell in cells]}, lambda: console.line(page))
    return 0
