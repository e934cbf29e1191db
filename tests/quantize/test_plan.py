from collections.abc import Callable

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.common.errors import UsageError
from moec.quantize.formats import FP16, NONE, IntegerFormat, PaletteFormat, parse_format
from moec.quantize.plan import PRESETS, Override, QuantizationPlan, TensorClass, parse_class, preset, requested

FLOAT = [TensorClass.ROUTER, TensorClass.OTHER]
QUANTIZABLE = [member for member in TensorClass if member not in FLOAT]
EXPERTS = [TensorClass.EXPERTS_GATE_UP, TensorClass.EXPERTS_DOWN]
FORMATS = st.sampled_from([parse_format(text) for text in ("none", "fp16", "int8:channel", "int4:32:asym", "int4")])
INDICES = st.integers(0, 3)
OVERRIDES = st.one_of(
    st.builds(Override, st.sampled_from(QUANTIZABLE), FORMATS, INDICES),
    st.builds(Override, st.sampled_from(EXPERTS), FORMATS, INDICES | st.none(), INDICES),
)
PLANS = st.builds(
    QuantizationPlan.build,
    st.dictionaries(st.sampled_from(QUANTIZABLE), FORMATS),
    st.lists(OVERRIDES, unique_by=lambda override: (override.tensor_class, override.layer, override.expert)),
)


@given(PLANS)
@settings(deadline=None)
def test_plans_survive_yaml(plan: QuantizationPlan) -> None:
    text = yaml.safe_dump(plan.to_dict(), sort_keys=False)
    assert QuantizationPlan.from_dict(yaml.safe_load(text)) == plan


@given(PLANS, st.randoms())
@settings(deadline=None)
def test_the_order_of_overrides_does_not_matter(plan: QuantizationPlan, random: object) -> None:
    shuffled = list(plan.overrides)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert QuantizationPlan.build(dict(plan.formats), shuffled).to_dict() == plan.to_dict()


def test_the_most_specific_override_wins() -> None:
    down = TensorClass.EXPERTS_DOWN
    int4, int8 = IntegerFormat(4), IntegerFormat(8)
    int8_channel = IntegerFormat(8, "channel")
    plan = QuantizationPlan.build(
        {down: int4},
        [Override(down, int8, layer=1), Override(down, FP16, expert=2), Override(down, int8_channel, 1, 2)],
    )
    assert plan.format_for(down, layer=0, expert=0) == int4
    assert plan.format_for(down, layer=1) == int8
    assert plan.format_for(down, layer=1, expert=0) == int8
    assert plan.format_for(down, layer=0, expert=2) == FP16
    assert plan.format_for(down, layer=1, expert=2) == int8_channel
    assert plan.format_for(TensorClass.EXPERTS_GATE_UP, layer=1, expert=2) == NONE


def test_plain_form() -> None:
    plan = QuantizationPlan.build(
        {TensorClass.EXPERTS_DOWN: IntegerFormat(4, 32)},
        [Override(TensorClass.EXPERTS_DOWN, IntegerFormat(8), layer=3, expert=1)],
    )
    assert plan.to_dict() == {
        "formats": {
            "experts_gate_up": "none",
            "experts_down": "int4:32",
            "shared_expert": "none",
            "attention": "none",
            "embedding": "none",
            "lm_head": "none",
            "router": "none",
            "other": "none",
        },
        "overrides": [{"tensor_class": "experts_down", "layer": 3, "expert": 1, "format": "int8"}],
    }


@pytest.mark.parametrize("tensor_class", FLOAT)
def test_the_router_norms_and_biases_stay_float(tensor_class: TensorClass) -> None:
    for plan in PRESETS.values():
        assert plan.format_for(tensor_class, layer=0) == NONE
    assert QuantizationPlan.build({tensor_class: FP16}).format_for(tensor_class) == FP16
    refused: list[Callable[[], object]] = [
        lambda: QuantizationPlan.build({tensor_class: IntegerFormat(8)}),
        lambda: Override(tensor_class, IntegerFormat(8), layer=0),
        lambda: QuantizationPlan.from_dict({"formats": {tensor_class.value: "int4"}}),
    ]
    reason = "router logits" if tensor_class is TensorClass.ROUTER else "sensitive to rounding"
    for attempt in refused:
        with pytest.raises(UsageError, match=f"{tensor_class} cannot be int.*always stays float.*{reason}"):
            attempt()


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("expert_down", "experts_down"),
        ("experts-gate-up", "experts_gate_up"),
        ("lmhead", "lm_head"),
        ("Attn", "attention"),
        ("zzz", "the tensor classes: attention"),
    ],
)
def test_an_unknown_class_is_refused_with_the_nearest_name(text: str, hint: str) -> None:
    with pytest.raises(UsageError, match="unknown tensor class") as caught:
        QuantizationPlan.from_dict({"formats": {text: "int8"}})
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"format": {}}, "unknown key 'format'"),
        ({"formats": []}, "must be a mapping"),
        ({"overrides": {}}, "must be a mapping"),
        ({"formats": {"attention": "int7"}}, "unknown format 'int7'"),
        ({"overrides": ["x"]}, "is not a mapping"),
        ({"overrides": [{"format": "int8", "layer": 0}]}, "lacks 'tensor_class'"),
        ({"overrides": [{"tensor_class": "attention", "layer": 0}]}, "lacks 'format'"),
        ({"overrides": [{"tensor_class": "attention", "format": "int8"}]}, "neither a layer nor an expert"),
        ({"overrides": [{"tensor_class": "attention", "format": "int8", "layers": 0}]}, "unknown key 'layers'"),
        ({"overrides": [{"tensor_class": "attention", "format": "int8", "layer": "0"}]}, "not an integer"),
        ({"overrides": [{"tensor_class": "attention", "format": "int8", "layer": True}]}, "not an integer"),
        ({"overrides": [{"tensor_class": "attention", "format": "int8", "layer": -1}]}, "is negative"),
        ({"overrides": [{"tensor_class": "attention", "format": "int8", "expert": 1}]}, "has no experts"),
        (
            {
                "overrides": [
                    {"tensor_class": "attention", "format": "int8", "layer": 1},
                    {"tensor_class": "attention", "format": "int4", "layer": 1},
                ]
            },
            "two overrides",
        ),
    ],
)
def test_what_is_no_plan_is_refused(plain: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QuantizationPlan.from_dict(plain)


def test_presets() -> None:
    assert set(PRESETS) == {"fp16", "int8", "int4", "none"}
    for name, bits in (("int8", 8), ("int4", 4)):
        for tensor_class in (TensorClass.EXPERTS_GATE_UP, TensorClass.EXPERTS_DOWN, TensorClass.ATTENTION):
            chosen = preset(name).format_for(tensor_class)
            assert isinstance(chosen, IntegerFormat)
            assert chosen.bits == bits
    assert preset("fp16").format_for(TensorClass.LM_HEAD) == FP16
    assert {chosen for _, chosen in preset("none").formats} == {NONE}
    with pytest.raises(UsageError, match="unknown quantization 'int2'"):
        preset("int2")


def test_palettes_spare_embedding_and_head() -> None:
    plan = requested("palettize4:8")
    for tensor_class in (TensorClass.EXPERTS_GATE_UP, TensorClass.SHARED_EXPERT, TensorClass.ATTENTION):
        assert plan.format_for(tensor_class) == PaletteFormat(rows=8)
    assert {plan.format_for(item) for item in (TensorClass.EMBEDDING, TensorClass.LM_HEAD)} == {IntegerFormat(8)}
    assert plan.format_for(TensorClass.ROUTER) == NONE
    with pytest.raises(UsageError, match="router cannot be palettize4"):
        QuantizationPlan.from_dict({"formats": {"router": "palettize4"}})


@pytest.mark.parametrize("member", TensorClass)
def test_class_names_round_trip(member: TensorClass) -> None:
    assert parse_class(member.value) is member


def test_an_override_of_an_expert_beats_one_of_a_layer() -> None:
    down = TensorClass.EXPERTS_DOWN
    plan = QuantizationPlan.build(
        {down: NONE}, [Override(down, IntegerFormat(8), layer=1), Override(down, FP16, expert=2)]
    )
    assert plan.format_for(down, layer=1, expert=2) == FP16
