"""Ops that move data against torch and coremltools' value inference: every result is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from moec.compiler.common.errors import ArtifactError
from moec.targets.coreml.executor import MilModel

RNG = np.random.default_rng(3)
X = RNG.standard_normal((2, 3, 4)).astype(np.float32)
Z = RNG.standard_normal((2, 3, 4)).astype(np.float32)
ROWS = RNG.standard_normal((4, 5)).astype(np.float32)
INDICES = np.array([[1, 0], [2, 2]], np.int32)
ALONG = RNG.integers(0, 3, (2, 3, 4)).astype(np.int32)
Case = tuple[Callable[..., Any], dict[str, np.ndarray[Any, Any]], Callable[..., Any]]


def case(name: str, reference: Callable[..., Any], x: np.ndarray[Any, Any] = X, **more: Any) -> Case:
    return (lambda mb, x: getattr(mb, name)(x=x, **more), {"x": x}, reference)


def updated(x: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    result = x.clone()
    result[:, 1:3, ::2] = update
    return result


def batched_pick(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.stack([row[pick.long()] for row, pick in zip(x, indices, strict=True)])


def scatter(mode: str) -> Case:
    reduce = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}

    def reference(data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        if mode == "update":
            return data.scatter(1, indices.long(), updates)
        return data.scatter_reduce(1, indices.long(), updates, reduce[mode])

    return (
        lambda mb, data, indices, updates: mb.scatter_along_axis(
            data=data, indices=indices, updates=updates, axis=1, mode=mode, validate_indices=False
        ),
        {"data": ROWS, "indices": np.array([[0, 2], [1, 4], [3, 0], [2, 1]], np.int32), "updates": ROWS[:, :2] * 3},
        reference,
    )


CASES: dict[str, Case] = {
    "reshape": case("reshape", lambda x: x.reshape(6, 4), shape=[6, -1]),
    "reshape_keep": case("reshape", lambda x: x.reshape(2, 4, 3), shape=[0, 4, -1]),
    "expand_dims": case("expand_dims", lambda x: x[None, :, None], axes=[0, 2]),
    "expand_dims_back": case("expand_dims", lambda x: x[..., None, None], axes=[-1, -2]),
    "squeeze": case("squeeze", lambda x: x.squeeze(1), X[:, :1], axes=[1]),
    "squeeze_all": case("squeeze", torch.squeeze, X[:1, :1]),
    "transpose": case("transpose", lambda x: x.permute(2, 0, 1), perm=[-1, 0, 1]),
    "tile": case("tile", lambda x: x.repeat(1, 2, 3), reps=[1, 2, 3]),
    "shape": case("shape", lambda x: torch.tensor(x.shape)),
    "reverse": case("reverse", lambda x: x.flip(0, 2), axes=[0, 2]),
    "split": case("split", lambda x: x.split([1, 2], 1), split_sizes=[1, 2], axis=1),
    "split_even": case("split", lambda x: x.chunk(2, 2), num_splits=2, axis=-1),
    "band_part": case("band_part", lambda x: x.tril(1).triu(-1), lower=1, upper=1),
    "band_part_upper": case("band_part", torch.triu, lower=0, upper=-1),
    "pad": case("pad", lambda x: functional.pad(x, (2, 0, 1, 3), value=0.5), pad=[1, 3, 2, 0], constant_val=0.5),
    "pad_reflect": case("pad", lambda x: functional.pad(x, (1, 2), mode="reflect"), pad=[1, 2], mode="reflect"),
    "pad_edge": case("pad", lambda x: functional.pad(x, (1, 2), mode="replicate"), pad=[1, 2], mode="replicate"),
    "one_hot": (
        lambda mb, x: mb.one_hot(
            indices=x, one_hot_vector_size=4, axis=1, on_value=np.float32(2), off_value=np.float32(-1)
        ),
        {"x": INDICES},
        lambda x: functional.one_hot(x.long(), 4).movedim(-1, 1) * 3.0 - 1,
    ),
    "one_hot_default": (
        lambda mb, x: mb.one_hot(indices=x, one_hot_vector_size=3),
        {"x": INDICES},
        lambda x: functional.one_hot(x.long(), 3),
    ),
    "concat": (
        lambda mb, x, z: mb.concat(values=[x, z], axis=-1),
        {"x": X, "z": Z},
        lambda x, z: torch.cat([x, z], -1),
    ),
    "concat_interleave": (
        lambda mb, x, z: mb.concat(values=[x, z], axis=1, interleave=True),
        {"x": X, "z": Z},
        lambda x, z: torch.stack([x, z], 2).flatten(1, 2),
    ),
    "stack": (lambda mb, x, z: mb.stack(values=[x, z], axis=1), {"x": X, "z": Z}, lambda x, z: torch.stack([x, z], 1)),
    "fill": (
        lambda mb, x: mb.fill(shape=mb.shape(x=x), value=np.float32(1.5)),
        {"x": X},
        lambda x: torch.full(x.shape, 1.5),
    ),
    "fill_like": (
        lambda mb, x: mb.fill_like(ref_tensor=x, value=np.float32(1.5)),
        {"x": X},
        lambda x: torch.full(x.shape, 1.5),
    ),
    "range_1d": (
        lambda mb, x: mb.range_1d(start=2, end=mb.squeeze(x=x), step=3),
        {"x": np.array([12], np.int32)},
        lambda x: torch.arange(2, int(x), 3),
    ),
    "slice_by_index": case(
        "slice_by_index", lambda x: x[1:, 0:2, 1:4:2], begin=[1, 0, 1], end=[2, 2, 4], stride=[1, 1, 2]
    ),
    "slice_by_index_masks": case(
        "slice_by_index",
        lambda x: x[:, 1:, -2],
        begin=[1, 1, -2],
        end=[1, 1, 0],
        begin_mask=[True, False, False],
        end_mask=[True, True, False],
        squeeze_mask=[False, False, True],
    ),
    "slice_by_index_back": case(
        "slice_by_index",
        lambda x: x.flip(2),
        begin=[0, 0, -1],
        end=[2, 3, 0],
        stride=[1, 1, -1],
        end_mask=[False, False, True],
    ),
    "slice_by_size": case("slice_by_size", lambda x: x[1:2, 1:, 2:4], begin=[1, 1, -2], size=[1, -1, 2]),
    "slice_update": (
        lambda mb, x, update: mb.slice_update(
            x=x, update=update, begin=[0, 1, 0], end=[2, 3, 4], stride=[1, 1, 2], begin_mask=[True, False, False]
        ),
        {"x": X, "update": Z[:, :2, :2]},
        updated,
    ),
    "gather": (
        lambda mb, x, i: mb.gather(x=x, indices=i, axis=1, validate_indices=False),
        {"x": X, "i": INDICES},
        lambda x, i: x[:, i.long()],
    ),
    "gather_batched": (
        lambda mb, x, i: mb.gather(x=x, indices=i, axis=1, batch_dims=1, validate_indices=False),
        {"x": X, "i": INDICES},
        batched_pick,
    ),
    "gather_int16": (
        lambda mb, x, i: mb.gather(x=x, indices=mb.cast(x=i, dtype="int16"), axis=0, validate_indices=False),
        {"x": ROWS, "i": INDICES},
        lambda x, i: x[i.long()],
    ),
    "gather_along_axis": (
        lambda mb, x, i: mb.gather_along_axis(x=x, indices=i, axis=1, validate_indices=False),
        {"x": X, "i": ALONG},
        lambda x, i: x.gather(1, i.long()),
    ),
    "gather_nd": (
        lambda mb, x, i: mb.gather_nd(x=x, indices=i, validate_indices=False),
        {"x": X, "i": np.array([[[1, 0], [0, 2]]], np.int32)},
        lambda x, i: x[i[..., 0].long(), i[..., 1].long()],
    ),
    "gather_nd_batched": (
        lambda mb, x, i: mb.gather_nd(x=x, indices=i, batch_dims=1, validate_indices=False),
        {"x": X, "i": INDICES[..., None]},
        lambda x, i: batched_pick(x, i[..., 0]),
    ),
    **{f"scatter_{mode}": scatter(mode) for mode in ("update", "add", "mul", "max", "min")},
    "scatter": (
        lambda mb, data, i, updates: mb.scatter(
            data=data, indices=i, updates=updates, axis=1, mode="add", validate_indices=False
        ),
        {"data": X, "i": np.array([2, 0, 2], np.int32), "updates": Z},
        lambda data, i, updates: data.index_add(1, i.long(), updates),
    ),
    "scatter_nd": (
        lambda mb, data, i, updates: mb.scatter_nd(
            data=data, indices=i, updates=updates, mode="sub", validate_indices=False
        ),
        {"data": X, "i": np.array([[1, 0], [0, 2], [1, 0]], np.int32), "updates": Z[0]},
        lambda data, i, updates: data.index_put((i[:, 0].long(), i[:, 1].long()), -updates, accumulate=True),
    ),
}
# scatter_along_axis infers an update whatever its mode; the rest have no inference, or none of runtime shapes.
WITH_INFERENCE = [
    name for name in CASES if not name.startswith(("gather_nd", "fill_like", "concat_interleave", "one_hot", "scatter"))
] + ["scatter_update"]


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(name: str, executed: Any) -> None:
    _, feeds, reference = CASES[name]
    expected = reference(*(torch.from_numpy(array.copy()) for array in feeds.values()))
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(executed[name]) == len(expected)
    for actual, wanted in zip(executed[name], expected, strict=True):
        assert actual.shape == tuple(wanted.shape)
        if name.startswith("scatter"):
            np.testing.assert_allclose(actual, wanted.numpy(), rtol=1e-6)
        else:
            np.testing.assert_array_equal(actual, wanted.numpy())


@pytest.mark.parametrize("name", WITH_INFERENCE)
def test_agrees_with_value_inference(name: str, executed: Any, inferred: Any) -> None:
    for actual, expected in zip(executed[name], inferred(name), strict=True):
        assert expected is not None
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_out_of_range_is_refused_not_wrapped(index: int, builder: Any) -> None:
    mb = builder.mb
    inputs = {"x": builder.placeholder((4, 5)), "i": builder.placeholder((1,), np.int32)}
    path = builder.save(inputs, lambda x, i: mb.gather(x=x, indices=i, axis=0, validate_indices=False, name="pick"))
    session = MilModel.open(path).session()
    np.testing.assert_array_equal(session.predict({"x": ROWS, "i": [3]})["pick"], ROWS[3:])
    with pytest.raises(ArtifactError, match=r"gather failed \(op pick, output pick, function main\).*size 4"):
        session.predict({"x": ROWS, "i": [index]})


def test_negative_indices_count_from_the_end_before_ios_17(builder: Any) -> None:
    mb = builder.mb
    inputs = {"x": builder.placeholder((4, 5)), "i": builder.placeholder((2,), np.int32)}
    path = builder.save(inputs, lambda x, i: mb.gather(x=x, indices=i, axis=0, name="pick"), target="iOS16")
    actual = MilModel.open(path).session().predict({"x": ROWS, "i": [-1, 1]})["pick"]
    np.testing.assert_array_equal(actual, ROWS[[-1, 1]])
