"""A finished search as a run of MLflow: settings, progress by generation, and the front with its recipes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moec.compiler.build.mlflow_server import begin_run, connected
from moec.compiler.search.front_file import FILE, Front
from moec.compiler.search.report import REPORT
from moec.compiler.search.settings import FILE as SETTINGS_FILE

LONGEST = 500
"""Characters of a parameter that every release of MLflow takes."""
FOLDER = "front"


def check(uri: str) -> None:
    """Ask the server anything, so that a wrong address is found before the search and not after it.

    Raises:
        MissingExtraError: MLflow is not installed.
        OutputError: The server cannot be reached.
    """
    with connected(uri) as client:
        client.search_experiments(max_results=1)


def log(directory: Path, front: Front, uri: str) -> dict[str, str]:
    """Log a search as a run of the experiment that has the name of the model.

    Parameters are the settings, metrics with steps the progress by generation, other metrics the results, and artifacts
    front.json, report.html, search.json and the recipes of the front.

    Args:
        directory: The directory of the search, which is finished.
        front: Its front.
        uri: Tracking URI.

    Returns:
        `experiment` and `run`, its id.

    Raises:
        MissingExtraError: MLflow is not installed.
        OutputError: MLflow refuses.
    """
    experiment = Path(str(front.settings["checkpoint"])).name
    with connected(uri) as client:
        run = begin_run(client, experiment, "search").info.run_id
        for key, value in _parameters(front):
            client.log_param(run, key, value)
        for key, number, step in _metrics(front):
            client.log_metric(run, key, number, step=step)
        for name in (FILE, REPORT, SETTINGS_FILE):
            client.log_artifact(run, str(directory / name))
        if (directory / FOLDER).is_dir():
            client.log_artifacts(run, str(directory / FOLDER), FOLDER)
        client.set_terminated(run)
    return {"experiment": experiment, "run": run}


def _parameters(front: Front) -> Iterator[tuple[str, str]]:
    for key, value in sorted(front.settings.items()):
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", str(item)[:LONGEST]) for name, item in sorted(value.items()))
        elif value is not None:
            yield key, str(value)[:LONGEST]
    yield "moec", front.moec


def _metrics(front: Front) -> Iterator[tuple[str, float, int]]:
    """Name, value and step of each metric; the step of a result is the last generation."""
    for generation in front.generations:
        step = generation.number
        yield "hypervolume", generation.volume, step
        yield "individuals", float(generation.individuals), step
        yield "measured", float(generation.measured), step
        yield "front", float(generation.front), step
    last = front.generations[-1].number if front.generations else 0
    results: dict[str, Any] = {f"hypervolume.{name}": value for name, value in front.hypervolume.items()}
    results |= {"seconds": front.seconds, "surrogate.rank_correlation": front.surrogate.rank_correlation}
    for name in front.objectives:
        values = [member.held_out.values[name] for member in front.members if name in member.held_out.values]
        results[f"least.{name}"] = min(values, default=None)
    yield from ((name, float(value), last) for name, value in results.items() if value is not None)
