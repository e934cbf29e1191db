"""A search against the commands that were there before it, and against chance: `python benchmarks/search.py`.

All three have the same text, the same windows and as many true evaluations. Each offers the front of what it measured
on the text of the search; hypervolume is that of these fronts on held-out text, on all of it and text by text. Commands
are all policies at all budgets with all presets and allocations of `auto`, in an order that covers the grid evenly;
chance draws every gene anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pages
from arguments import add_flags
from machine import describe

from moec import passes
from moec.compiler.common import markdown
from moec.compiler.common.errors import UsageError
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.search.archive import Archive, Individual
from moec.compiler.search.evaluation import Evaluator
from moec.compiler.search.objectives import EXPERT_FLOPS
from moec.compiler.search.seeds import allocated_formats, layer_losses
from moec.compiler.search.session import Finished, Opened, open_search, run_search
from moec.compiler.search.settings import make_settings
from moec.compiler.search.store import Measured, Store
from moec.compiler.search.truth import surrogate_facts
from moec.compiler.search.variant import Variant
from moec.compiler.text.corpus import HELD_OUT, held_out_text, read_text, tokenize
from moec.compiler.text.perplexity import increase_interval, losses
from moec.passes.routing.calibrate.fit import fit
from moec.passes.routing.compensation import CompensateDropped
from moec.passes.routing.dynamic_routing import DynamicRouting
from moec.passes.routing.policies.per_layer import PerLayer, in_layer

MODEL = Path(__file__).resolve().parents[1] / "golden_models" / "olmoe-tiny"
POLICIES = ("threshold", "top-p", "capped", "layer-k", "ratio", "entropy", "margin", "uniform-k")
BUDGETS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
PRESETS = ("fp16", "int8", "int4", "int4:32")
LITTLE = 0.01
"""Increase of perplexity up to which savings are reported."""
EXACT = 1e-3
"""Difference of logits that tells a wrong evaluation from another order of sums."""


def silent(*_: Any) -> None:
    """Shows nothing."""


class Stranger:
    """Individuals of other origin than the search, in an archive of their own: numbers stand for variants."""

    def __init__(self, found: Opened, variants: Sequence[Variant], archive: Archive, folder: Path) -> None:
        self.variants = variants
        self.archive = Archive(self, found.costs, archive.reference, archive.objectives, {})
        for number, variant in enumerate(variants):
            self.archive.add((number,), stored(found.evaluator, variant, folder), 0, None)

    def variant(self, genome: np.ndarray) -> Variant:
        return self.variants[int(genome[0])]


def stored(evaluator: Evaluator, variant: Variant, folder: Path) -> Measured:
    """A measurement on all windows, from a directory if it is there."""
    kept, sections = Store(folder, evaluator.context), variant.sections(evaluator.parts)
    known = kept.get(sections)
    if known.windows < len(evaluator.windows):
        kept.put(sections, known.windows, evaluator.evaluate(sections, known.windows, len(evaluator.windows)))
    return kept.get(sections)


def commands(found: Opened, finished: Finished, count: int) -> list[Variant]:
    """What `moec export` offers, in an order in which any number of them covers the grid."""
    space, parts = found.space, found.evaluator.parts
    measured = layer_losses(space, finished.search.sensitivities)
    unchanged = Variant.unchanged(found.evaluator.program, parts)
    offered = [(part.name, space.formats[index]) for index, part in enumerate(parts)]
    formats = [tuple(_preset(name, own, text) for name, own in offered) for text in PRESETS]
    formats += [space.variant(g).formats for g in allocated_formats(space, found.costs, finished.search.sensitivities)]
    routed: list[Variant] = []
    for budget, name in itertools.product(BUDGETS, POLICIES):
        try:
            chosen = fit(name, found.traces, budget, measured)
        except UsageError:
            continue
        routed.append(replace(unchanged, policies=tuple(in_layer(chosen, i) for i in range(len(space.slots)))))
    grid = [replace(one, formats=chosen) for one, chosen in itertools.product(routed, formats)]
    order = np.random.default_rng(0).permutation(len(grid))
    return list(dict.fromkeys(grid[index] for index in order))[:count]


def _preset(part: str, offered: Sequence[str], text: str) -> str:
    """The format of a part in a preset: those of 4 bits leave embedding and head 8, and blocks are the largest."""
    own = text.replace("int4", "int8") if part in ("embedding", "lm_head") else text
    return next((name for name in (own, f"{own}:128", f"{own}:64", f"{own}:32") if name in offered), own)


def chance(found: Opened, count: int, seed: int) -> Iterator[Variant]:
    """Every gene anew, within its bounds."""
    random, space = np.random.default_rng([seed, 2]), found.space
    for _ in range(count):
        yield space.variant(space.canonical(random.integers(space.low, space.high + 1)))


class HeldOut:
    """The best of a front on held-out text.

    Args:
        reference: The pretrained model on all windows.
        found: The search.
        space: The search space, or a `Stranger`.
        measured: Genome -> measurements on all windows.
    """

    def __init__(
        self, reference: Measured, found: Opened, space: Any, measured: Mapping[tuple[int, ...], Measured]
    ) -> None:
        self._reference, self._found, self._space, self._measured = reference, found, space, measured

    def rows(self, windows: Sequence[int]) -> np.ndarray:
        """Objectives on some of the windows: [n, m]."""
        goals = self._found.settings.goals
        judged = Archive(self._space, self._found.costs, some(self._reference, windows), goals, {})
        values = [judged.values(key, some(each, windows)) for key, each in self._measured.items()]
        return np.array([judged.row(each) for each in values]).reshape(-1, len(goals))

    def least(self, most: float) -> float:
        """Least expert FLOPs whose 95 % interval of the increase of perplexity is at most `most`; 1.0 if none is."""
        judged = Archive(self._space, self._found.costs, self._reference, (), {})
        sure = [
            judged.values(key, each)[EXPERT_FLOPS.name]
            for key, each in self._measured.items()
            if increase_interval(judged.differences(each))[1] <= most
        ]
        return min([1.0, *sure])


def some(measured: Measured, windows: Sequence[int]) -> Measured:
    """The measurements of some of the windows."""
    return Measured(*(tuple(each[index] for index in windows) for each in astuple(measured)))


def on_held_out(
    finished: Finished, found: Opened, held: Evaluator, space: Any, front: Sequence[Individual], folder: Path, most: int
) -> HeldOut:
    """Measure the best of a front on held-out text."""
    reference = held.evaluate({}, 0, len(held.windows))
    rows = np.array([finished.search.archive.row(item.values) for item in front])
    best = finished.search.volume.best(np.zeros((0, rows.shape[1])), rows, most)
    keys = [front[index].genome for index, _ in best]
    return HeldOut(reference, found, space, {key: stored(held, space.variant(np.array(key)), folder) for key in keys})


def texts(held: Evaluator) -> dict[str, list[int]]:
    """The held-out texts that moec includes -> the windows in them."""
    folder = held.checkpoint.directory
    starts = [len(tokenize(folder, read_text(shipped=HELD_OUT[:number]))) for number in range(1, len(HELD_OUT) + 1)]
    window = held.windows.shape[1]
    # Windows are spread evenly; see `spread`.
    places = np.arange(len(held.windows)) * (starts[-1] // window) // len(held.windows) * window
    owners = np.searchsorted(starts[:-1], places, side="right")
    return {name: np.flatnonzero(owners == number).tolist() for number, name in enumerate(HELD_OUT)}


class Timed:
    """Times the measurements of a search, in alternation with plain runs of the same individuals on the same windows.

    Passes that make the Program are not counted, its run window by window is.

    Args:
        found: The search; its evaluator is timed from now on.
        every: One of so many individuals that are measured on all windows is run plainly too.
    """

    def __init__(self, found: Opened, every: int) -> None:
        self._found, self._every, self._evaluate = found, every, found.evaluator.evaluate
        self.spent: dict[str, list[float]] = {}
        self.plain: list[float] = []
        self._whole = 0
        found.evaluator.evaluate = self

    def __call__(self, sections: Mapping[str, Any], start: int, stop: int) -> Measured:
        """See `Evaluator.evaluate`."""
        begin = time.process_time()
        measured = self._evaluate(sections, start, stop)
        taken = self.spent.setdefault(json.dumps(sections, sort_keys=True), [0.0, 0.0])
        taken[0] += time.process_time() - begin
        taken[1] += stop - start
        if start > 0 and stop == len(self._found.evaluator.windows):
            self._whole += 1
            if self._whole % self._every == 0:
                self._run_plainly(sections, start, stop, measured)
        return measured

    def end(self) -> None:
        """Time no further measurements."""
        del self._found.evaluator.evaluate

    def _run_plainly(self, sections: Mapping[str, Any], start: int, stop: int, measured: Measured) -> None:
        evaluator = self._found.evaluator
        variant = Variant.of(sections, evaluator.program, evaluator.parts)
        runner = ProgramRunner(_program(self._found, variant))
        runner.prefill(evaluator.windows[:1])  # weights are read and rounded before
        begin = time.process_time()
        plain = losses(runner, evaluator.windows[start:stop])
        self.plain.append((time.process_time() - begin) / (stop - start))
        assert np.abs(plain - np.array(measured.losses)).max() < EXACT

    def of(self, finished: Finished) -> dict[str, float]:
        """CPU time per window of all measured individuals, of those after the initial ones, and of the plain runs."""
        plain = float(np.mean(self.plain))
        found = {"plain perplexity, CPU ms per window": 1e3 * plain}
        for name, first in (("evaluation", 0), ("evaluation after the initial ones", 1)):
            keys = [key for key, item in finished.search.archive.found.items() if item.generation >= first]
            parts = self._found.evaluator.parts
            sections = [self._found.space.variant(np.array(key)).sections(parts) for key in keys]
            rows = [self.spent.get(json.dumps(one, sort_keys=True), [0.0, 0.0]) for one in sections]
            seconds, windows = np.array(rows).sum(axis=0)
            found[f"{name} / plain"] = float(seconds / windows) / plain
        return found


def _program(found: Opened, variant: Variant) -> Any:
    """The Program of a variant."""
    done = [item.name for item in passes.default_passes()]
    compensations = found.evaluator.compensations
    added = []
    for layer, (policy, removed) in enumerate(zip(variant.policies, variant.removed, strict=True)):
        own = None if policy is None else compensations.of(layer, policy)
        added.append(None if own is None else own.without(removed))
    steps = [DynamicRouting(PerLayer(layers=variant.policies)), CompensateDropped(tuple(added))]
    program, _ = passes.run_passes(found.evaluator.program, steps, completed=done)
    return program.replace(weights=program.weights.with_tensors(found.evaluator.runner.weights_of(variant)))


def one_seed(arguments: argparse.Namespace, seed: int, folder: Path) -> dict[str, float]:
    """All figures of one seed."""
    settings = make_settings(
        {
            "checkpoint": arguments.checkpoint,
            "target": "onnx",
            "objectives": arguments.objectives,
            "population": arguments.population,
            "generations": arguments.generations,
            "windows": arguments.windows,
            "seed": seed,
        }
    )
    own = folder / f"seed-{seed}"
    found = open_search(settings, own, silent)
    timed = Timed(found, arguments.every)
    started = time.perf_counter()
    finished = run_search(found, own, executor="local", jobs=1, store=own, progress=silent)
    seconds = time.perf_counter() - started
    timed.end()
    archive, volume = finished.search.archive, finished.search.volume
    count = len(archive.found)
    held = found.evaluator.on(held_out_text(None), arguments.held_out_windows)
    others = {"commands": Stranger(found, commands(found, finished, count), archive, folder)}
    if seed >= arguments.seeds - arguments.chance_seeds:
        others["chance"] = Stranger(found, list(chance(found, count, seed)), archive, folder)
    fronts = {"search": on_held_out(finished, found, held, found.space, archive.front, folder, arguments.members)}
    for name, other in others.items():
        fronts[name] = on_held_out(finished, found, held, other, other.archive.front, folder, arguments.members)
    every = range(len(held.windows))
    volumes = {name: volume.of(front.rows(every)) for name, front in fronts.items()}
    by_text = {
        f"search / commands, {name}": volume.of(fronts["search"].rows(own)) / volume.of(fronts["commands"].rows(own))
        for name, own in texts(held).items()
    }
    surrogate = surrogate_facts(finished)
    missing = float("nan")
    return {
        "individuals": float(len(finished.search.seen)),
        "true evaluations": float(count),
        "share of them": count / len(finished.search.seen),
        "seconds of the search": seconds,
        **{f"hypervolume, {name}": value for name, value in volumes.items()},
        "search / commands": volumes["search"] / volumes["commands"],
        **by_text,
        "search / chance": volumes["search"] / volumes["chance"] if volumes.get("chance") else missing,
        "rank correlation": missing if surrogate.rank_correlation is None else surrogate.rank_correlation,
        **{f"least expert FLOPs within 1 %, {name}": front.least(LITTLE) for name, front in fronts.items()},
        **timed.of(finished),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(
        parser,
        checkpoint=str(MODEL),
        objectives="perplexity,expert-flops,size",
        population=64,
        generations=12,
        seeds=1,
        chance_seeds=1,
        windows=32,
        held_out_windows=48,
        every=6,
        members=128,
        page="",
        folder="",
    )
    arguments = parser.parse_args()
    about = describe()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        rows = []
        for seed in range(arguments.seeds):
            rows.append(one_seed(arguments, seed, folder))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    table = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if np.isfinite(row.get(name, np.nan))] or [np.nan]
        mean = float(np.mean(values))
        draws = np.random.default_rng(0).choice(values, (2000, len(values))).mean(axis=1)
        low, high = np.quantile(draws, [0.025, 0.975])
        table.append([name, f"{mean:.4g}", f"[{low:.4g}, {high:.4g}]" if len(values) > 1 else ""])
    header = ["", f"mean of {len(rows)} seeds", "95 %"]
    text = f"{markdown.table(header, table)}\n\n{about}"
    print(text)
    if arguments.page:
        pages.put(text, Path(arguments.page))


if __name__ == "__main__":
    main()
