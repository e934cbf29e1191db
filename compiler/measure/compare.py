"""`moec compare`: several artifacts of one model on the same held-out text and the same turns of latency.

Quality is paired by windows and judged by the bootstrap interval of the quality gate (95 %); latency is paired by turns
and judged by the interval of the latency gate (99 %). An interval that holds "no difference" tells nothing apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.common.artifact import read_manifest
from moec.compiler.common.digest import sha256_of_file, sha256_of_text
from moec.compiler.common.errors import CheckpointError, UsageError
from moec.compiler.common.files import in_json_types
from moec.compiler.common.model_config import context_length, read_config
from moec.compiler.common.progress import Progress
from moec.compiler.measure.latency import process
from moec.compiler.measure.latency.demands import Cold
from moec.compiler.measure.latency.sampling import LOOKS
from moec.compiler.measure.latency.statistics import Interval, quantile
from moec.compiler.measure.latency.timings import Series, ratio
from moec.compiler.text.corpus import held_out_text, spread, tokenize, windows
from moec.compiler.text.perplexity import Comparison, compare_each, perplexity
from moec.targets import get_target
from moec.targets.base import Target, cannot_measure
from moec.targets.runners import limits_of

LETTERS = "ABCDEFGH"
LEAST_WINDOWS = 8
"""Smallest number of windows: with fewer, a bootstrap interval is much too narrow."""
STARTS = 3
SIZE = 0.01
"""Difference of sizes from which an artifact counts as smaller or larger."""
Measure = Callable[[Mapping[str, Any], Callable[[int, int], None]], dict[str, Any]]


@dataclass(frozen=True)
class CompareOptions:
    """Settings of a comparison.

    Attributes:
        text: Held-out text, a file or a directory; None: the texts that come with moec.
        windows: Number of windows, spread over the text.
        window: Tokens per window; fewer if a model or a runtime takes fewer.
        latency: Whether to measure latency and memory.
        rounds: Number of times that all artifacts are opened and take their turns.
        context: Tokens of the prompt.
        threads: Threads of the runtimes while latency is measured.
        seconds: Longest time of these rounds.
    """

    text: str | None = None
    windows: int = 64
    window: int = 256
    latency: bool = True
    rounds: int = LOOKS[0]
    context: int = 128
    threads: int = 1
    seconds: float = 300.0


class Outcome(StrEnum):
    """What an artifact is, compared with the first one, in one respect or in all."""

    BETTER = "better"
    WORSE = "worse"
    SAME = "cannot be told apart"
    MIXED = "better and worse"

    @classmethod
    def of(cls, interval: Interval, nothing: float) -> Outcome:
        """The outcome for a quantity of which less is better; `nothing` is its value without a difference."""
        if interval.low > nothing:
            return cls.WORSE
        return cls.BETTER if interval.high < nothing else cls.SAME

    @classmethod
    def all(cls, each: Sequence[Outcome]) -> Outcome:
        """The outcome of several respects."""
        found = {item for item in each if item is not cls.SAME}
        return cls.MIXED if len(found) > 1 else next(iter(found), cls.SAME)


@dataclass(frozen=True)
class Figures:
    """What was measured of one artifact.

    Attributes:
        name: Its letter, A for the first.
        directory: The artifact.
        target: Its target.
        perplexity: On the held-out text.
        seconds: Workload -> median of its calls; empty if latency was not measured.
        load: Median seconds of a start; None if not measured.
        memory: Largest peak memory of a start, bytes; None if not measured.
        size: Bytes of its files.
    """

    name: str
    directory: str
    target: str
    perplexity: float
    seconds: Mapping[str, Interval]
    load: float | None
    memory: float | None
    size: int


@dataclass(frozen=True)
class Verdict:
    """An artifact compared with the first.

    Attributes:
        name: Its letter.
        outcome: The outcome of all respects.
        sentence: The same in words, with figures.
        increase: Relative increase of perplexity.
        divergence: KL divergence from the first, nats per token.
        agreement: Share of tokens with the same most likely next token.
        times: Workload -> time relative to that of the first.
        clocks: Workload -> "wall" or "cpu", the clock of `times`.
        other_source: Whether it was built from another checkpoint than the first.
    """

    name: str
    outcome: Outcome
    sentence: str
    increase: Interval
    divergence: float
    agreement: float
    times: Mapping[str, Interval]
    clocks: Mapping[str, str]
    other_source: bool


@dataclass(frozen=True)
class Compared:
    """The result of a comparison.

    Attributes:
        figures: One per artifact, in the given order.
        verdicts: One per artifact but the first.
        text: sha256 of the text, number and length of windows, and number of predicted tokens.
        not_measured: Why latency was not measured; empty if it was.
    """

    figures: tuple[Figures, ...]
    verdicts: tuple[Verdict, ...]
    text: Mapping[str, Any]
    not_measured: str = ""

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return dict(in_json_types(asdict(self)))


@dataclass(frozen=True)
class _Artifact:
    name: str
    directory: Path
    manifest: Mapping[str, Any]
    target: Target


def compare_artifacts(
    directories: Sequence[Path], options: CompareOptions, progress: Progress, measure: Measure = process.measure
) -> Compared:
    """Compare artifacts of one model with the first of them.

    Args:
        directories: Two artifacts or more; all of them are open at the same time.
        options: The settings.
        progress: Called for every window, and with the seconds of the rounds.
        measure: Runs a job of latency in a process of its own.

    Raises:
        ArtifactError: A directory is not an artifact, or is damaged.
        UsageError: The artifacts have different tokenizers or vocabularies.
        CheckpointError: The text is missing or too short, or the artifacts have no tokenizer.
    """
    artifacts = [_opened(LETTERS[index], directory) for index, directory in enumerate(directories)]
    for other in artifacts[1:]:
        _check_same_tokens(artifacts[0], other)
    text = held_out_text(options.text)
    compared, facts = _on_text(artifacts, text, options, progress)
    series, starts, reason = _latency(artifacts, options, progress, measure)
    found = tuple(
        _figures(artifact, loss, series, starts.get(artifact.name, {}))
        for artifact, loss in zip(artifacts, (compared[0].reference, *(one.candidate for one in compared)), strict=True)
    )
    verdicts = tuple(
        _verdict(artifact, artifacts[0], one, series, found, options.threads)
        for artifact, one in zip(artifacts[1:], compared, strict=True)
    )
    return Compared(found, verdicts, facts, reason)


def _opened(name: str, directory: Path) -> _Artifact:
    manifest = read_manifest(directory)
    return _Artifact(name, directory, manifest, get_target(str(manifest.get("recipe", {}).get("target"))))


def _check_same_tokens(first: _Artifact, other: _Artifact) -> None:
    """Check that two artifacts give probabilities to the same tokens.

    Raises:
        UsageError: They do not.
    """
    sizes = [int(item.manifest.get("model", {}).get("vocab_size", 0)) for item in (first, other)]
    hint = "compare artifacts of one model; others have no common perplexity"
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"{first.directory} and {other.directory} are of different models: their vocabularies have {sizes[0]} and "
            f"{sizes[1]} entries",
            hint=hint,
        )
    files = [item.directory / "tokenizer.json" for item in (first, other)]
    if all(file.is_file() for file in files) and sha256_of_file(files[0]) != sha256_of_file(files[1]):
        raise UsageError(
            f"{first.directory} and {other.directory} are of different models: their tokenizers differ", hint=hint
        )


def _on_text(
    artifacts: Sequence[_Artifact], text: str, options: CompareOptions, progress: Progress
) -> tuple[list[Comparison], dict[str, Any]]:
    runners = [item.target.open_reference(item.directory, threads=0) for item in artifacts]
    contexts = [context_length(read_config(item.directory / "config.json")) for item in artifacts]
    limits = [*contexts, *(limits_of(runner).max_sequence for runner in runners)]
    length = min([options.window, *(limit for limit in limits if limit is not None)])
    chosen = spread(windows(tokenize(artifacts[0].directory, text), length), options.windows)
    if len(chosen) < LEAST_WINDOWS:
        raise CheckpointError(
            f"the text has {len(chosen)} windows of {length} tokens, too few for an interval",
            hint=f"give a text of at least {LEAST_WINDOWS * length} tokens, or shorter windows (--window)",
        )
    found = compare_each(
        runners[0], runners[1:], chosen, told=lambda done, total: progress("held-out text", done, total)
    )
    facts = {
        "sha256": sha256_of_text(text),
        "windows": len(chosen),
        "length": length,
        "tokens": found[0].tokens,
    }
    return found, facts


def _latency(
    artifacts: Sequence[_Artifact], options: CompareOptions, progress: Progress, measure: Measure
) -> tuple[dict[str, dict[str, Series]], dict[str, dict[str, list[float]]], str]:
    """Workload -> artifact -> its series; artifact -> figures of its starts; why nothing was measured."""
    if not options.latency:
        return {}, {}, "switched off"
    for item in artifacts:
        if reason := cannot_measure(item.target):
            return {}, {}, f"{item.name}: {reason}"
    job = {
        "kind": "warm",
        "artifacts": {item.name: str(item.directory) for item in artifacts},
        "contexts": [options.context],
        "demands": [],
        "threads": options.threads,
        "seconds": options.seconds,
        "rounds": options.rounds,
    }
    found = measure(job, lambda done, total: progress("latency", done, total))
    series = {
        workload: {name: Series.of(each) for name, each in by_artifact.items()}
        for workload, by_artifact in found["series"].items()
    }
    if not series:
        raise UsageError(
            f"a prompt of {options.context} tokens does not fit all artifacts", hint="give a shorter --context"
        )
    starts = {
        item.name: process.starts(item.directory, options.context, options.threads, STARTS, measure)
        for item in artifacts
    }
    return series, starts, ""


def _figures(
    artifact: _Artifact,
    losses: np.ndarray,
    series: Mapping[str, Mapping[str, Series]],
    starts: Mapping[str, Sequence[float]],
) -> Figures:
    return Figures(
        artifact.name,
        str(artifact.directory),
        artifact.target.name,
        perplexity(losses),
        {workload: quantile(each[artifact.name].calls(), 0.5) for workload, each in series.items()},
        float(np.median(starts[Cold.LOAD])) if starts else None,
        max(starts[Cold.PEAK_RSS]) if starts else None,
        sum((artifact.directory / name).stat().st_size for name in artifact.manifest["files"]),
    )


def _verdict(
    artifact: _Artifact,
    first: _Artifact,
    compared: Comparison,
    series: Mapping[str, Mapping[str, Series]],
    figures: Sequence[Figures],
    threads: int,
) -> Verdict:
    increase = Interval(compared.increase, *compared.interval())
    ratios = {name: ratio(each, threads, of=artifact.name, to=first.name) for name, each in series.items()}
    times = {name: found.interval for name, found in ratios.items()}
    sizes = [item.size for item in figures if item.name in (first.name, artifact.name)]
    change = sizes[1] / sizes[0] - 1
    size = Outcome.SAME if abs(change) < SIZE else Outcome.WORSE if change > 0 else Outcome.BETTER
    outcome = Outcome.all(
        [Outcome.of(increase, 0.0), size, *(Outcome.of(interval, 1.0) for interval in times.values())]
    )
    said = [_quality(increase), *(_speed(name, interval) for name, interval in times.items())]
    if size is not Outcome.SAME:
        said.append(f"its files are {abs(change):.1%} {'larger' if change > 0 else 'smaller'}")
    said.append(f"the same next token in {compared.agreement:.1%} of {compared.tokens}")
    other = artifact.manifest.get("source") != first.manifest.get("source")
    if other:
        said.append("it was built from another checkpoint")
    return Verdict(
        artifact.name,
        outcome,
        f"{_whole(outcome, artifact.name, first.name)}: {'; '.join(said)}.",
        increase,
        compared.divergence,
        compared.agreement,
        times,
        {name: str(found.clock) for name, found in ratios.items()},
        other,
    )


def _whole(outcome: Outcome, name: str, first: str) -> str:
    if outcome is Outcome.SAME:
        return f"{name} cannot be told apart from {first}"
    if outcome is Outcome.MIXED:
        return f"{name} is better than {first} in some respects and worse in others"
    return f"{name} is {outcome} than {first}"


def _quality(increase: Interval) -> str:
    outcome = Outcome.of(increase, 0.0)
    if outcome is Outcome.SAME:
        return f"perplexity cannot be told apart ({increase.value:+.2%} [{increase.low:+.2%}, {increase.high:+.2%}])"
    ends = sorted(abs(end) for end in (increase.low, increase.high))
    word = "higher" if outcome is Outcome.WORSE else "lower"
    return f"its perplexity is {abs(increase.value):.2%} [{ends[0]:.2%}, {ends[1]:.2%}] {word}"


def _speed(workload: str, time: Interval) -> str:
    """How fast a workload is; the speed is 1 / time, so the ends change places."""
    if not math.isfinite(time.high):
        return f"{workload} was measured in too few rounds to be told apart"
    fast = f"{1 / time.value:.2f} [{1 / time.high:.2f}, {1 / time.low:.2f}] times as fast"
    same = Outcome.of(time, 1.0) is Outcome.SAME
    return f"{workload} cannot be told apart ({fast})" if same else f"{workload} is {fast}"
