"""`auto`: sensitivities of the golden model, and what is made of them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moec import passes
from moec.compiler.common.errors import UsageError
from moec.compiler.families.tiny_models import tiny_model
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.program import Program
from moec.compiler.text.corpus import HELD_OUT, read_text, spread, tokenize, windows
from moec.passes.quantize import Quantize
from moec.quantize.formats import IntegerFormat, parse_format
from moec.quantize.methods.rounding import RoundingResult, round_to_nearest
from moec.quantize.methods.scales import ClipSearch
from moec.quantize.plan import ALWAYS_FLOAT, QuantizationPlan, TensorClass, requested
from moec.quantize.planning.auto import choose, parse_size
from moec.quantize.planning.sensitivity import (
    Part,
    Rounding,
    candidates,
    divergences,
    formats_for,
    parts_of,
    plan_of,
    rounded,
    size_of,
)
from moec.targets.base import ASYMMETRIC, SYMMETRIC

MB = 10**6
HEAD = "lm_head.weight"


def blocks(tensor_class: TensorClass) -> tuple[str, ...]:
    del tensor_class
    return SYMMETRIC + ASYMMETRIC


@pytest.fixture(scope="module")
def program(program_of: Callable[[str], Program]) -> Program:
    return program_of("golden")


@pytest.fixture(scope="module")
def text(golden_model: Path) -> np.ndarray:
    return spread(windows(tokenize(golden_model, read_text()), 128), 4)


def stored_bytes(program: Program, plan: QuantizationPlan) -> int:
    quantized = Quantize(plan).run(program).program
    total = 0
    for name in dict.fromkeys(map(quantized.weights.resolve, quantized.weight_names())):
        tensor = quantized.weights[name]
        chosen = getattr(tensor, "format", None)
        total += size_of(program, [name], None) if chosen is None else chosen.planned_bytes(tensor.shape)
    return total


def test_the_experts_of_a_layer_are_one_part_and_routers_are_none(program: Program) -> None:
    parts = {part.name: part for part in parts_of(program)}
    assert list(parts)[:3] == ["embedding", "attention.0", "experts.0"]
    assert len(parts) == 2 + 4 * 2
    assert [name.rpartition(".")[2] for name in parts["experts.3"].names] == ["gate_up_proj", "down_proj"]
    assert not [name for part in parts.values() for name in part.names if "gate.weight" in name or "norm" in name]


def test_a_prediction_holds_when_it_is_measured(program: Program, text: np.ndarray) -> None:
    """The other formats follow from one measurement, by the squared error of the weights."""
    predicted = candidates(program, text, blocks)
    for part in (part for part in predicted if part.name in {"experts.1", "lm_head"}):
        fine = parse_format("int4:32")
        loss = next(candidate.loss for candidate in predicted[part] if candidate.format == fine)
        variant = rounded(program, dict.fromkeys(part.names, fine))  # type: ignore[arg-type]
        measured = divergences(program, {"this": variant}, text)["this"]
        assert loss == pytest.approx(measured, rel=0.25)


def test_a_prediction_knows_how_scales_are_chosen(program: Program, text: np.ndarray) -> None:
    """A search of clip ratios gains more with symmetric codes, from which the loss with zero points is predicted."""

    def searched(plan: QuantizationPlan) -> dict[str, RoundingResult]:
        fmt = plan.format_for(TensorClass.LM_HEAD)
        assert isinstance(fmt, IntegerFormat)
        return {HEAD: round_to_nearest(program.weights[HEAD].read(), fmt, name=HEAD, clip=ClipSearch())}

    fine = parse_format("int4:32:asym")
    assert isinstance(fine, IntegerFormat)
    head = rounded(program, {HEAD: fine}, searched(QuantizationPlan.build({TensorClass.LM_HEAD: fine})))
    measured = divergences(program, {"head": head}, text)["head"]
    found = candidates(program, text, blocks, Rounding(searched, ClipSearch()))
    losses = {str(item.format): item.loss for part, row in found.items() if part.name == "lm_head" for item in row}
    assert losses[str(fine)] == pytest.approx(measured, rel=0.1)


def test_formats_on_offer_are_those_of_all_classes_of_a_part(program: Program) -> None:
    offered = {
        TensorClass.EXPERTS_GATE_UP: ("int8:channel", "int4:32:asym", "int4:64", "palettize4"),
        TensorClass.EXPERTS_DOWN: ("int8:channel", "int4:64", "palettize4"),
        TensorClass.ATTENTION: ("int4:32", "int4:128:asym"),
        TensorClass.EMBEDDING: (),
        TensorClass.LM_HEAD: ("int8:channel",),
    }
    found = {part.name: formats_for(program, part, offered.__getitem__) for part in parts_of(program)}
    # The smallest comes first, and it is what is measured; a palette has no squared error to predict from.
    assert [str(fmt) for fmt in found["experts.0"]] == ["int4:64", "int8:channel", "fp16"]
    assert [str(fmt) for fmt in found["attention.1"]] == ["int4:128:asym", "int4:32", "fp16"]
    assert [str(fmt) for fmt in found["embedding"]] == ["fp16"]
    chosen = choose(program, np.full((1, 8), 5), offered.__getitem__, max_size="1x", max_increase=None)
    assert set(chosen.facts["parts"]["lm_head"]["loss"]) == {"int8:channel", "fp16"}


def test_formats_whose_blocks_do_not_divide_are_not_on_offer(tmp_path: Path) -> None:
    tiny_model("olmoe", intermediate_size=96).save_pretrained(tmp_path)
    narrow = passes.run_passes(capture(Checkpoint.open(tmp_path)), passes.default_passes())[0]
    part = next(part for part in parts_of(narrow) if part.name == "experts.0")
    assert {str(fmt) for fmt in formats_for(narrow, part, blocks)} == {"int4:32", "int4:32:asym", "int8:32", "fp16"}


def test_divergence_of_a_model_from_itself_is_nothing(program: Program, text: np.ndarray) -> None:
    assert divergences(program, {"same": program}, text[:1]) == {"same": 0.0}


@pytest.mark.parametrize(
    ("uniform", "share"),
    [
        (requested("int4"), 0.75),
        (QuantizationPlan.build(dict.fromkeys(set(TensorClass) - set(ALWAYS_FLOAT), parse_format("int4:32"))), 0.85),
    ],
    ids=["embedding and head in 8 bits", "4 bits everywhere"],
)
def test_auto_beats_the_uniform_plan_of_its_size(
    uniform: QuantizationPlan, share: float, program: Program, text: np.ndarray, golden_model: Path
) -> None:
    """Both rounded to nearest, judged on text that neither has seen."""
    size = stored_bytes(program, uniform)
    chosen = choose(program, text, blocks, max_size=size, max_increase=None)
    assert stored_bytes(program, chosen.plan) == chosen.facts["chosen"]["bytes"] <= size
    judge = spread(windows(tokenize(golden_model, read_text(shipped=HELD_OUT)), 128), 8)
    variants = {key: Quantize(plan).run(program).program for key, plan in (("uniform", uniform), ("auto", chosen.plan))}
    lost = divergences(program, variants, judge)
    assert lost["auto"] < share * lost["uniform"]


def test_auto_keeps_to_a_limit_of_loss(program: Program, text: np.ndarray) -> None:
    loose, tight = (choose(program, text[:1], blocks, max_size=None, max_increase=limit) for limit in (0.01, 0.001))
    assert loose.facts["chosen"]["predicted_increase"] <= 0.01
    assert tight.facts["chosen"]["predicted_increase"] <= 0.001
    assert loose.allocation.bytes < tight.allocation.bytes
    curve = loose.facts["trade_off"]
    assert [point["bytes"] for point in curve] == sorted(point["bytes"] for point in curve)
    assert len(curve) > 4


def test_an_impossible_size_says_what_is_possible(program: Program, text: np.ndarray) -> None:
    with pytest.raises(UsageError, match="1000000 bytes") as error:
        choose(program, text[:1], blocks, max_size="1MB", max_increase=None)
    assert "smallest available formats take 4949120 bytes" in error.value.hint


@pytest.mark.parametrize(
    ("written", "size"), [("3MB", 3 * MB), ("1.5 GiB", 3 << 29), ("0.25x", 250), (77, 77), ("2e", None), ("x", None)]
)
def test_sizes_are_read(written: str | int, size: int | None) -> None:
    if size is not None:
        assert parse_size(written, 1000) == size
    else:
        with pytest.raises(UsageError, match="cannot be read"):
            parse_size(written, 1000)


def test_a_plan_gives_each_part_its_format() -> None:
    experts = Part((TensorClass.EXPERTS_GATE_UP, TensorClass.EXPERTS_DOWN), 2, ("a", "b"))
    head = Part((TensorClass.LM_HEAD,), -1, ("c",))
    int4, int8 = parse_format("int4:64"), parse_format("int8:32")
    plan = plan_of({experts: int4, head: int8})
    assert plan.format_for(TensorClass.EXPERTS_DOWN, layer=2) == int4
    assert plan.format_for(TensorClass.EXPERTS_DOWN, layer=1) != int4
    assert plan.format_for(TensorClass.LM_HEAD, layer=3) == int8


def test_sizes_are_those_of_the_dtype_of_the_graph(program: Program) -> None:
    name = parts_of(program)[0].names[0]
    single = size_of(program, [name], None)
    half = size_of(dataclasses.replace(program, dtype=torch.float16), [name], None)
    assert single == 2 * half == 4 * 4096 * 256
