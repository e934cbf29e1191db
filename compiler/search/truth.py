"""The end of a search: the front is evaluated on held-out text, and some of its members are built and gated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import moec
from moec.compiler.build.batch import build_matrix
from moec.compiler.build.cache import default_directory
from moec.compiler.build.estimate_calibration import undisturbed
from moec.compiler.build.matrix import Cell
from moec.compiler.build.worker import Outcome
from moec.compiler.common.digest import sha256_of_text
from moec.compiler.common.files import write_output
from moec.compiler.common.progress import Progress
from moec.compiler.measure.latency import process
from moec.compiler.measure.latency.timings import CANDIDATE, Series
from moec.compiler.search.archive import Individual
from moec.compiler.search.costs import CONTEXT
from moec.compiler.search.evaluation import Evaluator
from moec.compiler.search.front_file import (
    FILE,
    Built,
    Front,
    GenerationFacts,
    HeldOut,
    Interval,
    LayerChoice,
    Member,
    SurrogateFacts,
)
from moec.compiler.search.objectives import DECODE, DIVERGENCE, PERPLEXITY
from moec.compiler.search.session import Finished, Opened
from moec.compiler.search.settings import SPACE_HINT
from moec.compiler.search.store import Measured
from moec.compiler.search.surrogate import MISLEADS, rank_correlation
from moec.compiler.search.variant import FLOAT
from moec.compiler.text.corpus import held_out_text
from moec.compiler.text.perplexity import increase_interval, losses
from moec.passes.routing.policies.base import Policy
from moec.passes.routing.policies.table import parameters_of
from moec.targets.base import cannot_measure
from moec.targets.runners import limits_of

FOLDER, ARTIFACTS = "front", "artifacts"
USE_BATCHES = 2
"""Batches of held-out text on which the use of the experts is counted."""
MOST = 24
"""Maximum number of recipes that are kept; those that add most to the hypervolume are kept first."""


@dataclass(frozen=True)
class _Judged:
    """A member of the front with its measurements on held-out text.

    Attributes:
        name: Name of its recipe.
        individual: The individual of the search.
        held_out: Measurements on held-out text.
        fields: Fields of its recipe.
        tokens: Tokens of some held-out text that each expert computes, [layers][experts].
    """

    name: str
    individual: Individual
    held_out: Measured
    fields: dict[str, Any]
    tokens: list[list[int]]


def conclude(
    found: Opened, finished: Finished, directory: Path, *, executor: str, jobs: int, progress: Progress
) -> Front:
    """Write the recipes, evaluate and build them, and write front.json.

    Args:
        found: Model and text of the search.
        finished: Result of the search.
        directory: Directory of the search.
        executor: "local" or "ray": where members are built.
        jobs: Number of parallel builds.
        progress: Progress callback.

    Raises:
        CheckpointError: The held-out text is missing or too short.
        OutputError: The directory cannot be written.
    """
    text = held_out_text(found.settings.held_out)
    held = found.evaluator.on(text, found.settings.held_out_windows)
    reference = held.evaluate({}, 0, len(held.windows))
    judged = []
    chosen = _chosen(finished)
    for number, individual in enumerate(chosen):
        progress("held-out text", number, len(chosen))
        judged.append(_judge(found, held, directory, f"{number:02d}", individual))
    progress("held-out text", len(chosen), len(chosen))
    outcomes = _built(found, finished, judged, directory, executor=executor, jobs=jobs, progress=progress)
    members = [_member(found, finished, held, reference, one, outcomes.get(one.name), directory) for one in judged]
    front = _front(found, finished, text, members, judged, held.expert_use({}, USE_BATCHES))
    write_output(directory / FILE, front.model_dump_json(indent=2) + "\n", hint=SPACE_HINT)
    return front


def _chosen(finished: Finished) -> list[Individual]:
    search, front = finished.search, finished.search.archive.front
    rows = np.array([search.archive.row(item.values) for item in front])
    best = {index for index, _ in search.volume.best(np.zeros((0, rows.shape[1])), rows, MOST)}
    return [item for index, item in enumerate(front) if index in best or len(front) <= MOST]


def _judge(found: Opened, held: Evaluator, directory: Path, name: str, individual: Individual) -> _Judged:
    variant = found.space.variant(np.array(individual.genome))
    sections = variant.sections(found.evaluator.parts)
    settings = found.settings
    fields = {
        "checkpoint": str(found.evaluator.checkpoint.directory.resolve())
        if settings.revision is None
        else settings.checkpoint,
        "target": settings.target,
        "dtype": settings.dtype,
        "options": settings.options,
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
        **sections,
    }
    if settings.text is not None:
        where = str(Path(settings.text).resolve())
        fields |= {"quantize": {**sections["quantize"], "calibration": where}} if "quantize" in sections else {}
        fields |= {"routing": {**sections["routing"], "text": where}} if "routing" in sections else {}
    plain = {key: value for key, value in fields.items() if value not in (None, {}, False)}
    write_output(
        directory / FOLDER / f"{name}.yaml", yaml.safe_dump(plain, sort_keys=False, width=120), hint=SPACE_HINT
    )
    judged = held.evaluate(sections, 0, len(held.windows))
    return _Judged(name, individual, judged, plain, held.expert_use(sections, USE_BATCHES))


def _built(
    found: Opened,
    finished: Finished,
    judged: Sequence[_Judged],
    directory: Path,
    *,
    executor: str,
    jobs: int,
    progress: Progress,
) -> dict[str, Outcome]:
    """Build and gate the members that add most to the hypervolume."""
    search = finished.search
    rows = np.array([search.archive.row(one.individual.values) for one in judged])
    best = search.volume.best(np.zeros((0, rows.shape[1])), rows, found.settings.members)
    cells = [Cell(judged[index].name, judged[index].fields) for index in sorted(index for index, _ in best)]
    if not cells:
        return {}
    outcomes = build_matrix(
        cells,
        directory / ARTIFACTS,
        cache=default_directory(),
        jobs=jobs,
        executor="ray" if executor == "ray" else "process",
        progress=progress,
    )
    return {outcome.name: outcome for outcome in outcomes}


def _member(
    found: Opened,
    finished: Finished,
    held: Evaluator,
    reference: Measured,
    one: _Judged,
    outcome: Outcome | None,
    directory: Path,
) -> Member:
    variant = found.space.variant(np.array(one.individual.genome))
    kept = np.mean(np.array(one.individual.measured.kept), axis=0)
    layers = [
        LayerChoice(rule=_described(policy), kept=float(share), removed=len(removed), tokens=tokens)
        for policy, share, removed, tokens in zip(variant.policies, kept, variant.removed, one.tokens, strict=True)
    ]
    formats = {
        part.name: text for part, text in zip(found.evaluator.parts, variant.formats, strict=True) if text != FLOAT
    }
    recipe = f"{FOLDER}/{one.name}.yaml"
    predicted = one.individual.predicted
    return Member(
        name=one.name,
        recipe=recipe,
        command=f"moec export --recipe {directory / recipe} -o out",
        values=_named(finished, one.individual.values),
        predicted=None if predicted is None else predicted[0],
        generation=one.individual.generation,
        layers=layers,
        formats=formats,
        held_out=_held_out(found, finished, reference, one),
        artifact=None if outcome is None else _artifact(found, finished, held, reference, outcome, directory),
    )


def _named(finished: Finished, values: Any) -> dict[str, float]:
    wanted = {item.name for item in (*finished.search.archive.objectives, *finished.search.archive.limits)}
    return {name: float(value) for name, value in values.items() if name in wanted}


def _described(policy: Policy | None) -> str:
    if policy is None:
        return ""
    defaults = {field.name: field.default for field in fields(policy)}
    parameters = {key: value for key, value in parameters_of(policy).items() if value != defaults[key]}
    return " ".join([policy.name, *(f"{key}={_numbers(value)}" for key, value in parameters.items())])


def _numbers(value: Any) -> str:
    """A parameter, which for some policies is one number per layer."""
    return ",".join(f"{item:g}" for item in value) if isinstance(value, tuple) else f"{value:g}"


def _held_out(found: Opened, finished: Finished, reference: Measured, one: _Judged) -> HeldOut:
    differences = np.array(one.held_out.losses) - np.array(reference.losses)
    low, high = increase_interval(differences)
    increase, divergence = math.expm1(float(differences.mean())), float(np.mean(one.held_out.divergences))
    kept = np.mean(np.array(one.held_out.kept), axis=0)
    counted = found.costs.of(found.space.variant(np.array(one.individual.genome)), kept)
    values = {**counted, PERPLEXITY.name: increase, DIVERGENCE.name: divergence}
    interval = Interval(value=increase, low=low, high=high)
    return HeldOut(perplexity=interval, divergence=divergence, values=_named(finished, values))


def _artifact(
    found: Opened, finished: Finished, held: Evaluator, reference: Measured, outcome: Outcome, directory: Path
) -> Built:
    where = directory / ARTIFACTS / outcome.name
    judged = seconds = None
    if outcome.bytes and where.is_dir():
        runner = found.target.open_reference(where, threads=0)
        most = limits_of(runner).max_sequence
        if most is None or most >= held.windows.shape[1]:
            differences = losses(runner, held.windows) - np.array(reference.losses)
            low, high = increase_interval(differences)
            judged = HeldOut(perplexity=Interval(value=math.expm1(float(differences.mean())), low=low, high=high))
        if DECODE in finished.search.archive.objectives and not cannot_measure(found.target):
            seconds = _decode_seconds(where)
    return Built(
        directory=f"{ARTIFACTS}/{outcome.name}",
        exit_code=outcome.exit_code,
        summary=outcome.summary,
        bytes=outcome.bytes,
        verdicts=dict(outcome.verdicts),
        held_out=judged,
        decode_seconds=seconds,
    )


SECONDS = 8.0
"""Seconds for the measurement of a member's decode step."""


def _decode_seconds(artifact: Path) -> float | None:
    job = {"kind": "warm", "artifacts": {CANDIDATE: str(artifact)}, "contexts": [CONTEXT], "demands": [], "threads": 1}
    series = process.measure({**job, "seconds": SECONDS})["series"].get(f"decode{CONTEXT}")
    return None if series is None else undisturbed(Series.of(series[CANDIDATE]))


def _front(
    found: Opened,
    finished: Finished,
    text: str,
    members: list[Member],
    judged: Sequence[_Judged],
    pretrained_tokens: list[list[int]],
) -> Front:
    search, archive = finished.search, finished.search.archive
    names = [item.name for item in archive.objectives]

    def volume(values: Sequence[dict[str, float]]) -> float:
        return search.volume.of(np.array([[each[name] for name in names] for each in values]))

    return Front(
        moec=moec.__version__,
        settings=found.settings.model_dump(mode="json"),
        source=dict(sorted(found.evaluator.checkpoint.digests.items())),
        texts={"search": sha256_of_text(found.evaluator.text), "held_out": sha256_of_text(text)},
        objectives=names,
        worst=dict(zip(names, map(float, search.worst), strict=True)),
        hypervolume={
            "search": volume([member.values for member in members]),
            "held_out": volume([member.held_out.values for member in members]),
        },
        individuals=len(search.seen),
        measured=len(archive.found),
        given_up=len(archive.found) - len(archive.complete),
        lost=finished.lost,
        single_choices=finished.sensitivity_runs,
        seconds=finished.seconds,
        members=members,
        pretrained_tokens=pretrained_tokens,
        not_told_apart=_not_told_apart(judged),
        surrogate=surrogate_facts(finished),
        generations=[GenerationFacts(**asdict(generation)) for generation in search.generations],
    )


def surrogate_facts(finished: Finished) -> SurrogateFacts:
    """Accuracy of predictions that were made before their individuals were measured."""
    archive = finished.search.archive
    pairs = [
        (item.predicted[0], float(archive.differences(item.measured).mean()))
        for item in archive.complete
        if item.predicted is not None
    ]
    rank = rank_correlation([first for first, _ in pairs], [second for _, second in pairs])
    return SurrogateFacts(
        rank_correlation=None if math.isnan(rank) else rank,
        individuals=len(pairs),
        misleads=not math.isnan(rank) and rank < MISLEADS,
        predicted=[first for first, _ in pairs],
        measured=[second for _, second in pairs],
    )


def _not_told_apart(judged: Sequence[_Judged]) -> list[tuple[str, str]]:
    found = []
    for first, second in pairwise(judged):
        low, high = increase_interval(np.array(second.held_out.losses) - np.array(first.held_out.losses))
        if low <= 0 <= high:
            found.append((first.name, second.name))
    return found
