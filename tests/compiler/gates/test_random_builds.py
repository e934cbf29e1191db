"""`benchmarks/fuzz`: a few random builds, and that its judge, which shares no code with the gates, can tell."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moec
from moec.compiler.families.tiny_models import write_tiny_checkpoint
from moec.passes.routing.policies.base import select
from moec.passes.routing.policies.table import policy
from moec.quantize.formats import parse_format
from moec.quantize.methods.rounding import round_to_nearest

ROOT = Path(__file__).resolve().parents[3]
SEED = 1
BUILDS = ((0, 0), (2, 3), (3, 5), (4, 2))
"""Groups, each with an architecture of its own, and which of their builds is made: one for each target."""


@pytest.fixture(scope="module")
def fuzz() -> Iterator[Any]:
    """The modules of the benchmark, which can only be imported from its directory."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from fuzz import architectures, build, campaign, judge, minimise, recipes, rounding, slots, table

        yield SimpleNamespace(
            architectures=architectures,
            build=build,
            campaign=campaign,
            judge=judge,
            minimise=minimise,
            recipes=recipes,
            rounding=rounding,
            slots=slots,
            table=table,
        )
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its artifact."""
    place = tmp_path_factory.mktemp("judged")
    checkpoint = write_tiny_checkpoint("qwen3_moe", place / "checkpoint")
    moec.export(checkpoint, target="onnx", output=place / "artifact", gates=False)
    return checkpoint, place / "artifact"


@pytest.mark.parametrize(("group", "place"), BUILDS)
def test_a_random_build_is_right_or_refused(group: int, place: int, fuzz: Any, tmp_path: Path) -> None:
    campaign = fuzz.campaign.Campaign(SEED, tmp_path / "rows", tmp_path / "work")
    (row,) = campaign.made(group, [group * fuzz.campaign.PER_GROUP + place])
    assert row.outcome.outcome in {fuzz.build.RIGHT, fuzz.build.REFUSED}, row


def test_a_seed_decides_everything_and_rows_can_be_read_back(fuzz: Any) -> None:
    rows = []
    for _ in range(2):
        campaign = fuzz.campaign.Campaign(7, Path("rows"), Path("work"))
        drawn = [campaign.architecture(group, None) for group in range(30)]
        recipe = campaign.recipe(3, fuzz.recipes.Traits((8, 8), 2, True, True))
        rows.append([fuzz.campaign.Row(0, 7, own, recipe, fuzz.build.Outcome("right")) for own in drawn])
    assert rows[0] == rows[1]
    assert len({row.architecture.base for row in rows[0]}) > 15
    assert [fuzz.campaign.Row.read(row.line()).line() for row in rows[0]] == [row.line() for row in rows[0]]


WRONG: tuple[dict[str, Any], ...] = (
    {"routing": {"policy": "uniform-k", "parameters": {"k": 1}}},
    {"routing": {"policy": "off", "removed": [[0], [3]]}},
    {"quantize": {"format": {"formats": {"experts_down": "int4:channel"}}}},
    {"quantize": {"format": {"formats": {"lm_head": "int4:channel"}}}},
)
"""Recipes of which the artifact was not built."""


def test_the_judge_accepts_an_artifact_that_is_right(fuzz: Any, built: tuple[Path, Path]) -> None:
    found = fuzz.judge.judge(*built, {"target": "onnx"}, "fp32")
    assert found.right
    assert found.error < 1e-5
    assert found.sharp == 1


@pytest.mark.parametrize("recipe", WRONG)
def test_the_judge_sees_that_an_artifact_is_not_what_the_recipe_says(
    recipe: dict[str, Any], fuzz: Any, built: tuple[Path, Path]
) -> None:
    # Without dynamic activations, whose rounding hides that of the head.
    wrong = {"target": "onnx", "options": {"flavor": "portable"}, **recipe}
    found = fuzz.judge.judge(*built, wrong, "fp32")
    assert found.right is False
    assert found.excess > 1


def test_the_judge_sees_other_weights_and_a_model_that_does_not_load(
    fuzz: Any, built: tuple[Path, Path], tmp_path: Path
) -> None:
    other = write_tiny_checkpoint("qwen3_moe", tmp_path / "other", seed=1)
    assert fuzz.judge.judge(other, built[1], {"target": "onnx"}, "fp32").right is False
    (tmp_path / "model.onnx").write_bytes(b"no model")
    found = fuzz.judge.judge(built[0], tmp_path, {"target": "onnx"}, "fp32")
    assert found.right is False
    assert "does not load" in found.failed


FORMATS = ("int8", "int8:channel:fp32", "int4", "int4:32", "int4:32:asym", "int4:channel:asym:fp32", "int4:auto32:bf16")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("width", [96, 40])
def test_two_implementations_of_rounding_agree(form: str, width: int, fuzz: Any) -> None:
    if ":32" in form and width % 32:
        width = 64
    weight = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 0
    want = round_to_nearest(weight, parse_format(form), name="weight").tensor.dequantize()
    torch.testing.assert_close(fuzz.rounding.rounded(weight, form), want, rtol=0, atol=1e-7)


def test_two_implementations_of_every_policy_agree(fuzz: Any) -> None:
    import random

    generator, chance = torch.Generator().manual_seed(0), random.Random(0)
    traits = fuzz.recipes.Traits((8, 8), 4, True, True)
    weights = torch.rand(200, 4, generator=generator)
    hidden, indices = torch.randn(200, 16, generator=generator), torch.randint(0, 8, (200, 4), generator=generator)
    dropped = 0
    for name in fuzz.recipes.POLICIES:
        for _ in range(6):
            given = fuzz.recipes.parameters(name, traits, chance)
            for layer in range(2):
                own = fuzz.slots.dropped(name, given, layer, hidden, indices, weights)
                want = select(policy(name, **given), layer, hidden, indices, weights)
                torch.testing.assert_close(own, want, rtol=1e-5, atol=1e-6, msg=f"{name}: {given}")
                dropped += int((own == 0).sum())
    assert dropped > 10_000


def test_a_build_that_ends_its_process_or_hangs_is_a_row(
    fuzz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign = fuzz.campaign.Campaign(0, tmp_path / "rows", tmp_path / "work")
    architecture, right = fuzz.architectures.Architecture("family olmoe"), fuzz.build.Outcome(fuzz.build.RIGHT)

    def made(self: Any, group: int, indices: list[int]) -> Iterator[Any]:  # noqa: ARG001
        for index in indices:
            if index == 1:
                os._exit(11)
            if index == 3:
                time.sleep(60)
            yield fuzz.campaign.Row(index, self.seed, architecture, {"target": "onnx"}, right)

    monkeypatch.setattr(fuzz.campaign.Campaign, "made", made)
    monkeypatch.setattr(fuzz.campaign, "SECONDS", 1)
    campaign.run(range(5))
    found = fuzz.campaign.read(tmp_path / "rows")
    ends = [found[index].outcome.outcome for index in range(5)]
    assert ends == [fuzz.build.RIGHT, fuzz.build.INTERNAL, fuzz.build.RIGHT, fuzz.build.HANG, fuzz.build.RIGHT]
    page = fuzz.table.page([found[index] for index in range(5)], "this machine")
    assert "| all | 5 | 3 | 0 | 0 | 0 | 0 | 0 | 1 | 1 | 0 |" in page
    assert "killed after 1 s" in page


def test_a_fault_is_made_simpler(fuzz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def repeat(row: Any, work: Path) -> Any:  # noqa: ARG001
        wrong = row.architecture.changes.get("num_experts") == 5 and "quantize" in row.recipe
        return replace(row, outcome=fuzz.build.Outcome("silently wrong" if wrong else "right"))

    monkeypatch.setattr(fuzz.minimise, "repeat", repeat)
    changes = {"num_experts": 5, "hidden_size": 48, "vocab_size": 97}
    architecture = fuzz.architectures.Architecture("family olmoe", changes, "float16")
    recipe = {"target": "onnx", "options": {"flavor": "web"}, "dtype": "fp16", "quantize": {"format": "int8"}}
    row = fuzz.campaign.Row(0, 0, architecture, recipe, fuzz.build.Outcome("silently wrong"))
    simple = fuzz.minimise.minimised(row, tmp_path)
    assert simple.architecture == fuzz.architectures.Architecture("family olmoe", {"num_experts": 5})
    assert simple.recipe == {"target": "onnx", "options": {}, "quantize": {"format": "int8"}}


def test_a_weight_between_two_codes_may_be_rounded_either_way(fuzz: Any) -> None:
    """5.5 times a scale of 0.046875, as in a head of bfloat16 weights: 1 / 7 has no exact float."""
    weight = torch.tensor([[0.328125, 0.2578125, 0.1, -0.2]])
    below, above = (fuzz.rounding.rounded(weight, "int4:channel:fp32", shift) for shift in (-1e-5, 1e-5))
    assert ((above - below) / 0.046875).round().tolist() == [[0, 1, 0, 0]]
