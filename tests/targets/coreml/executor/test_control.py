"""Control flow, state, multifunction packages and rounding, as a mixture-of-experts decoder uses them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.common.errors import UsageError
from moec.targets.coreml.executor import MilModel

RNG = np.random.default_rng(5)
HIDDEN, INNER, EXPERTS, TOP_K = 16, 32, 6, 2
ROUTER = RNG.standard_normal((EXPERTS, HIDDEN)).astype(np.float32)
GATE, UP = (RNG.standard_normal((EXPERTS, INNER, HIDDEN)).astype(np.float32) / 4 for _ in range(2))
DOWN = RNG.standard_normal((EXPERTS, HIDDEN, INNER)).astype(np.float32) / 6
EXPERT_MACS = 3 * HIDDEN * INNER


def expert_layer(mb: Any, x: Any) -> Any:
    """One `cond` per expert around x [1, H]: an expert whose weight is zero is not computed."""
    weights, indices = mb.topk(x=mb.softmax(x=mb.linear(x=x, weight=ROUTER), axis=-1), k=TOP_K, axis=-1)
    zero = np.zeros((1, EXPERTS), np.float32)
    dense = mb.scatter_along_axis(
        data=zero, indices=indices, updates=weights, axis=1, mode="update", validate_indices=False
    )
    total = mb.mul(x=x, y=np.float32(0))
    for expert in range(EXPERTS):
        share = mb.slice_by_index(x=dense, begin=[0, expert], end=[1, expert + 1], squeeze_mask=[True, True])

        def chosen(e: int = expert, share: Any = share) -> Any:
            gate = mb.silu(x=mb.linear(x=x, weight=GATE[e]))
            inner = mb.mul(x=gate, y=mb.linear(x=x, weight=UP[e]))
            return mb.mul(x=mb.linear(x=inner, weight=DOWN[e]), y=share)

        part = mb.cond(
            pred=mb.greater(x=share, y=np.float32(0)),
            _true_fn=chosen,
            _false_fn=lambda: mb.mul(x=x, y=np.float32(0)),
            name=f"experts_{expert}",
        )
        total = mb.add(x=total, y=part)
    return mb.identity(x=total, name="y")


def expert_reference(x: Any) -> Any:
    hidden = torch.from_numpy(x)
    weights, indices = torch.softmax(hidden @ torch.from_numpy(ROUTER).T, -1).topk(TOP_K)
    total = torch.zeros_like(hidden)
    for weight, index in zip(weights[0], indices[0].tolist(), strict=True):
        gate, up, down = (torch.from_numpy(part[index]) for part in (GATE, UP, DOWN))
        total += weight * ((torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T)
    return total.numpy()


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("fp16", 1e-2)])
def test_cond_skips_the_experts_that_were_not_chosen(builder: Any, precision: str, tolerance: float) -> None:
    path = builder.save(
        {"x": builder.placeholder((1, HIDDEN))},
        lambda x: expert_layer(builder.mb, x),
        precision=precision,
        optimize=True,
    )
    session = MilModel.open(path).session()
    x = RNG.standard_normal((1, HIDDEN)).astype(np.float32)
    (y,) = session.predict({"x": x}).values()
    expected = expert_reference(x)
    assert np.linalg.norm(y - expected) <= tolerance * np.linalg.norm(expected)
    experts = session.counters.total("experts_")
    assert experts.macs == TOP_K * EXPERT_MACS
    # coremltools writes the zero bias of a `linear` without one into the weight file.
    stored_values = EXPERT_MACS + 2 * INNER + HIDDEN
    assert experts.weight_bytes == TOP_K * stored_values * (4 if precision == "fp32" else 2)
    assert session.counters.total().macs == experts.macs + HIDDEN * EXPERTS


def test_while_loop_runs_as_often_as_its_condition_says(builder: Any) -> None:
    mb = builder.mb
    weight = RNG.standard_normal((8, 8)).astype(np.float32) / 3

    def body(x: Any, n: Any) -> Any:
        limit = mb.squeeze(x=n)
        _, result = mb.while_loop(
            _cond=lambda i, _h: mb.less(x=i, y=limit),
            _body=lambda i, h: (mb.add(x=i, y=1), mb.tanh(x=mb.linear(x=h, weight=weight))),
            loop_vars=(mb.mul(x=limit, y=0), x),
            name="slots",
        )
        return mb.identity(x=result, name="y")

    path = builder.save({"x": builder.placeholder((1, 8)), "n": builder.placeholder((1,), np.int32)}, body)
    model = MilModel.open(path)
    x = RNG.standard_normal((1, 8)).astype(np.float32)
    expected = x
    for count in range(4):
        session = model.session()
        y = session.predict({"x": x, "n": [count]})["y"]
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-7)
        assert session.counters.total("slots").macs == count * 64
        expected = np.tanh(expected @ weight.T)


def save_decoder(builder: Any, name: str = "decoder") -> Any:
    """`prefill` (4 tokens) and `decode` (1 token): both append to one state and sum over it."""
    ct, mb = builder.ct, builder.mb
    weight = RNG.standard_normal((HIDDEN, HIDDEN)).astype(np.float32)

    def body(x: Any, start: Any, cache: Any) -> Any:
        length = mb.gather(x=mb.shape(x=x), indices=0, axis=0, validate_indices=False)
        end = mb.add(x=start, y=mb.expand_dims(x=length, axes=[0]))
        new = mb.cast(x=mb.linear(x=x, weight=weight), dtype="fp16")
        old = mb.read_state(input=cache)
        updated = mb.slice_update(
            x=old,
            update=new,
            begin=mb.concat(values=[start, np.array([0], np.int32)], axis=0),
            end=mb.concat(values=[end, np.array([HIDDEN], np.int32)], axis=0),
        )
        stored = mb.coreml_update_state(state=cache, value=updated)
        return mb.reduce_sum(x=mb.cast(x=stored, dtype="fp32"), axes=[0], keep_dims=True, name="total")

    paths = {}
    for function, tokens in (("prefill", 4), ("decode", 1)):
        inputs = {
            "x": builder.placeholder((tokens, HIDDEN)),
            "start": builder.placeholder((1,), np.int32),
            "cache": builder.state((8, HIDDEN)),
        }
        paths[function] = builder.save(inputs, body)
    descriptor = ct.utils.MultiFunctionDescriptor()
    for function, path in paths.items():
        descriptor.add_function(str(path), src_function_name="main", target_function_name=function)
    descriptor.default_function_name = "decode"
    path = builder.directory / f"{name}.mlpackage"
    with builder.quiet():
        ct.utils.save_multifunction(descriptor, str(path))
    return path, weight


def test_functions_share_state_and_weights(builder: Any) -> None:
    path, weight = save_decoder(builder)
    model = MilModel.open(path)
    assert model.functions() == ("decode", "prefill")
    assert model.default_function() == "decode"
    assert [str(item) for item in model.inputs("prefill")] == [f"x: fp32[4, {HIDDEN}]", "start: int32[1]"]
    assert [str(item) for item in model.states("decode")] == [f"cache: fp16[8, {HIDDEN}]"]
    prefill = model.session("prefill")
    decode = model.session(state=prefill.state)
    prompt, token = (RNG.standard_normal((n, HIDDEN)).astype(np.float32) for n in (4, 1))
    kept = [(part @ weight.T).astype(np.float16) for part in (prompt, token)]
    first = prefill.predict({"x": prompt, "start": [0]})["total"]
    np.testing.assert_allclose(first, kept[0].astype(np.float32).sum(0, keepdims=True), rtol=1e-5, atol=2e-3)
    second = decode.predict({"x": token, "start": [4]})["total"]
    total = np.concatenate(kept).astype(np.float32).sum(0, keepdims=True)
    np.testing.assert_allclose(second, total, rtol=1e-5, atol=4e-3)
    np.testing.assert_array_equal(prefill.state.read("cache")[5:], 0)
    assert np.abs(prefill.state.read("cache")[4]).max() > 0
    keys = [{c.key for c in model.constants(f).values() if c.stored_bytes >= weight.nbytes} for f in model.functions()]
    assert keys[0] == keys[1]
    assert len(keys[0]) == 1


def test_a_session_starts_empty_and_reset_empties_it(builder: Any) -> None:
    path, _ = save_decoder(builder, "fresh")
    model = MilModel.open(path)
    one, other = model.session("decode"), model.session("decode")
    x = RNG.standard_normal((1, HIDDEN)).astype(np.float32)
    first = one.predict({"x": x, "start": [0]})["total"]
    snapshot = one.state.read("cache").copy()
    np.testing.assert_array_equal(other.predict({"x": x, "start": [0]})["total"], first)
    one.predict({"x": x, "start": [1]})
    np.testing.assert_array_equal(other.state.read("cache"), snapshot)
    one.state.reset()
    np.testing.assert_array_equal(one.predict({"x": x, "start": [0]})["total"], first)
    with pytest.raises(UsageError, match="no state is called keys"):
        one.state.read("keys")
    with pytest.raises(UsageError, match="shape"):
        one.state.write("cache", np.zeros((1, 1)))


def test_fp16_rounds_after_every_op(builder: Any) -> None:
    mb = builder.mb

    def body(x: Any) -> list[Any]:
        half = mb.cast(x=x, dtype="fp16")
        lost = mb.sub(x=mb.add(x=half, y=np.float16(2048)), y=np.float16(2048), name="lost")
        overflow = mb.mul(x=mb.square(x=mb.mul(x=half, y=np.float16(300))), y=np.float16(0.001), name="overflow")
        summed = mb.reduce_sum(x=mb.tile(x=half, reps=[4096]), axes=[0], keep_dims=True, name="summed")
        return [lost, overflow, summed]

    path = builder.save({"x": builder.placeholder((1,))}, body)
    results = MilModel.open(path).session().predict({"x": [1.001]})
    rounded = np.float16(1.001)
    assert results["lost"].dtype == np.float16
    assert results["lost"][0] == np.float16(rounded + np.float16(2048)) - np.float16(2048) == 2
    assert np.isinf(results["overflow"][0])
    # Within one op the accumulation is fp32: fp16 would have stalled at 2048.
    assert results["summed"][0] == np.float16(np.float32(rounded) * 4096)


def test_results_are_the_callers_to_change(builder: Any) -> None:
    mb = builder.mb

    def body(x: Any, cache: Any) -> list[Any]:
        return [mb.reshape(x=x, shape=[4], name="same"), mb.identity(x=mb.read_state(input=cache), name="kept")]

    inputs = {"x": builder.placeholder((1, 4)), "cache": builder.state((4,))}
    session = MilModel.open(builder.save(inputs, body)).session()
    x = np.ones((1, 4), np.float32)
    results = session.predict({"x": x})
    for result in results.values():
        result[:] = 7
    np.testing.assert_array_equal(x, 1)
    np.testing.assert_array_equal(session.predict({"x": x})["kept"], 0)
