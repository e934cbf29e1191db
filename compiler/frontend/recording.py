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
"""Layer and kind of a state, as in `moec.compiler.ir.program.StateSpec`."""


@dataclass
class Recording:
    """What the hooks record of one forward pass.

    A state is one of: the keys or values that attention takes (for multi-head latent attention these are more than the
    family's own cache holds), the last inputs of a short convolution, or the state of a scan over the tokens.

    Attributes:
        max_length: Context length of the model in tokens.
        names: Module -> its path in the model.
        cache_position: Slots of the new tokens in the cache, [S] int64.
        attention_mask: [B, P + S], 0 where a slot is padding.
        past: State -> its value before the step; None in the first pass, which finds the shapes of the states.
        present: State -> its value after the step.
        fresh: Layer -> the keys and values of the new tokens that it put into the cache.
        states: State -> its shape and dtype, filled in the first pass.
        conv_inputs: Layer -> kernel size of a convolution that asked the cache to keep its inputs and has not run yet.
        experts: Paths of the experts modules that ran.
        attentions: Paths of the attention modules that ran.
        running: Stack of the modules that run now, the innermost last.
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
        """The `layer_idx` of the module that runs.

        Raises:
            UnsupportedModelError: The module has none.
        """
        index = getattr(self.running[-1], "layer_idx", None) if self.running else None
        if not isinstance(index, int):
            raise UnsupportedModelError(f"{self.where()} keeps a state and has no layer_idx that tells its layer")
        return index

    def state(self, layer: int, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """The state [B, *`shape`] that a layer starts from; None in the first pass, which notes its shape.

        Raises:
            UnsupportedModelError: The layer has a state of this kind already.
        """
        if self.past is not None:
            return self.past[layer, kind]
        if (layer, kind) in self.states:
            raise UnsupportedModelError(f"{self.where()} keeps more than one state of the kind {kind}")
        self.states[layer, kind] = ("batch", *shape), dtype
        return None

    def token_mask(self, like: Tensor) -> Tensor:
        """[B, S] in the dtype of `like`: 1 for a token of this step, 0 for padding."""
        if self.attention_mask is None or self.cache_position is None:  # the first pass
            return like.new_ones(like.shape[:2])
        return self.attention_mask[:, -self.cache_position.shape[0] :].to(like.dtype)

    def where(self) -> str:
        """Path and class of the module that runs, or in which an error ended the pass."""
        if not self.running:
            return "the model"
        module = self.running[-1]
        return f"{self.name(module) or 'the model'}: {type(module).__name__}"


_ACTIVE: ContextVar[Recording] = ContextVar("recording of the trace in progress")


@contextlib.contextmanager
def recording(record: Recording) -> Iterator[Recording]:
    """Let the hooks write to `record` in this thread, inside the block.

    Transformers calls the hooks with the arguments of an attention, mask or experts implementation, among which a
    recording has no place.
    """
    before = _ACTIVE.set(record)
    try:
        yield record
    finally:
        _ACTIVE.reset(before)


@contextlib.contextmanager
def watching(record: Recording, model: nn.Module) -> Iterator[None]:
    """Keep the stack of running modules of `model` in `record.running`, inside the block.

    An error leaves the stack as it was, so that the message can name the module, which a traceback does not.
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
    """The recording of the trace in progress in this thread.

    Raises:
        LookupError: No trace is in progress.
    """
    return _ACTIVE.get()
