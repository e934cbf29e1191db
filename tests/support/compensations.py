"""Compensations with random numbers, of a size that shows in the logits."""

from __future__ import annotations

import torch

from moec import passes
from moec.compiler.ir.program import Program
from moec.passes.routing.compensation import CompensateDropped, Compensation
from moec.passes.routing.dynamic_routing import DynamicRouting
from moec.passes.routing.policies.base import Policy


def random_compensation(experts: int, hidden: int, top_k: int, rank: int = 3, seed: int = 0) -> Compensation:
    """One of given sizes."""
    random = torch.Generator().manual_seed(seed)
    shapes = ((experts, hidden), (hidden, rank), (rank, hidden))
    return Compensation(*(torch.randn(shape, generator=random) for shape in shapes), top_k)


def compensated(program: Program, policy: Policy) -> Program:
    """A Program with a policy, and with a random compensation in each layer."""
    layers = tuple(
        random_compensation(row.num_experts, row.hidden_size, row.top_k, seed=row.index) for row in program.layers
    )
    done = [item.name for item in passes.default_passes()]
    return passes.run_passes(program, [DynamicRouting(policy), CompensateDropped(layers)], completed=done)[0]
