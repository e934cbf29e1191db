"""What a forward pass with moec's hooks records: states, experts, attention layers, and the module that runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.ir.program import Dim

StateKey = tuple[int, str]
"""Layer and kind of a state, see `moec.compiler.ir.program.StateSpec`."""


@dataclass
class Recording:
    """What one forward pass told us.

    `past` is None while the shapes of the states are still being found out. A state is what attention takes as keys and
    values, which for multi-head latent attention is more than what the family puts into its cache, what a short
    convolution keeps of its inputs, or what a scan over the tokens carries on.
    """

    max_length: int
    names: dict[nn.Module, str]
    cache_position: Tensor | None = None
    attention_mask: Tensor | None = None
    past: Mapping[StateKey, Tensor] | None = None
    present: dict[StateKey, Tensor] = field(default_factory=dict)
    fresh: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    states: dict[StateKey, tuple[tuple[Dim, ...], torch.dtype]] = field(default_factory=dict)
    conv_inputs: dict[int, int] = field(default_factory=dict)
    experts: list[str] = field(default_factory=list)
    attentions: list[str] = field(default_factory=list)
    running: list[nn.Module] = field(default_factory=list)

    def name(self, module: nn.Module) -> str:
        """Path of `module` in the model."""
        return self.names.get(module, type(module).__name__)

    def layer(self) -> int:
        """Index of the layer whose module runs.

        Raises:
            UnsupportedModelError: The module does not say.
        """
        index = getattr(self.running[-1], "layer_idx", None) if self.running else None
        if not isinstance(index, int):
            raise UnsupportedModelError(f"{self.where()} keeps a state and does not say which layer it belongs to")
        return index

    def state(self, layer: int, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """The state [B, *`shape`] that a layer starts from; None while the shapes are still being found out.

        Raises:
            UnsupportedModelError: The layer has had one of this kind already.
        """
        if self.past is not None:
            return self.past[layer, kind]
        if (layer, kind) in self.states:
            raise UnsupportedModelError(f"{self.where()} keeps more than one state of the kind {kind}")
        self.states[layer, kind] = ("batch", *shape), dtype
        return None

    def token_mask(self, like: Tensor) -> Tensor:
        """1 where a token of this step is none of padding, in the dtype of `like`: [B, S]."""
        if self.attention_mask is None or self.cache_position is None:  # while shapes are found out
            return like.new_ones(like.shape[:2])
        return self.attention_mask[:, -self.cache_position.shape[0] :].to(like.dtype)

    def where(self) -> str:
        """Path and class of the module that runs, or that an error stopped."""
        if not self.running:
            return "the model"
        module = self.running[-1]
        return f"{self.name(module) or 'the model'}: {type(module).__name__}"


_ACTIVE: ContextVar[Recording] = ContextVar("recording of the trace in progress")


@contextlib.contextmanager
def recording(record: Recording) -> Iterator[Recording]:
    """Make `record` the one that the hooks write to in this thread.

    Transformers calls them with what an implementation of attention, masks or experts takes, and hands nothing of ours
    on to them.
    """
    before = _ACTIVE.set(record)
    try:
        yield record
    finally:
        _ACTIVE.reset(before)


@contextlib.contextmanager
def watching(record: Recording, model: nn.Module) -> Iterator[None]:
    """Keep the stack of modules of `model` that run in `record`; where an error ends the pass, it stays as it was then.

    An error that comes up deep in a model names the module by it, which a traceback does not.
    """

    def enter(module: nn.Module, _: Any) -> None:
        record.running.append(module)

    def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
        record.running.pop()

    handles = [module.register_forward_pre_hook(enter) for module in model.modules()]
    handles += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def active_record() -> Recording:
    """The recording that the trace in progress in this thread writes to."""
    return _ACTIVE.get()
