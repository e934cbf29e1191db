"""Let attention keep its keys and values as 8-bit codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.fake_values import fake_mode, infer
from moec.compiler.ir.operands import Attention
from moec.compiler.ir.program import ATTENTION, Program, StateSpec, module_of
from moec.compiler.ir.weights import Constant
from moec.passes.base import Pass, PassResult
from moec.passes.rewriting import Rewrite
from moec.quantize.kv_cache import AttentionCache, attention_caches, scale_name


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Make the states of attention int8, with one scale for each channel of a head.

    ```
    %out, %present_key, %present_value = attention(..., %past_key, %past_value, ..., None, None)
    ->
    %out, %present_key, %present_value = attention(..., %past_key, %past_value, ..., @key.scale, @value.scale)
    ```
    The past and present of keys and values are int8 afterwards. Other states stay as they are, and so does a cache that
    something besides attention reads, with a rejection.

    Attributes:
        scales: Input name of a state -> scales [heads, width] float32, from `moec.quantize.kv_cache.measure_scales`.
    """

    name: ClassVar[str] = "quantize-cache"
    requires: ClassVar[tuple[str, ...]] = ("decompose",)

    scales: Mapping[str, Tensor] = field(default_factory=dict)

    def run(self, program: Program) -> PassResult:
        """See the class."""
        if not self.scales:
            return PassResult(program, modified=False)
        rewrite, changed = Rewrite(program), set[str]()
        placeholders = rewrite.graph.find_nodes(op="placeholder")
        inputs = [spec.name for spec in program.inputs] + [state.input.name for state in program.states]
        past = dict(zip(inputs, placeholders, strict=True))
        for cache in attention_caches(program.replace(graph=rewrite.graph)):
            if cache.reason:
                rewrite.rejections.append(Rejection(self.name, module_of(cache.nodes[0]), cache.reason))
                continue
            self._round(rewrite, cache, past)
            changed |= {state.input.name for state in cache.states}
        found = rewrite.result(modified=bool(changed))
        if not found.modified:
            return found
        states = tuple(_of_codes(state) if state.input.name in changed else state for state in program.states)
        return replace(found, program=found.program.replace(states=states))

    def _round(self, rewrite: Rewrite, cache: AttentionCache, past: Mapping[str, fx.Node]) -> None:
        """Give the attention nodes of a cache its scales, and their past and present the dtype of codes."""
        scales = []
        for state in cache.states:
            name, values = scale_name(state.input.name), Constant(self.scales[state.input.name])
            rewrite.added[name] = values
            _set_value(past[state.input.name], torch.int8)
            with rewrite.graph.inserting_before(cache.nodes[0]):
                scales.append(rewrite.graph.create_node("get_attr", name))
            with fake_mode(rewrite.graph):
                scales[-1].meta = {"val": torch.empty(values.shape), "module": module_of(cache.nodes[0])}
        for node in cache.nodes:
            key_scale, value_scale = scales
            node.args = replace(Attention.of(node), key_scale=key_scale, value_scale=value_scale).args
            value = infer(ATTENTION, node.args, {}, fake_mode(rewrite.graph))
            node.meta = {**node.meta, "val": value}
            for user in node.users:
                user.meta = {**user.meta, "val": value[user.args[1]]}


def _set_value(node: fx.Node, dtype: torch.dtype) -> None:
    value = node.meta["val"]
    with value.fake_mode:
        node.meta = {**node.meta, "val": torch.empty(value.shape, dtype=dtype)}


def _of_codes(state: StateSpec) -> StateSpec:
    """`state` with codes in place of floats."""
    past, present = (replace(end, dtype=torch.int8) for end in (state.input, state.output))
    return replace(state, input=past, output=present)
