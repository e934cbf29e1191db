"""The contract of an adapter, and the one table of them.

An adapter swaps the block of a family that bypasses the registries of transformers for one that calls
`moec::experts`, or whatever op of moec it is. It is found by the class or structure of the block, never by the name of
the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from moec.compiler.frontend.adapters.convolutional_attention import CONVOLUTIONAL_ATTENTION
from moec.compiler.frontend.adapters.dbrx import DBRX_EXPERTS
from moec.compiler.frontend.adapters.jetmoe import JETMOE_ATTENTION, JETMOE_MLP
from moec.compiler.frontend.adapters.lightning_attention import LIGHTNING_ATTENTION
from moec.compiler.frontend.adapters.llama4 import LLAMA4_MOE
from moec.compiler.frontend.adapters.longcat import LONGCAT_EXPERTS
from moec.compiler.frontend.adapters.step3p7 import STEP3P7_EXPERTS


@dataclass(frozen=True, slots=True)
class Adapter:
    """Replaces `forward` of the modules that are `block`: the name of their class, or what tells them by structure."""

    block: str | Callable[[nn.Module], bool]
    forward: Callable[..., object]

    def fits(self, module: nn.Module) -> bool:
        """Whether `module` is such a block."""
        return type(module).__name__ == self.block if isinstance(self.block, str) else self.block(module)


ADAPTERS: tuple[Adapter, ...] = (
    Adapter(*CONVOLUTIONAL_ATTENTION),
    Adapter(*DBRX_EXPERTS),
    Adapter(*JETMOE_ATTENTION),
    Adapter(*JETMOE_MLP),
    Adapter(*LIGHTNING_ATTENTION),
    Adapter(*LLAMA4_MOE),
    Adapter(*LONGCAT_EXPERTS),
    Adapter(*STEP3P7_EXPERTS),
)


def adapt(model: nn.Module) -> None:
    """Give every block of `model` that an adapter knows the forward of that adapter."""
    for module in model.modules():
        if adapter := next((adapter for adapter in ADAPTERS if adapter.fits(module)), None):
            module.forward = adapter.forward.__get__(module)
