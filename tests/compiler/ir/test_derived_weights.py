import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.compiler.ir.derived_weights import Member, Reshaped, Sliced, permute, slice_axis
from moec.compiler.ir.weights import Constant

SHAPES = [(12, 2), (2, 12), (4, 3, 2), (24,), (1, 24), (3, 2, 2, 2), (24, 1)]


def tensor(shape):
    return Constant(torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape))


@given(st.sampled_from(SHAPES), st.sampled_from(SHAPES), st.data())
def test_any_rows_of_a_reshaped_tensor(old, new, data):
    reshaped = Reshaped(tensor(old), new)
    start = data.draw(st.integers(0, new[0]))
    stop = data.draw(st.integers(start, new[0] + 2))
    assert torch.equal(reshaped.rows(start, stop), reshaped.read()[start:stop])
    assert torch.equal(reshaped.read(), torch.arange(24.0).reshape(new))


@pytest.mark.parametrize(("old", "new"), [((), (1, 1)), ((1,), ()), ((0, 4), (0, 2, 2)), ((0, 4), (4, 0))])
def test_scalars_and_empty_tensors(old, new):
    reshaped = Reshaped(tensor(old), new)
    assert tuple(reshaped.read().shape) == new
    if new:
        assert torch.equal(reshaped.rows(0, 1), reshaped.read()[0:1])


@pytest.mark.parametrize("order", [(0, 2, 1), (2, 0, 1), (-1, -2, -3)])
def test_permuted_rows(order):
    source = tensor((4, 3, 2))
    permuted = permute(source, order)
    want = source.value.permute(order)
    assert permuted.shape == tuple(want.shape)
    assert torch.equal(permuted.rows(1, 2), want[1:2])
    assert permuted.read().is_contiguous()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_of_a_slice(axis):
    source = tensor((4, 3, 2))
    sliced = slice_axis(source, axis, 1, 2)
    want = source.value.narrow(axis, 1, 1)
    assert sliced.shape == tuple(want.shape)
    assert torch.equal(sliced.read(), want)
    assert torch.equal(sliced.rows(0, 1), want[0:1])


def test_a_slice_ends_where_it_ends():
    assert torch.equal(Sliced(tensor((6,)), 1, 2).rows(1, 5), torch.tensor([2.0]))


def test_a_member_is_one_entry():
    source = tensor((4, 3, 2))
    member = Member(source, 2)
    assert member.shape == (3, 2)
    assert torch.equal(member.read(), source.value[2])
    assert torch.equal(member.rows(1, 3), source.value[2, 1:3])
