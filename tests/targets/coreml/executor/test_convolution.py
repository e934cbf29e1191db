"""Convolutions against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from moec.compiler.common.errors import ArtifactError
from moec.targets.coreml.executor import MilModel

RNG = np.random.default_rng(2)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


LINE, IMAGE = {"x": floats(2, 6, 11)}, {"x": floats(1, 4, 7, 9)}
DEPTHWISE, GROUPS, WHOLE, KERNEL = floats(6, 1, 3), floats(4, 3, 2), floats(5, 6, 4), floats(3, 4, 3, 2)
BIAS = floats(5)


def conv(mb: Any, x: Any, **settings: Any) -> Any:
    return mb.conv(x=x, **settings)


def torch_conv(x: torch.Tensor, weight: np.ndarray[Any, Any], **settings: Any) -> torch.Tensor:
    run = functional.conv1d if x.ndim == 3 else functional.conv2d
    result: torch.Tensor = run(x, torch.from_numpy(weight), **settings)
    return result


CASES: dict[str, Any] = {
    "depthwise": (
        lambda mb, x: conv(mb, x, weight=DEPTHWISE, pad_type="custom", pad=[2, 2], groups=6),
        LINE,
        lambda x: torch_conv(x, DEPTHWISE, padding=2, groups=6),
    ),
    "groups": (
        lambda mb, x: conv(mb, x, weight=GROUPS, strides=[2], groups=2),
        LINE,
        lambda x: torch_conv(x, GROUPS, stride=2, groups=2),
    ),
    "bias_and_dilation": (
        lambda mb, x: conv(mb, x, weight=WHOLE, bias=BIAS, dilations=[3], pad_type="custom", pad=[1, 4]),
        LINE,
        lambda x: torch_conv(functional.pad(x, (1, 4)), WHOLE, bias=torch.from_numpy(BIAS), dilation=3),
    ),
    "image": (
        lambda mb, x: conv(mb, x, weight=KERNEL, strides=[2, 1], pad_type="custom", pad=[1, 0, 2, 1]),
        IMAGE,
        lambda x: torch_conv(functional.pad(x, (2, 1, 1, 0)), KERNEL, stride=(2, 1)),
    ),
    "same": (
        lambda mb, x: conv(mb, x, weight=WHOLE, pad_type="same"),
        LINE,
        lambda x: torch_conv(functional.pad(x, (1, 2)), WHOLE),
    ),
    "same_lower": (
        lambda mb, x: conv(mb, x, weight=WHOLE, pad_type="same_lower"),
        LINE,
        lambda x: torch_conv(functional.pad(x, (2, 1)), WHOLE),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(name: str, agrees: Callable[..., None]) -> None:
    agrees(name, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "macs"), [("depthwise", 2 * 6 * 13 * 3), ("groups", 2 * 4 * 5 * 3 * 2)])
def test_counts_multiply_accumulates(name: str, macs: int, builder: Any) -> None:
    build, feeds, _ = CASES[name]
    path = builder.save({"x": builder.placeholder(feeds["x"].shape)}, lambda x: build(builder.mb, x))
    session = MilModel.open(path).session()
    session.predict(feeds)
    assert session.counters.total().macs == macs


def test_a_kernel_longer_than_the_input_is_an_error(builder: Any) -> None:
    length = builder.mil.get_new_symbol()
    free = builder.placeholder((1, 6, length))
    function = builder.function({"x": free}, lambda x: builder.mb.conv(x=x, weight=DEPTHWISE, groups=6))
    function.input_types = (
        builder.ct.TensorType(name="x", shape=(1, 6, builder.ct.RangeDim(1, 8, default=4)), dtype=np.float32),
    )
    program = builder.mil.Program()
    program.add_function("main", function)
    path = builder.directory / "free.mlpackage"
    with builder.quiet():
        builder.ct.convert(
            program,
            minimum_deployment_target=builder.ct.target.iOS18,
            compute_precision=builder.ct.precision.FLOAT32,
            skip_model_load=True,
        ).save(str(path))
    session = MilModel.open(path).session()
    assert next(iter(session.predict({"x": floats(1, 6, 3)}).values())).shape == (1, 6, 1)
    with pytest.raises(ArtifactError, match="does not fit into"):
        session.predict({"x": floats(1, 6, 2)})
