"""`moec estimate` on device profiles: what is counted, what is bound, what it costs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moec.compiler.errors import UsageError
from moec.compiler.estimate.counting import count
from moec.compiler.estimate.devices import device_names, load_device
from moec.compiler.estimate.estimate import Wanted, describe, estimate, predict
from moec.compiler.pipeline import build_program
from moec.compiler.program import Program
from moec.compiler.recipe import make_recipe


@pytest.fixture(scope="module")
def program(tiny_checkpoint: Callable[[str], Path]) -> Program:
    return build_program(make_recipe({"checkpoint": str(tiny_checkpoint("olmoe")), "target": "onnx"}))


def test_an_estimate_for_a_device(program: Program) -> None:
    counts = count(program)
    found = predict(counts, Wanted("", "onnx", device="h200", price_per_hour=3.6, context=100), lambda *_: None)
    assert found["memory"]["fits"]
    read = counts.expert_bytes() + counts.dense_bytes() + 100 * counts.state_bytes
    assert found["per_token"]["bytes"] == pytest.approx(read)
    assert found["decode"]["roofline"] == pytest.approx(found["per_token"]["bytes"] / 4.8e12, rel=1e-3)
    assert found["decode"]["estimate"] is None
    assert found["cost_per_million_tokens"] == pytest.approx(found["decode"]["roofline"] * 1e3)
    assert any("not verified" in text for _, text in describe(found))


def test_routing_saves_expert_bytes_and_nothing_else(program: Program) -> None:
    whole, half = count(program), count(program, 0.5)
    assert half.expert_bytes() == pytest.approx(whole.expert_bytes() / 2)
    assert half.dense_bytes() == pytest.approx(whole.dense_bytes())
    used = sum(3 * layer.top_k * layer.hidden_size * layer.intermediate_size for layer in program.layers)
    assert whole.expert_bytes() == pytest.approx(4 * used)
    assert whole.size == pytest.approx(4 * whole.parameters, rel=0.02)
    assert half.flops < whole.flops


def test_every_profile_names_its_source() -> None:
    assert {"h200", "jetson-orin"} <= set(device_names())
    for name in device_names():
        assert load_device(name).source


def test_what_cannot_be_estimated_says_why() -> None:
    with pytest.raises(UsageError, match="unknown device 'h20'") as error:
        estimate(Wanted("nothing", "onnx", device="h20"), lambda *_: None)
    assert "h200" in error.value.hint
    with pytest.raises(UsageError, match="auto chooses formats by measuring"):
        estimate(Wanted("nothing", "onnx", "auto"), lambda *_: None)
