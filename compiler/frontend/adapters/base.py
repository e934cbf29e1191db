"""The adapters, and the contract of an adapter.

An adapter replaces the forward of a block that bypasses the registries of transformers by one that calls the op of
moec, such as `moec::experts`. The block is found by its class or structure, never by the name of the model.
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
    """Replaces `forward` of every module that is a `block`, given as a class name or as a predicate."""

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
    """Replace the forward of every block of `model` for which there is an adapter."""
    for module in model.modules():
        if adapter := next((adapter for adapter in ADAPTERS if adapter.fits(module)), None):
            module.forward = adapter.forward.__get__(module)
