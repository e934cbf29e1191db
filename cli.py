"""The `moec` command: it parses the command line, calls the compiler and prints the result or the error.

Heavy modules are imported inside the commands, so that `moec --help` answers at once.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

import moec
from moec.compiler.commands import publishing, zoo
from moec.compiler.commands.artifacts import pack, verify
from moec.compiler.commands.chat import chat
from moec.compiler.commands.compare import compare
from moec.compiler.commands.console import LOG_FORMAT, Console, accept_any_character, loading
from moec.compiler.commands.drift import drift
from moec.compiler.commands.estimation import estimate
from moec.compiler.commands.flags import with_groups
from moec.compiler.commands.generation import run
from moec.compiler.commands.inspection import doctor, families, inspect
from moec.compiler.commands.options import (
    DefaultGroup,
    Demands,
    OutputConsole,
    Quantize,
    Revision,
    Routing,
    Trust,
    resolved,
)
from moec.compiler.commands.pipelines import build, diff
from moec.compiler.commands.search import search
from moec.compiler.commands.serve import serve
from moec.compiler.commands.web import web
from moec.compiler.common.errors import MoecError, UsageError, out_of_memory
from moec.compiler.common.memory import check_address_space, keep_freed_memory
from moec.compiler.common.threads import environment


def _targets() -> list[str]:
    """The names that `--target` may have, for completion in a shell."""
    from moec.targets import target_names

    return list(target_names())


def export(
    routing: Routing,
    quantize: Quantize,
    demands: Demands,
    console: OutputConsole,
    checkpoint: Annotated[str | None, typer.Argument(help="Directory or hub id; may be in the recipe instead.")] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="Name of the target; 'moec doctor' lists them.", autocompletion=_targets),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory to make.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="fp32|fp16", help="Precision of what is not quantized. (default: the target's)"),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe file (YAML), or zoo:MODEL/NAME; other flags override it.")
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Calibration text (file or directory), or a JSON file of moec calibrate."),
    ] = None,
    inputs_embeds: Annotated[
        bool, typer.Option("--inputs-embeds", help="Add an input of embeddings, for example of images.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact at the output.")] = False,
    no_gates: Annotated[bool, typer.Option("--no-gates", help="Run no gates on the artifact.")] = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    **options: Any,
) -> int:
    """Compile CHECKPOINT into an artifact and prove it by gates.

    The options of a target are shown by: moec export --target NAME --help.
    """
    from moec.compiler.commands.flags import sections_of_flags

    if output is None:
        raise UsageError("no output directory is given", hint="give -o DIRECTORY")
    common = {
        "checkpoint": checkpoint,
        "target": target,
        "dtype": dtype,
        "inputs_embeds": inputs_embeds or None,
        "revision": revision,
        "trust_remote_code": trust_remote_code or None,
    }
    routed = {**routing.section(), "max_quality_loss": demands.max_quality_loss}
    flags = {"routing": routed, "quantize": quantize.section(), **demands.sections()}
    given = {**common, **sections_of_flags(flags, calibration or ()), **options}
    with console.progress() as progress:
        # Imports of torch and others take seconds, so something is shown before them.
        from moec.compiler.api import merge
        from moec.compiler.pipeline.input_checks import check_inputs
        from moec.compiler.zoo.entries import caution

        wanted = merge(recipe, given)
        check_inputs(wanted, output, overwrite=overwrite)
        from moec.compiler.pipeline.export import compile_recipe

        result = compile_recipe(wanted, output, overwrite=overwrite, gates=not no_gates, progress=progress)
    code = console.verdicts(result, wanted.checkpoint)
    if said := caution(str(recipe or ""), result.manifest["source"]["digests"]):
        console.note(said)
    return code


def calibrate(
    console: OutputConsole,
    checkpoint: Annotated[str, typer.Argument(help="Directory or hub id.")],
    policy: Annotated[str, typer.Option("--policy", help="Routing policy, such as top-p.")],
    budget: Annotated[str, typer.Option("--budget", metavar="0.5,0.6,...", help="Shares of the slots to keep.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    text: Annotated[Path | None, typer.Option(help="A text file or a directory. (default: moec's own)")] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> int:
    """Fit a routing policy to expert budgets; 'moec export --calibration FILE' takes the result."""
    with console.progress() as progress:
        from moec.compiler.pipeline import routing as plans

        budgets = plans.parse_budgets(budget)
        found = plans.calibrate_file(
            checkpoint,
            policy,
            budgets,
            output,
            text=text,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    rows = [(f"{entry['budget']:g}", f"{entry['kept_share']:.1%}") for entry in found["entries"]]
    console.result(found, lambda: console.rows(rows, header=("budget", "slots kept")))
    return 0


def validate(
    demands: Demands,
    console: OutputConsole,
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="An artifact, or a model file of another exporter (docs/foreign.md).",
            callback=resolved,
        ),
    ],
    against: Annotated[str, typer.Option(metavar="CHECKPOINT", help="The checkpoint it was built from.")],
    bindings: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML file: names of inputs and states of a file of another exporter."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="For a file of another exporter: where the report goes. (./NAME.report)"),
    ] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> int:
    """Run the gates again on an existing artifact, or judge a model file that another exporter made."""
    from moec.compiler.commands.flags import sections_of_flags

    common: dict[str, Any] = {
        "demands": sections_of_flags(demands.sections()),
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    with console.progress() as progress:
        from moec.compiler.foreign.validate import is_foreign, validate_foreign
        from moec.compiler.pipeline.export import validate_artifact

        if is_foreign(path):
            result = validate_foreign(path, against, bindings=bindings, output=output, progress=progress, **common)
        elif bindings is not None or output is not None:
            raise UsageError(
                f"{path}: --bindings and --output are for model files of other exporters",
                hint="the report of an artifact is written into it",
            )
        else:
            result = validate_artifact(path, against, progress=progress, **common)
    return console.verdicts(result, against)


def _guarded(
    command: Callable[..., int], *, compiles: bool, started: Callable[[], None] = lambda: None
) -> Callable[..., None]:
    """Wrap a command so that an exception becomes a message and an exit code.

    Args:
        command: The command.
        compiles: Whether it needs the memory of an export.
        started: Called when the command line was right and the command starts.
    """

    @functools.wraps(command)
    def guarded(**arguments: Any) -> None:
        started()

        def call() -> int:
            if compiles:
                check_address_space()
            return command(**arguments)

        console = Console(arguments.get("json_output", False), debug=arguments.get("debug", False))
        raise typer.Exit(_guard(console, call))

    return guarded


def _guard(console: Console, call: Callable[[], int]) -> int:
    try:
        return call()
    except KeyboardInterrupt:
        return console.interrupted()
    except Exception as error:  # noqa: BLE001 - the top level: an unexpected exception is reported as a fault of moec
        known = out_of_memory(error) or error
        return console.error(known) if isinstance(known, MoecError) else console.crash(known)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moec {moec.__version__}")
        raise typer.Exit


def _application(arguments: list[str], started: Callable[[], None] = lambda: None) -> typer.Typer:
    """The application; `export` and `search` have the flags of the target that the command line or its recipe names.

    `started` is called when the command line was right and a command starts.
    """
    app = typer.Typer(name="moec", no_args_is_help=True, pretty_exceptions_enable=False)

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
        ] = False,
        _log_format: Annotated[
            str, typer.Option("--log-format", metavar="text|json", help="Format of stderr, also after a command.")
        ] = "text",
    ) -> None:
        """Compile Mixture-of-Experts checkpoints into deployable artifacts, with proof."""

    for function in (export, search):
        flagged = _with_target_flags(function, arguments)
        app.command(function.__name__)(_guarded(flagged, compiles=True, started=started))
    compiling = (build, calibrate, estimate, validate, families, drift)
    for command in (*compiling, verify, pack, run, chat, serve, web, inspect, diff, compare, doctor):
        compiles = command in compiling
        app.command(command.__name__)(_guarded(with_groups(command), compiles=compiles, started=started))
    for title, group in (("publish", publishing), ("zoo", zoo)):
        several = typer.Typer(cls=DefaultGroup, no_args_is_help=group is publishing, help=group.TITLE)
        for name, command in group.COMMANDS.items():
            several.command(name)(_guarded(with_groups(command), compiles=False, started=started))
        app.add_typer(several, name=title)
    return app


def _with_target_flags(function: Callable[..., int], arguments: list[str]) -> Callable[..., int]:
    """A command with the flags of the target that the command line, not parsed yet, names for it."""
    from moec.compiler.commands.flags import completed_words, named_target, with_flags, without_flags

    command, completed = with_groups(function), completed_words()
    words = completed or arguments
    try:
        name = named_target(words) if words[:1] == [function.__name__] else None
        if name is None:
            return without_flags(command)
        from moec.targets import get_target

        return with_flags(command, get_target(name).Options.model_fields, f"Options of target {name}")
    except MoecError:
        # The name is still being typed.
        if completed:
            return without_flags(command)
        raise


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    """Exit through every `finally`, so that nothing half-written is left."""
    raise SystemExit(128 + signal.SIGTERM)


def _choose_log_format(arguments: list[str]) -> list[str]:
    """Remove `--log-format` from anywhere in a command line, and set its environment variable.

    Raises:
        UsageError: Its value is neither "text" nor "json".
    """
    from moec.compiler.commands.flags import find_flag

    chosen = find_flag(arguments, "--log-format")
    if chosen not in {None, "text", "json"}:
        raise UsageError(f"--log-format: {chosen!r} is not a format of the log", hint="give text or json")
    if chosen is None:
        return arguments
    os.environ[LOG_FORMAT] = chosen
    rest = [item for item in arguments if not item.startswith("--log-format=")]
    while "--log-format" in rest:
        position = rest.index("--log-format")
        del rest[position : position + 2]
    return rest


def dispatch(arguments: list[str]) -> int:
    """Run a command line without the name of the program, and return its exit code."""
    console = Console("--json" in arguments, debug="--debug" in arguments)
    started = threading.Event()

    def call() -> int:
        try:
            chosen = _choose_log_format(arguments)
            with loading(chosen):
                application = _application(chosen, started.set)
            application(chosen, prog_name="moec")
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else int(done.code is not None)
            return console.wrong_usage(code) if code and not started.is_set() else code
        return 0

    return _guard(console, call)


def main() -> None:
    """Entry point of the `moec` command."""
    signal.signal(signal.SIGTERM, _terminate)
    accept_any_character()
    # Set before torch is imported; variables of the user win.
    os.environ.update({**environment(), **os.environ})
    keep_freed_memory()
    arguments = sys.argv[1:]
    if "--debug" not in arguments:
        # Warnings of torch, torchao and transformers are about their own internals.
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    raise SystemExit(dispatch(arguments))


if __name__ == "__main__":
    main()
