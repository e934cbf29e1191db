"""A tiny model with random weights, and searches of it that take seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moec.compiler.common.progress_bars import no_progress_bars
from moec.compiler.families.tiny_models import character_tokenizer, tiny_model
from moec.compiler.search.costs import Costs, Speed
from moec.compiler.search.evaluation import Evaluator, Subject
from moec.compiler.search.sensitivity import Sensitivities, probes
from moec.compiler.search.session import Finished, Opened, open_search, run_search
from moec.compiler.search.settings import Settings, make_settings
from moec.compiler.search.space import LEVELS, Space
from moec.passes.routing.policies.base import Slots

SMALL = {
    "windows": 8,
    "window": 16,
    "population": 8,
    "generations": 3,
    "share": 0.6,
    "members": 0,
    "held_out_windows": 8,
}


def silent(*_: Any) -> None:
    """Shows nothing."""


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{number * number} is the square of {number}.\n" for number in range(600)))
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four of eight experts for a token, and widths that blocks of 32 divide."""
    directory = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model("olmoe", intermediate_size=64, num_experts_per_tok=4)
    with no_progress_bars():
        model.save_pretrained(directory)
    character_tokenizer(model.config.vocab_size).save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="session")
def evaluator(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluator:
    directory = tmp_path_factory.mktemp("pretrained")
    return Evaluator(Subject(str(checkpoint), str(directory), str(text), windows=8, window=16))


LAYERS = 2


@pytest.fixture(scope="session")
def space(evaluator: Evaluator) -> Space:
    random = torch.Generator().manual_seed(0)
    weights = torch.rand(500, 4, generator=random).softmax(-1).sort(-1, descending=True).values
    slots = tuple(Slots(0, torch.arange(4).expand(500, 4), weights, torch.ones(500, 1)) for _ in range(LAYERS))
    formats = tuple(("int4:32", "int8:32", "fp16") for _ in evaluator.parts)
    owners = tuple(part.layer for part in evaluator.parts)
    widths = tuple(row.intermediate_size for row in evaluator.program.layers)
    return Space(slots, ((3, 1), (0, 2, 5)), formats, owners, widths=widths)


@pytest.fixture(scope="session")
def costs(evaluator: Evaluator) -> Costs:
    pruned = evaluator.runner.pruned_weights
    return Costs(evaluator.program, evaluator.parts, pruned, itemsize=4, skips=True, speed=Speed(1e9, 1e9))


@pytest.fixture(scope="session")
def sensitivities(space: Space, costs: Costs) -> Sensitivities:
    """The first layer loses ten times as much as the second."""

    def loss(key: tuple[str, int, int], place: float) -> float:
        lost = 1 - place / LEVELS if key[0] == "level" else 0.01
        return lost**2 * (1.0 if key[1] == 0 else 0.1)

    return Sensitivities(space, costs, [loss(probe.key, probe.place) for probe in probes(space, costs)])


Searched = tuple[Settings, Opened, Finished]


@pytest.fixture
def search(checkpoint: Path, text: Path) -> Callable[..., Searched]:
    """Runs a search in a directory; further settings replace the small ones."""

    def run(
        directory: Path, *, executor: str = "local", jobs: int = 1, store: Path | None = None, **more: Any
    ) -> Searched:
        fields = {**SMALL, "checkpoint": str(checkpoint), "target": "onnx", "text": str(text), "held_out": str(text)}
        settings = make_settings({**fields, "objectives": "perplexity,expert-flops", **more})
        found = open_search(settings, directory, silent)
        return settings, found, run_search(found, directory, executor=executor, jobs=jobs, store=store, progress=silent)

    return run
