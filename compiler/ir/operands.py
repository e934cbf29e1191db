"""The operands of calls by name: for any op by its schema, for moec's ops as frozen views."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import fx

from moec.compiler.ir.experts import Gate

_WITHOUT_MEANING = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking", "requires_grad"})
"""Keyword arguments about device and memory layout, which a graph of moec does not specify."""


def bound(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of an op, completed by the defaults of its schema.

    Returns:
        All positional arguments, and the keyword-only arguments whose value differs from their default.
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    given = dict(node.kwargs)
    positional: list[Any] = list(node.args)
    keywords: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.kwarg_only:
            value = given.get(argument.name, argument.default_value)
            if argument.name not in _WITHOUT_MEANING and value is not None and value != argument.default_value:
                keywords[argument.name] = value
        elif position >= len(positional):
            positional.append(given.get(argument.name, argument.default_value))
    return tuple(positional), keywords


def operands(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an op by name, including defaults of positional arguments."""
    assert isinstance(node.target, torch._ops.OpOverload)
    positional, keywords = bound(node)
    names = [argument.name for argument in node.target._schema.arguments if not argument.kwarg_only]
    return {**dict(zip(names, positional, strict=True)), **keywords}


class _View:
    """A frozen view of the operands of one op; `of` makes it from a node."""

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """The operands of `node`, which calls this op."""
        return cls(**operands(node))

    @property
    def args(self) -> tuple[Any, ...]:
        """The operands in the order of the op's schema, for `node.args`."""
        return tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Experts(_View):
    """Operands of `moec::experts`, with the same shapes and meaning."""

    hidden_states: fx.Node
    indices: fx.Node
    weights: fx.Node
    gate_up_proj: fx.Node
    gate_up_bias: fx.Node | None
    down_proj: fx.Node
    down_bias: fx.Node | None
    activation: str
    gated: bool
    interleaved: bool
    transposed: bool
    alpha: float
    limit: float
    up_offset: float
    limit_activated: bool

    @property
    def gate(self) -> Gate:
        """How the outputs of the first projection are combined."""
        return Gate(**{field.name: getattr(self, field.name) for field in fields(Gate)})

    @property
    def stacks(self) -> dict[str, fx.Node]:
        """Operand name -> stacked weight or bias, without those that are None."""
        named = {
            "gate_up_proj": self.gate_up_proj,
            "gate_up_bias": self.gate_up_bias,
            "down_proj": self.down_proj,
            "down_bias": self.down_bias,
        }
        return {name: node for name, node in named.items() if node is not None}

    @property
    def num_experts(self) -> int:
        """E, the number of experts."""
        return int(self.gate_up_proj.meta["val"].shape[0])

    @property
    def top_k(self) -> int:
        """k, the number of slots per token."""
        return int(self.indices.meta["val"].shape[1])

    @property
    def hidden_size(self) -> int:
        """H, the width of the hidden states."""
        return int(self.hidden_states.meta["val"].shape[1])

    @property
    def intermediate_size(self) -> int:
        """I, the width between the two projections."""
        return int(self.down_proj.meta["val"].shape[1 if self.transposed else 2])


@dataclass(frozen=True, slots=True)
class Select(_View):
    """Operands of `moec::select`, with the same shapes and meaning."""

    weights: fx.Node
    keep: fx.Node
    renormalize: bool


@dataclass(frozen=True, slots=True)
class Attention(_View):
    """Operands of `moec::attention`, with the same shapes and meaning."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    past_key: fx.Node
    past_value: fx.Node
    cache_position: fx.Node
    attention_mask: fx.Node | None
    sinks: fx.Node | None
    scale: float
    kind: str
    window: int
    softcap: float
    selected: fx.Node | None
    key_scale: fx.Node | None
    value_scale: fx.Node | None


@dataclass(frozen=True, slots=True)
class Indexer(_View):
    """Operands of `moec::indexer`, with the same shapes and meaning."""

    query: fx.Node
    key: fx.Node
    weights: fx.Node
    past_key: fx.Node
    cache_position: fx.Node
    attention_mask: fx.Node | None
    scale: float
    kind: str
    window: int
    top_k: int


@dataclass(frozen=True, slots=True)
class RmsNorm(_View):
    """Operands of `moec::rms_norm`, with the same shapes and meaning."""

    hidden_states: fx.Node
    weight: fx.Node | None
    eps: float


@dataclass(frozen=True, slots=True)
class Rotary(_View):
    """Operands of `moec::rotary`, with the same shapes and meaning."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node


@dataclass(frozen=True, slots=True)
class LinearAttention(_View):
    """Operands of `moec::linear_attention`, with the same shapes and meaning."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    decay: fx.Node | None
    beta: fx.Node | None
    state: fx.Node
    update_rule: str
    scale: float

    @property
    def heads(self) -> tuple[int, int, int]:
        """The numbers of query, key and value heads: Hq, Hk and H."""
        query, key, value = (int(node.meta["val"].shape[2]) for node in (self.query, self.key, self.value))
        return query, key, value

    @property
    def widths(self) -> tuple[int, int]:
        """The widths of a key head and a value head: Dk and Dv."""
        return int(self.key.meta["val"].shape[3]), int(self.value.meta["val"].shape[3])


@dataclass(frozen=True, slots=True)
class CausalConv(_View):
    """Operands of `moec::causal_conv`, with the same shapes and meaning."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    state: fx.Node
    activation: str
