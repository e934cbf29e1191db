"""Recognise the activation of an expert or a convolution by its values on a grid, whatever its class is called."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.ir.experts import ACTIVATIONS, Gate


def activation_name(function: Any, where: str) -> str:
    """The key of `ACTIVATIONS` whose function has the values of `function` on a grid.

    Args:
        function: Tensor -> tensor of the same shape.
        where: The module, for messages.

    Raises:
        UnsupportedModelError: No activation matches.
    """
    with _disable_current_modes():
        grid = _probes(())
        values = function(grid)
        for name, reference in ACTIVATIONS.items():
            if torch.allclose(values, reference(grid), rtol=1e-5, atol=1e-6):
                return name
    raise UnsupportedModelError(
        f"{where}: its activation {type(function).__name__} is not one of {', '.join(ACTIVATIONS)}",
        hint="to support it, add it to ACTIVATIONS in compiler/ir/experts.py",
    )


def gate_of(module: Any, where: str) -> Gate:
    """The Gate of an experts module of transformers, found by its values on a grid, whatever its class overrides.

    Raises:
        UnsupportedModelError: No Gate matches.
    """
    if not module.has_gate:
        return Gate(activation_name(module.act_fn, where), gated=False)
    interleaved = not module.is_concatenated
    with _disable_current_modes():
        candidates = list(_candidates(module, interleaved))
        grid = _probes({candidate.limit for candidate in candidates})
        gate, up = torch.meshgrid(grid, grid, indexing="ij")
        pair = torch.stack([gate, up], -1).flatten(-2) if interleaved else torch.cat([gate, up], -1)
        values = module._apply_gate(pair)
        for candidate in candidates:
            if torch.allclose(values, candidate(pair), rtol=1e-5, atol=1e-6):
                return candidate
    raise UnsupportedModelError(
        f"{where}: {type(module).__name__} combines gate and up in a way that moec does not know",
        hint="to support it, extend Gate in compiler/ir/experts.py",
    )


def _candidates(module: Any, interleaved: bool) -> Iterator[Gate]:
    """Every Gate that the module may have: limits and alphas are taken from its numeric attributes and its config."""
    numbers = {float(value) for value in vars(module).values() if isinstance(value, int | float) and value}
    config = getattr(module, "config", None)
    numbers |= (
        {float(value) for key, value in vars(config).items() if "limit" in key and isinstance(value, int | float)}
        if config is not None
        else set()
    )
    limits = (0.0, *sorted(number for number in numbers if number > 0))
    for activation, limit, offset in itertools.product(ACTIVATIONS, limits, (0.0, 1.0)):
        yield Gate(activation, True, interleaved, 1.0, limit, offset)
    for alpha, limit, offset in itertools.product(sorted(numbers), limits, (0.0, 1.0)):
        yield Gate("silu", True, interleaved, alpha, limit, offset)


def _probes(limits: Collection[float]) -> Tensor:
    """Values that tell activations apart: near 0, in the curved region, far out, and on both sides of every limit.

    `x * sigmoid(alpha * x)` with a large alpha differs from ReLU near 0 alone, and a limit shows only beyond it.
    """
    near = torch.logspace(-3, 3, 25)
    edges = torch.tensor([factor * limit for limit in limits for factor in (0.99, 1.01)])
    return torch.cat([torch.linspace(-12, 12, 41), near, -near, edges, -edges])
