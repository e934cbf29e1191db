"""`moec search`: find the best recipes of a model for several objectives."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.compiler.commands.flags import Group
from moec.compiler.commands.options import OutputConsole, Revision, Trust, panel
from moec.compiler.common.errors import OutputError, UsageError
from moec.compiler.common.validation import unknown

if TYPE_CHECKING:
    from moec.compiler.commands.console import Console
    from moec.compiler.search.front_file import Front, Member
    from moec.compiler.search.settings import Settings

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_GOALS = "perplexity, divergence, expert-flops, size, memory, bytes-per-token, decode.p50, prefill.p50"


_limit = panel("Limits")


@dataclass(frozen=True)
class LimitFlags(Group):
    """Upper limits of objectives, one flag per objective."""

    max_perplexity_increase: Annotated[str | None, _limit("SHARE", "Largest increase of perplexity: 1%.")] = None
    max_divergence: Annotated[str | None, _limit("NATS", "Largest KL divergence per token.")] = None
    max_expert_flops: Annotated[str | None, _limit("SHARE", "Largest share of the expert FLOPs.")] = None
    max_size: Annotated[str | None, _limit("BYTES", "Largest size of all weights: 4GB.")] = None
    max_memory: Annotated[str | None, _limit("BYTES", "Largest size of weights and states.")] = None
    max_bytes_per_token: Annotated[str | None, _limit("BYTES", "Most bytes read per token.")] = None
    max_decode: Annotated[str | None, _limit("TIME", "Longest decode step: 12ms.")] = None
    max_prefill: Annotated[str | None, _limit("TIME", "Longest prefill.")] = None

    def value(self) -> Mapping[str, str]:
        """Name of an objective -> the given text."""
        names = {
            "max_perplexity_increase": "perplexity",
            "max_decode": "decode.p50",
            "max_prefill": "prefill.p50",
        }
        given = {key: value for key, value in asdict(self).items() if value is not None}
        return {names.get(key, key.removeprefix("max_").replace("_", "-")): value for key, value in given.items()}


@dataclass(frozen=True)
class WantedFlags(Group):
    """Settings of a search."""

    target: Annotated[str | None, typer.Option("--target", "-t", help="Target of the recipes.")] = None
    objectives: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help=f"What to minimize: {_GOALS}. (default: perplexity,expert-flops,size)"),
    ] = None
    device: Annotated[str | None, typer.Option(help="Device profile. (default: this machine)")] = None
    dtype: Annotated[
        str | None, typer.Option(metavar="fp32|fp16", help="Precision of other weights than quantized ones.")
    ] = None
    population: Annotated[int | None, typer.Option(help="Individuals per generation. (default: 64)")] = None
    generations: Annotated[int | None, typer.Option(help="Number of generations. (default: 40)")] = None
    budget: Annotated[str | None, typer.Option(metavar="TIME", help="Time limit in place of --generations: 20m.")] = (
        None
    )
    text: Annotated[Path | None, typer.Option(help="Text to measure recipes on. (default: included text)")] = None
    held_out: Annotated[Path | None, typer.Option(help="Text to evaluate the front on. (default: included)")] = None
    windows: Annotated[int | None, typer.Option(help="Windows to measure a recipe on. (default: 32)")] = None
    held_out_windows: Annotated[int | None, typer.Option(help="Windows to evaluate the front on. (default: 96)")] = None
    members: Annotated[int | None, typer.Option(help="Number of members of the front to build. (default: 6)")] = None
    seed: Annotated[int | None, typer.Option(help="Seed of the random number generators. (default: 0)")] = None

    def value(self) -> Mapping[str, Any]:
        """Name of a setting -> the given value."""
        given = {key: value for key, value in asdict(self).items() if value is not None}
        if self.budget is not None:
            given["budget"] = parse_time(self.budget)
        return {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}


Limits = Annotated[Mapping[str, str], LimitFlags]
Wanted = Annotated[Mapping[str, Any], WantedFlags]


def search(
    wanted: Wanted,
    limits: Limits,
    console: OutputConsole,
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT|SEARCH", help="Directory or hub id; with --resume, a search."),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory of the search.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume a stopped search.")] = False,
    executor: Annotated[str, typer.Option(metavar="local|ray", help="Where recipes are measured and built.")] = "local",
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Number of workers.")] = 1,
    store: Annotated[Path | None, typer.Option(help="Directory of measurements that several searches share.")] = None,
    mlflow: Annotated[
        str | None, typer.Option(metavar="URI", help="Log the search as a run of this MLflow tracking server.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    **options: Any,
) -> int:
    """Search routing, pruning and formats of all layers together, and evaluate the best recipes on held-out text.

    Name a target to see its own options: moec search --target NAME --help.

    Build a recipe of the front with: moec export CHECKPOINT --recipe SEARCH/front/00.yaml -o out
    """
    with console.progress():
        # Imported first, so that nothing is written when the extra is missing.
        import moec.compiler.search.engine  # noqa: F401
        from moec.compiler.search.workers import EXECUTORS

        if executor not in EXECUTORS:
            raise unknown(executor, EXECUTORS, "unknown executor", "the executors")
        if mlflow is not None:
            from moec.compiler.search import tracking

            tracking.check(mlflow)
        own = {name: value for name, value in options.items() if value is not None}
        if resume:
            directory, settings = _resumed(checkpoint, {**wanted, **limits, **own}, output)
        else:
            asked = {**wanted, "options": own, "revision": revision, "trust_remote_code": trust_remote_code or None}
            directory, settings = _begun(checkpoint, asked, limits, output)
    front = _run(console, directory, settings, executor=executor, jobs=jobs, store=store)
    logged = None if mlflow is None else _logged(directory, front, mlflow)
    failed = [member.artifact.exit_code for member in front.members if member.artifact and member.artifact.exit_code]
    code = failed[0] if len(set(failed)) == 1 else int(bool(failed))

    def show() -> None:
        _show(console, front, directory)
        if logged is not None:
            console.line(f"MLflow: run {logged['run']} of experiment {logged['experiment']}")

    plain = front.model_dump(mode="json")
    console.result(plain if logged is None else {**plain, "mlflow": logged}, show, code)
    return code


def _resumed(location: str, given: Mapping[str, Any], output: Path | None) -> tuple[Path, Settings]:
    from moec.compiler.search.settings import resumed

    if given or output is not None:
        named = ", ".join(sorted(given)) or "--output"
        raise UsageError(
            f"{named} cannot be given with --resume: a resumed search keeps its settings",
            hint="start a new search in another directory; --store lets it reuse measurements",
        )
    directory = Path(location).expanduser()
    return directory, resumed(directory)


def _begun(
    checkpoint: str, asked: Mapping[str, Any], limits: Mapping[str, str], output: Path | None
) -> tuple[Path, Settings]:
    from moec.compiler.frontend.checkpoint import Checkpoint
    from moec.compiler.search.objectives import OBJECTIVES, parse_limit
    from moec.compiler.search.session import check_settings
    from moec.compiler.search.settings import begin, make_settings
    from moec.compiler.text.corpus import held_out_text, read_text
    from moec.compiler.text.tokenizer import open_tokenizer

    if output is None:
        raise UsageError("no directory is given for the search", hint="give -o DIRECTORY")
    if not asked.get("target"):
        raise UsageError("no target is given", hint="give --target NAME; 'moec doctor' lists them")
    parsed = {name: parse_limit(OBJECTIVES[name], value) for name, value in limits.items()}
    settings = make_settings({**asked, "checkpoint": checkpoint, "limits": parsed})
    # Unsupported objectives and missing texts are reported before anything is written.
    check_settings(settings)
    read_text(settings.text)
    held_out_text(settings.held_out)
    opened = Checkpoint.open(checkpoint, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    open_tokenizer(opened.directory)
    directory = output.expanduser()
    begin(directory, settings, opened)
    return directory, settings


def _run(
    console: Console, directory: Path, settings: Settings, *, executor: str, jobs: int, store: Path | None
) -> Front:
    from moec.compiler.search.report import write_report
    from moec.compiler.search.session import open_search, run_search
    from moec.compiler.search.truth import conclude

    with console.progress() as progress:
        found = open_search(settings, directory, progress)
        finished = run_search(found, directory, executor=executor, jobs=jobs, store=store, progress=progress)
        front = conclude(found, finished, directory, executor=executor, jobs=jobs, progress=progress)
        write_report(directory, front)
    return front


def _logged(directory: Path, front: Front, uri: str) -> Mapping[str, str]:
    """Log a finished search.

    Raises:
        OutputError: MLflow refuses; the hint says how to log it later.
    """
    from moec.compiler.search import tracking

    try:
        return tracking.log(directory, front, uri)
    except OutputError as error:
        raise OutputError(
            f"the search is finished, but not logged: {error.message}",
            hint=f"{directory} is complete; log it later: moec search {directory} --resume --mlflow {uri}",
        ) from error


def _show(console: Console, front: Front, directory: Path) -> None:
    from moec.compiler.search.objectives import OBJECTIVES, PERPLEXITY, shown

    goals = [OBJECTIVES[name] for name in front.objectives]

    def row(member: Member) -> tuple[str, ...]:
        judged = member.held_out
        cells = [shown(item, judged.values[item.name]) for item in goals]
        interval = f"[{judged.perplexity.low:+.2%}, {judged.perplexity.high:+.2%}]"
        built = "" if member.artifact is None else "failed" if member.artifact.exit_code else "proven"
        return (member.recipe, *cells, *((interval,) if PERPLEXITY in goals else ()), built)

    header = ("recipe", *front.objectives, *(("95 %",) if PERPLEXITY in goals else ()), "artifact")
    console.rows([row(member) for member in front.members], header=header)
    console.line(f"{front.individuals} individuals, {front.measured} of them measured, in {front.seconds:.0f} s")
    rank = front.surrogate.rank_correlation
    if rank is not None:
        verdict = "; its predictions mislead, so trust only measured values" if front.surrogate.misleads else ""
        console.line(f"surrogate: rank correlation {rank:.3f} on {front.surrogate.individuals} individuals{verdict}")
    for first, second in front.not_told_apart:
        console.line(f"the losses of {first} and {second} on held-out text do not differ significantly")
    console.line(f"report: {directory / 'report.html'}")


def parse_time(text: str) -> float:
    """Parse a time such as 90s, 20m or 2h into seconds.

    Raises:
        UsageError: The text is not a time.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z]*)", text.strip().lower())
    if not match or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UsageError(f"--budget {text}: not a time", hint="write 90s, 20m or 2h")
    return float(match[1]) * _UNITS[match[2]]
