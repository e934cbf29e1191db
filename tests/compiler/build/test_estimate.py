"""`moec estimate` on device profiles: what is counted, what is bound, what it costs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moec.compiler.build.estimate import EstimateRequest, describe, estimate, predict
from moec.compiler.common.errors import UsageError
from moec.compiler.ir.program import Program
from moec.compiler.measure.estimate import error as error_module
from moec.compiler.measure.estimate.counting import count, formats
from moec.compiler.measure.estimate.devices import device_names, load_device
from moec.compiler.measure.estimate.speeds import Speeds
from moec.compiler.pipeline.program import build_program
from moec.compiler.pipeline.recipe import make_recipe
from moec.quantize.formats import parse_format


@pytest.fixture(scope="module")
def program(tiny_checkpoint: Callable[[str], Path]) -> Program:
    return build_program(make_recipe({"checkpoint": str(tiny_checkpoint("olmoe")), "target": "onnx"}))


def test_an_estimate_for_a_device(program: Program) -> None:
    counts = count(program)
    found = predict(
        counts, {}, EstimateRequest("", "onnx", device="h200", price_per_hour=3.6, context=100), lambda *_: None
    )
    assert found["memory"]["fits"]
    read = counts.expert_bytes() + counts.dense_bytes() + 100 * counts.state_bytes
    assert found["per_token"]["bytes"] == pytest.approx(read)
    assert found["decode"]["roofline"] == pytest.approx(found["per_token"]["bytes"] / 4.8e12, rel=1e-3)
    assert found["decode"]["estimate"] is None
    assert found["cost_per_million_tokens"] == pytest.approx(found["decode"]["roofline"] * 1e3)
    assert any("not verified" in text for _, text in describe(found))


def test_states_of_recurrent_layers_do_not_grow(tiny_checkpoint: Callable[[str], Path]) -> None:
    recipe = make_recipe({"checkpoint": str(tiny_checkpoint("qwen3_next")), "target": "onnx"})
    counts = count(build_program(recipe))
    fixed, growing = 4 * (128 * 4 + 4 * 16 * 16), 4 * 2 * 2 * 16
    assert [counts.states_at(context) for context in (0, 1000)] == [fixed, fixed + 1000 * growing]
    assert counts.state_flops_at(0) > 0
    weights = counts.expert_bytes() + counts.dense_bytes()
    for context in (10, 1000):
        found = predict(counts, {}, EstimateRequest("", "onnx", device="h200", context=context), lambda *_: None)
        assert found["per_token"]["bytes"] == pytest.approx(weights + fixed + context * growing)
        assert found["memory"]["needed"] == counts.size + fixed + context * growing
        assert dict(describe(found))["states"] == "0.256 kB per token and 6.14 kB whatever the context"


def test_routing_saves_expert_bytes_and_nothing_else(program: Program) -> None:
    whole, half = count(program), count(program, 0.5)
    assert half.expert_bytes() == pytest.approx(whole.expert_bytes() / 2)
    assert half.dense_bytes() == pytest.approx(whole.dense_bytes())
    used = sum(3 * layer.top_k * layer.hidden_size * layer.intermediate_size for layer in program.layers)
    assert whole.expert_bytes() == pytest.approx(4 * used)
    assert whole.size == pytest.approx(4 * whole.parameters, rel=0.02)
    assert half.flops < whole.flops


def test_every_profile_names_its_source() -> None:
    assert {"h200", "jetson-orin", "iphone-17", "pixel-10"} <= set(device_names())
    for name in device_names():
        assert load_device(name).source


def test_what_cannot_be_estimated_says_why() -> None:
    with pytest.raises(UsageError, match="unknown device 'h20'") as error:
        estimate(EstimateRequest("nothing", "onnx", device="h20"), lambda *_: None)
    assert "h200" in error.value.hint
    with pytest.raises(UsageError, match="auto cannot be estimated"):
        estimate(EstimateRequest("nothing", "onnx", "auto"), lambda *_: None)
    with pytest.raises(UsageError, match="unknown routing policy 'top-q'"):
        estimate(EstimateRequest("nothing", "onnx", routing="top-q", kept_share=0.5), lambda *_: None)
    with pytest.raises(UsageError, match="the saving of top-p depends on its budget") as error:
        estimate(EstimateRequest("nothing", "onnx", routing="top-p"), lambda *_: None)
    assert "--expert-budget" in error.value.hint


def test_the_formats_of_a_program_are_named_by_class(tiny_checkpoint: Callable[[str], Path], program: Program) -> None:
    assert formats(program) == {}
    section = {"format": "int8:channel", "rounding": "rtn"}
    recipe = make_recipe({"checkpoint": str(tiny_checkpoint("olmoe")), "target": "onnx", "quantize": section})
    found = formats(build_program(recipe))
    assert set(found) == {"attention", "embedding", "experts_down", "experts_gate_up", "lm_head"}
    assert {parse_format(text).bits for text in found.values()} == {8}


def test_the_error_of_the_estimate_is_known_where_the_machine_is_calibrated(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Speeds(operations=1e-6, experts=0.0, dense=0.0, states=0.0, residual=0.1)
    nodes = count(program).nodes
    workloads = {
        "decode128": {"candidate": {"wall": {"p50": {"value": nodes * 0.8e-6}}}},
        "prefill128": {"candidate": {"wall": {"p50": {"value": 1.0}}}},
    }
    asked = []

    def known_speeds(target: str, dtype: str, stored: dict[str, str]) -> Speeds | None:
        asked.append((target, dtype, stored))
        return known if target == "onnx" else None

    monkeypatch.setattr(error_module, "known_speeds", known_speeds)
    found = error_module.estimate_error(program, "onnx", "fp32", 1.0, workloads)
    assert found == {"decode128": pytest.approx({"estimated": nodes * 1e-6, "measured": nodes * 0.8e-6, "error": 0.25})}
    assert error_module.estimate_error(program, "tflite", "fp32", 1.0, workloads) == {}
    assert asked == [("onnx", "fp32", {}), ("tflite", "fp32", {})]
