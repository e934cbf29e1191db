"""The contract of an adapter, and the one table of them.

An adapter swaps the block of a family that bypasses the registries of transformers for one that calls
`moec::experts`. It is found by the class or structure of the block, never by the name of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from moec.compiler.frontend.adapters.dbrx import DBRX_EXPERTS
from moec.compiler.frontend.adapters.jetmoe import JETMOE_ATTENTION, JETMOE_MLP
from moec.compiler.frontend.adapters.llama4 import LLAMA4_MOE
from moec.compiler.frontend.adapters.longcat import LONGCAT_EXPERTS
from moec.compiler.frontend.adapters.step3p7 import STEP3P7_EXPERTS


@dataclass(frozen=True, slots=True)
class Adapter:
    """Replaces `forward` of the modules whose class has the name `block`."""

    block: str
    forward: Callable[..., object]


ADAPTERS: tuple[Adapter, ...] = (
    Adapter(*DBRX_EXPERTS),
    Adapter(*JETMOE_ATTENTION),
    Adapter(*JETMOE_MLP),
    Adapter(*LLAMA4_MOE),
    Adapter(*LONGCAT_EXPERTS),
    Adapter(*STEP3P7_EXPERTS),
)


def adapt(model: nn.Module) -> None:
    """Give every block of `model` that an adapter knows the forward of that adapter."""
    by_name = {adapter.block: adapter for adapter in ADAPTERS}
    for module in model.modules():
        if adapter := by_name.get(type(module).__name__):
            module.forward = adapter.forward.__get__(module)
