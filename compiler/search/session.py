"""Runs one search, from its settings to a measured front.

A stopped search is resumed by running it again from the start: the seed repeats all random choices and measurements are
read from the store, so it reaches the point where it stopped within seconds and then continues.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from moec.compiler.build.estimate import here
from moec.compiler.common.errors import LoweringError, UsageError
from moec.compiler.common.progress import Progress
from moec.compiler.common.validation import validate
from moec.compiler.ir.program import Program
from moec.compiler.measure.estimate.devices import Device, load_device
from moec.compiler.pipeline.program import DTYPES
from moec.compiler.pipeline.refusals import check_target
from moec.compiler.search.archive import Archive
from moec.compiler.search.costs import Costs, Speed
from moec.compiler.search.course import Course
from moec.compiler.search.engine import Generation, Key, Search
from moec.compiler.search.evaluation import BATCH, Evaluator, Subject
from moec.compiler.search.objectives import OBJECTIVES, Objective, check_objectives, shown
from moec.compiler.search.seeds import seeds
from moec.compiler.search.sensitivity import Probe, Sensitivities, probes
from moec.compiler.search.settings import GENERATIONS_FILE, Settings
from moec.compiler.search.space import Space
from moec.compiler.search.store import Measured, Store
from moec.compiler.search.variant import FLOAT
from moec.compiler.search.workers import Run, Task, opened
from moec.compiler.text.corpus import spread
from moec.passes.experts.prune_experts import rank_removable
from moec.passes.quantize import Quantize
from moec.passes.routing.calibrate.collect import Collector
from moec.passes.routing.calibrate.traces import RoutingTrace, replay
from moec.quantize.formats import PaletteFormat, parse_format
from moec.quantize.planning.sensitivity import Part, formats_for, plan_of, size_of
from moec.targets import get_target
from moec.targets.base import Phase, Target, TargetOptions

TRACED_WINDOWS = 16
"""Number of windows to whose routing policies are fitted."""
SENSITIVITY_WINDOWS = 8
"""Number of windows on which single genes are measured."""
BUDGET_GENERATIONS = 6
"""Generations that a search with a time budget surely finishes."""
_PALETTE = PaletteFormat()
STAGES = (0.25, 0.5, 1.0)
"""Shares of the windows after which a certainly dominated individual is dropped."""


@dataclass(frozen=True)
class Opened:
    """The opened model and text of a search.

    Attributes:
        settings: The settings of the search.
        target: Target of the recipes.
        options: Options of the target.
        evaluator: Measures variants of the model.
        space: The search space.
        costs: Computes the objectives that are not measured.
        traces: Routing of the pretrained model.
    """

    settings: Settings
    target: Target
    options: TargetOptions
    evaluator: Evaluator
    space: Space
    costs: Costs
    traces: tuple[RoutingTrace, ...]


@dataclass(frozen=True)
class Finished:
    """Result of a search.

    Attributes:
        search: The engine with its archive, surrogate and generations.
        seconds: Time of all generations, including those of earlier runs.
        sensitivity_runs: Number of individuals that measured single genes.
        lost: Number of individuals that could not be measured.
    """

    search: Search
    seconds: float
    sensitivity_runs: int
    lost: int


def open_search(settings: Settings, directory: Path, progress: Progress) -> Opened:
    """Open the model and the text, and build the search space.

    Raises:
        MoecError: As for an export; also for unsupported objectives and for limits that no individual can meet.
    """
    target, options, device = check_settings(settings)
    goals = settings.goals
    subject = Subject(
        settings.checkpoint,
        str(directory.resolve()),
        settings.text,
        settings.windows,
        settings.window,
        settings.revision,
        settings.trust_remote_code,
    )
    progress("capture", 0, 1)
    evaluator = Evaluator(subject)
    target.check(options, evaluator.checkpoint.raw_config)
    progress("capture", 1, 1)
    if not evaluator.program.layers:
        raise UsageError(f"{settings.checkpoint} has no MoE layer", hint="moec search is for Mixture-of-Experts models")
    counted = [item for item in (*goals, *settings.bounds) if not item.by_running]
    storage, routing = any(item.storage for item in counted), any(item.routing for item in counted)
    check_target(target, evaluator.program, options)
    formats = _formats(evaluator, target, options, storage=storage)
    traces, peaks = _traced(evaluator, progress, outputs=storage)
    removable = (
        _removable(evaluator, rank_removable(evaluator.program, traces, peaks)) if storage else [()] * len(traces)
    )
    slots = tuple(replace(slots, layer=0) for slots in replay(traces))
    owners = tuple(_owner(evaluator, part) for part in evaluator.parts)
    widths = [row.intermediate_size for row in evaluator.program.layers] if evaluator.compensations.affordable else []
    space = Space(slots, tuple(removable), formats, owners, routing, tuple(widths))
    speed = Speed(here()["bandwidth"]) if device is None else Speed.of(device)
    itemsize = DTYPES[settings.dtype or target.default_dtype].itemsize
    skips = target.capabilities(options, Phase.DECODE).skips_experts
    costs = Costs(
        evaluator.program, evaluator.parts, evaluator.runner.pruned_weights, itemsize=itemsize, skips=skips, speed=speed
    )
    found = Opened(settings, target, options, evaluator, space, costs, tuple(traces))
    _check_limits(found)
    evaluator.calibrate(sorted({text for each in formats for text in each if text != FLOAT}), progress)
    evaluator.use_codes()
    return found


def check_settings(settings: Settings) -> tuple[Target, TargetOptions, Device | None]:
    """Check the settings without opening the model, and return target, options and device.

    Raises:
        UsageError: A name is unknown, or the target or device does not support an objective.
    """
    target = get_target(settings.target)
    options = validate(target.Options, settings.options, where=f"options of target {target.name}")
    device = None if settings.device is None else load_device(settings.device)
    check_objectives((*settings.goals, *settings.bounds), target, options, device)
    return target, options, device


def _formats(
    evaluator: Evaluator, target: Target, options: TargetOptions, *, storage: bool
) -> tuple[tuple[str, ...], ...]:
    """Allowed formats of each part, without those that the target refuses for this model."""
    program, parts = evaluator.program, evaluator.parts
    if not storage:
        return ((FLOAT,),) * len(parts)
    offered = [_offered(program, part, target, options) for part in parts]
    refused: set[str] = set()
    for text in sorted({text for each in offered for text in each}):
        fitting = [part for part, each in zip(parts, offered, strict=True) if text in each]
        rounded = Quantize(plan_of(dict.fromkeys(fitting, parse_format(text)))).run(program).program
        try:
            check_target(target, rounded, options)
        except LoweringError:
            refused.add(text)
    kept = tuple(tuple(text for text in each if text not in refused) for each in offered)
    return tuple(each or (FLOAT,) for each in kept)


def _offered(program: Program, part: Part, target: Target, options: TargetOptions) -> list[str]:
    """Formats of a part that the target says it supports, the smallest first, with palettes where it has them."""
    found = formats_for(program, part, partial(target.auto_formats, options))
    if str(_PALETTE) in target.weight_formats:
        found = sorted([*found, _PALETTE], key=lambda fmt: size_of(program, part.names, fmt))
    return [str(fmt) for fmt in found]


def _traced(evaluator: Evaluator, progress: Progress, *, outputs: bool) -> tuple[list[RoutingTrace], list[Tensor]]:
    collector = Collector(evaluator.program, outputs=outputs)
    sample = spread(evaluator.windows, TRACED_WINDOWS)
    collector.run(sample, lambda done, total: progress("routing of the pretrained model", done, total))
    return collector.traces(), collector.peaks()


def _removable(evaluator: Evaluator, ranked: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Removable experts of the layers whose router can be pruned."""
    return [order if evaluator.runner.pruned_weights(number) else () for number, order in enumerate(ranked)]


def _owner(evaluator: Evaluator, part: Part) -> int:
    """The MoE layer in the same decoder layer as a part; -1 if there is none."""
    resolve = evaluator.program.weights.resolve
    stacks = {resolve(row.gate_up_proj): row.index for row in evaluator.program.layers}
    experts = {other.layer: stacks[name] for other in evaluator.parts for name in other.names if name in stacks}
    return experts.get(part.layer, -1)


def _check_limits(found: Opened) -> None:
    """Refuse limits that no individual can meet.

    Raises:
        UsageError: A limit cannot be met; the hint gives the smallest possible value.
    """
    least = found.space.unchanged.copy()
    for place, gene in enumerate(found.space.genes):
        least[place] = {"level": gene.low, "format": 0, "prune": gene.high, "rule": least[place]}[gene.kind]
    least = found.space.canonical(least)
    counted = found.costs.of(found.space.variant(least), found.space.kept(least))
    for item, limit in found.settings.bounds.items():
        if not item.by_running and counted[item.name] > limit:
            raise UsageError(
                f"--max-{item.name} {shown(item, limit)}: no recipe can meet this limit",
                hint=f"the least is {shown(item, counted[item.name])}, with the smallest formats and fewest experts",
            )


def run_search(
    found: Opened, directory: Path, *, executor: str, jobs: int, store: Path | None, progress: Progress
) -> Finished:
    """Run a search, or resume one.

    Raises:
        UsageError: No measured individual meets all limits; the hint gives the nearest one.
        OutputError: The directory cannot be written.
    """
    kept = Store(store or directory, found.evaluator.context)
    with opened(executor, found.evaluator, jobs) as run:
        measuring = _Measuring(found, kept, run, progress)
        reference = measuring.of({}, len(found.evaluator.windows))
        listed = probes(found.space, found.costs)
        sensitivities = Sensitivities(found.space, found.costs, measuring.divergences(listed))
        archive = Archive(found.space, found.costs, reference, found.settings.goals, found.settings.bounds)
        search = Search(
            found.space,
            found.costs,
            archive,
            sensitivities,
            Course(found.space, found.evaluator.runner.course),
            measuring.individuals,
            population=found.settings.population,
            share=found.settings.share,
            seed=found.settings.seed,
        )
        clock = _Clock(directory / GENERATIONS_FILE)
        initial = seeds(found.space, found.costs, sensitivities, found.traces)
        search.start(initial[: _most_seeds(found.settings)])
        clock.tick(search.generations[-1])
        while _more(found.settings, search, clock) and search.step():
            clock.tick(search.generations[-1])
            _tell(found.settings, search, clock, progress)
    if not archive.front:
        _refuse(archive, found.settings.bounds)
    return Finished(search, clock.seconds, len(listed), len(archive.failed))


def _most_seeds(settings: Settings) -> int:
    """Initial individuals that are measured: few, since they share no choices, and so each runs from the first node."""
    generations = settings.last if settings.last is not None else BUDGET_GENERATIONS
    measured = int(settings.share * settings.population * (generations + 1))
    if not generations:
        return min(settings.population, max(1, measured))
    return max(1, min(3 * settings.population // 8, measured // 3))


def _more(settings: Settings, search: Search, clock: _Clock) -> bool:
    done = len(search.generations) - 1
    if settings.last is not None:
        return done < settings.last
    assert settings.budget is not None
    return clock.knows(done + 1) or clock.seconds < settings.budget


def _tell(settings: Settings, search: Search, clock: _Clock, progress: Progress) -> None:
    if settings.last is not None:
        progress("generations", len(search.generations) - 1, settings.last)
    else:
        assert settings.budget is not None
        progress("seconds", min(int(clock.seconds), int(settings.budget)), int(settings.budget))


def _refuse(archive: Archive, bounds: Mapping[Objective, float]) -> None:
    nearest = archive.nearest()
    assert nearest is not None
    wanted = ", ".join(f"{item.name} {shown(item, limit)}" for item, limit in bounds.items())
    named = {*archive.objectives, *bounds}
    reached = ", ".join(
        f"{item.name} {shown(item, nearest.values[item.name])}" for item in OBJECTIVES.values() if item in named
    )
    raise UsageError(
        f"no measured recipe meets all limits ({wanted})",
        hint=f"the nearest recipe has {reached}; relax the limits to these values",
    )


class _Measuring:
    """Returns measurements from the store, and has workers measure what is missing."""

    def __init__(self, found: Opened, store: Store, run: Run, progress: Progress) -> None:
        self._found, self._store, self._run, self._progress = found, store, run, progress
        self.failed: set[str] = set()

    def of(self, sections: Mapping[str, object], windows: int) -> Measured:
        """Measurements of one variant on the first windows."""
        self._complete([sections], windows, "pretrained model")
        return self._store.get(sections).first(windows)

    def divergences(self, listed: Sequence[Probe]) -> list[float]:
        """Divergence of each probe, nats per token."""
        windows = min(SENSITIVITY_WINDOWS, len(self._found.evaluator.windows))
        sections = [self._sections(probe.genome) for probe in listed]
        self._complete(sections, windows, "sensitivity of single genes")
        return [float(np.mean(self._store.get(each).first(windows).divergences or [0.0])) for each in sections]

    def individuals(self, keys: Sequence[Key], hopeless: Callable[[Key, Measured], bool]) -> Mapping[Key, Measured]:
        """See `engine.Measure`."""
        # Variants with the same first choices are adjacent, so that their common nodes run once.
        order = self._found.evaluator.runner.order
        ordered = sorted(keys, key=lambda key: order(self._found.space.variant(np.array(key))))
        alive = {key: self._sections(key) for key in ordered}
        results: dict[Key, Measured] = {}
        every = len(self._found.evaluator.windows)
        for share in STAGES:
            windows = max(BATCH, int(share * every) // BATCH * BATCH) if share < 1 else every
            self._complete(list(alive.values()), windows, "measured individuals")
            for key, sections in list(alive.items()):
                known = self._store.get(sections)
                if known.windows < windows:
                    del alive[key]  # it ended too many workers
                    results.pop(key, None)
                    continue
                results[key] = known.first(windows)
                if windows < every and hopeless(key, results[key]):
                    del alive[key]
        return {key: results[key] for key in keys if key in results}

    def _sections(self, key: Key) -> dict[str, object]:
        variant = self._found.space.variant(np.array(key))
        return variant.sections(self._found.evaluator.parts)

    def _complete(self, every: Sequence[Mapping[str, object]], windows: int, what: str) -> None:
        tasks = [
            Task(sections, known, windows)
            for sections in every
            if (known := self._store.get(sections).windows) < windows
        ]
        for done, (index, measured) in enumerate(self._run(tasks)):
            if measured is not None:
                self._store.put(tasks[index].sections, tasks[index].start, measured)
            self._progress(what, done + 1, len(tasks))


class _Clock:
    """Records the time of each generation in a file, so that a resumed search knows its total time."""

    def __init__(self, path: Path) -> None:
        self._path, self._started = path, time.monotonic()
        self._known = self._read()

    def _read(self) -> dict[int, float]:
        found: dict[int, float] = {}
        for line in self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []:
            try:
                plain = json.loads(line)
                found[int(plain["number"])] = float(plain["seconds"])
            except (ValueError, KeyError, TypeError):
                continue  # the line that was being written when the search was killed
        return found

    def knows(self, number: int) -> bool:
        """Whether a generation was finished in an earlier run."""
        return number in self._known

    @property
    def seconds(self) -> float:
        """Seconds of all generations, including earlier runs."""
        return max(self._known.values(), default=0.0) + time.monotonic() - self._started

    def tick(self, generation: Generation) -> None:
        """Record the end of a generation."""
        if self.knows(generation.number):
            self._started = time.monotonic()
            return
        line = json.dumps({**asdict(generation), "seconds": self.seconds}) + "\n"
        whole = not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n")
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line if whole else "\n" + line)
