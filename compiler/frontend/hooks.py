"""The hooks through which transformers speaks moec's ops while a model is traced.

Three registries of transformers are used under the name "moec": experts functions, attention functions and mask
functions. The cache of `moec.compiler.frontend.step_cache` hands the past to the attention function, so that appending
to it is part of `moec::attention`; what recurrent layers call is in `moec.compiler.frontend.scans`. No model is known
here.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.frontend.masks import Mask
from moec.compiler.ir.ops import ACTIVATIONS, Gate
from moec.compiler.ir.program import Dim

NAME = "moec"

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


def mask_hook(*_: Any, mask_function: Any, **__: Any) -> Mask:
    """Mask implementation: return the function instead of a tensor. It reaches the attention function unharmed."""
    return Mask(mask_function, active_record().max_length)


def attention_hook(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention implementation: one `moec::attention` node per layer.

    Args:
        module: The attention module; its `layer_idx` names the state unless the keys tell better.
        query: [B, Hq, S, D].
        key: [B, Hkv, S, D], the new tokens alone.
        value: [B, Hkv, S, Dv].
        attention_mask: The Mask from `mask_hook`.
        scaling: Factor on the logits, 1 / sqrt(D) if None.
        dropout: Unused at inference.
        softcap: See `moec::attention`.
        s_aux: Attention sinks, [Hq].
        position_bias: Must be None.

    Raises:
        UnsupportedModelError: The mask or a bias has a form that moec does not know.
    """
    record = active_record()
    where = record.name(module)
    record.attentions.append(where)
    if not isinstance(attention_mask, Mask):
        raise UnsupportedModelError(
            f"{where}: its attention mask does not come from the mask functions of transformers",
            hint="a family that builds its own mask needs an adapter",
        )
    if position_bias is not None:
        raise UnsupportedModelError(f"{where}: attention with a position bias is not supported")
    layer = _layer_of(record, module, key)
    if record.past is None:
        for kind, state in (("key", key), ("value", value)):
            shape = ("batch", int(state.shape[1]), "past_sequence", int(state.shape[3]))
            record.states.setdefault((layer, kind), (shape, state.dtype))
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
    pattern = attention_mask.pattern()
    out, present_key, present_value = torch.ops.moec.attention(
        query,
        key,
        value,
        record.past[layer, "key"],
        record.past[layer, "value"],
        record.cache_position,
        record.attention_mask,
        s_aux,
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        pattern.kind,
        pattern.window,
        float(softcap or 0.0),
    )
    record.present.setdefault((layer, "key"), present_key)
    record.present.setdefault((layer, "value"), present_value)
    return out, None


def _layer_of(record: Recording, module: nn.Module, key: Tensor) -> int:
    """The state that `key` was appended to. Layers that share keys attend over the state of the first of them."""
    for layer, (fresh, _) in record.fresh.items():
        if fresh is key:
            return layer
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int) or index not in record.fresh:
        raise UnsupportedModelError(
            f"{record.name(module)}: its keys are not in the cache that moec handed to it",
            hint="a family that bypasses the cache of transformers needs an adapter",
        )
    return index


def experts_hook(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts implementation: one `moec::experts` node per layer, by the flags that transformers keeps on the class."""
    record = active_record()
    where = record.name(module)
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedModelError(f"{where}: experts with a norm of their own after down_proj are not supported")
    first = "gate_up_proj" if module.has_gate else "up_proj"
    gate = _gate_of(module, where)
    return emit_experts(
        record,
        where,
        hidden_states,
        top_k_index,
        top_k_weights,
        gate,
        getattr(module, first),
        module.down_proj,
        gate_up_bias=getattr(module, f"{first}_bias") if module.has_bias else None,
        down_bias=module.down_proj_bias if module.has_bias else None,
        transposed=bool(module.is_transposed),
    )


def emit_experts(
    record: Recording,
    where: str,
    hidden_states: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Gate,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """Call `moec::experts` and count it; adapters use this too. Shapes as in `moec.compiler.ir.ops.experts`."""
    record.experts.append(where)
    out: Tensor = torch.ops.moec.experts(
        hidden_states,
        indices,
        weights.to(hidden_states.dtype),
        gate_up_proj,
        gate_up_bias,
        down_proj,
        down_bias,
        gate.activation,
        gate.gated,
        gate.interleaved,
        transposed,
        gate.alpha,
        gate.limit,
        gate.up_offset,
        gate.limit_activated,
    )
    return out


def active_record() -> Recording:
    """The recording that the trace in progress in this thread writes to."""
    return _ACTIVE.get()


def activation_name(function: Any, where: str) -> str:
    """Name of an activation in `ACTIVATIONS`, found by its values.

    Raises:
        UnsupportedModelError: It is none of them.
    """
    with _disable_current_modes():
        grid = _probes(())
        values = function(grid)
        for name, reference in ACTIVATIONS.items():
            if torch.allclose(values, reference(grid), rtol=1e-5, atol=1e-6):
                return name
    raise UnsupportedModelError(
        f"{where}: its activation {type(function).__name__} is not one of {', '.join(ACTIVATIONS)}",
        hint="ACTIVATIONS in compiler/ir/ops.py is the one place to add it",
    )


def _gate_of(module: Any, where: str) -> Gate:
    """Recognise the activation of an experts module, whatever its class overrides, by its values on a grid."""
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
        f"{where}: {type(module).__name__} combines gate and up in a form that moec does not know",
        hint="Gate in compiler/ir/ops.py is the one place to add it",
    )


def _candidates(module: Any, interleaved: bool) -> Iterator[Gate]:
    """Every Gate that the numbers kept on the module allow: limits and alphas are among its float attributes."""
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
    """Values that tell activations apart: near 0, where they bend, far out, and on both sides of every limit.

    `x * sigmoid(alpha * x)` with a large alpha is ReLU but for values near 0, and a limit shows beyond it alone.
    """
    near = torch.logspace(-3, 3, 25)
    edges = torch.tensor([factor * limit for limit in limits for factor in (0.99, 1.01)])
    return torch.cat([torch.linspace(-12, 12, 41), near, -near, edges, -edges])


def register() -> None:
    """Enter the hooks into the registries of transformers; calling it again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_hook)
    AttentionInterface.register(NAME, attention_hook)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask_hook)
