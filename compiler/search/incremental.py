"""Runs variants of one Program incrementally: a variant resumes at the first node where it differs from earlier ones.

The graph is that of the pretrained model. It is cut before each node that depends on a choice: the format of a part,
the pruned experts of an MoE layer, or its routing policy. The values that cross a cut are cached under all choices
before it, so a variant that shares its first choices with an earlier one resumes from these values. A policy is applied
by `policies.base.select`, the reference of `moec::select`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, fx

from moec.compiler.ir.analysis import ancestors
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import EXPERTS, Program
from moec.compiler.ir.weights import LazyTensor
from moec.compiler.search.compensations import Compensations
from moec.compiler.search.variant import FLOAT, Variant
from moec.passes.experts.prune_experts import PruneExperts, SelectedRows
from moec.passes.routing.policies.base import select
from moec.quantize.formats import FloatFormat, FloatKind, IntegerFormat, PaletteFormat, parse_format
from moec.quantize.lazy import Float16, palettized, quantized
from moec.quantize.methods.rounding import RoundingResult
from moec.quantize.planning.sensitivity import Part

STATE_BYTES = 2 << 30
"""Memory limit of the cached values, in bytes."""
STATE_SHARE = 1 / 4
"""Largest share of what they and the free memory take together. It is asked again for every batch, so that several
workers of a machine leave each other room: n of them take n / (n + 3) of it."""
Codes = Mapping[tuple[str, str], RoundingResult]
"""Name of a tensor and text form of a format -> calibrated codes; other tensors are rounded to nearest."""


@dataclass(frozen=True)
class _Weight:
    """A tensor of a variant, and the key under which its values are cached."""

    key: str
    tensor: LazyTensor


@dataclass(frozen=True)
class Output:
    """Result of a variant for a batch.

    Attributes:
        logits: [B, S, V] float32.
        kept: Share of the pretrained slots that each MoE layer executes.
        tokens: Tokens that each remaining expert of each MoE layer computes, [experts] each.
    """

    logits: Tensor
    kept: tuple[float, ...]
    tokens: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class _Used:
    """What one MoE layer executes of a batch; see `Output`."""

    kept: float
    tokens: Tensor


class IncrementalRunner(ProgramRunner):
    """Runs variants of `program`.

    Args:
        program: Float Program after the common passes, in float32.
        parts: The parts whose formats are chosen; see `parts_of`.
        codes: See `Codes`.
        compensations: Fits what stands in for dropped experts; needed by variants whose policies ask for it.
        state_bytes: Memory limit of the cached values; None: see `STATE_BYTES` and `STATE_SHARE`.
    """

    def __init__(
        self,
        program: Program,
        parts: Sequence[Part],
        codes: Codes | None = None,
        compensations: Compensations | None = None,
        *,
        state_bytes: int | None = None,
    ) -> None:
        super().__init__(program)
        self._compensations = compensations
        self._parts, self._codes = tuple(parts), codes or {}
        self._part_of = {name: index for index, part in enumerate(parts) for name in part.names}
        self._numbers = {node: number for number, node in enumerate(program.nodes(EXPERTS))}
        self._pruned: dict[tuple[int, tuple[int, ...]], dict[str, SelectedRows]] = {}
        self._prunable = [frozenset(self._rows_of(number, (0,))) for number in range(len(program.layers))]
        self._weights: dict[str, _Weight] = {}
        self._variant = Variant.unchanged(program, parts)
        self._used: dict[int, _Used] = {}
        self._nodes = self._needed()
        self._sites = self._find_sites()
        self._cuts = sorted({start for start, _ in self._sites})
        self._crossing = {cut: self._across(cut) for cut in self._cuts}
        self._states_kept: OrderedDict[tuple[Hashable, ...], tuple[dict[fx.Node, Any], dict[int, _Used]]] = (
            OrderedDict()
        )
        self._state_bytes, self._state_used = state_bytes, 0
        self._holders: Counter[int] = Counter()
        """Identity of a cached tensor -> the number of cached states that share it."""
        self.executed = 0
        """Number of nodes that have been run so far."""

    def pruned_weights(self, number: int) -> frozenset[str]:
        """The weights that lose rows when an MoE layer is pruned; empty if it cannot be pruned."""
        return self._prunable[number]

    def order(self, variant: Variant) -> tuple[str, ...]:
        """Sort key that places variants with the same first choices next to each other."""
        self._variant = variant
        return tuple(str(self._choice(site)) for _, site in self._sites)

    @property
    def course(self) -> tuple[tuple[float, tuple[str, int]], ...]:
        """The choices in graph order, each with the share of the nodes that run if all choices before it are known."""
        first, count = self._cuts[0], len(self._nodes)
        return tuple(((count - start) / (count - first), site) for start, site in self._sites)

    @torch.no_grad()
    def evaluate(self, variant: Variant, batch: Hashable, input_ids: np.ndarray) -> Output:
        """Run a variant.

        Args:
            variant: The variant to run.
            batch: Identifies the batch; calls with the same identifier share cached values.
            input_ids: [B, S].

        Raises:
            LoweringError: The experts of a layer cannot be pruned.
        """
        self._set(variant)
        values, start = self._resume(batch, input_ids)
        for index in range(start, len(self._nodes)):
            if index in self._crossing and index != start:
                self._keep(batch, index, values)
            node = self._nodes[index]
            if node.op == "call_function":
                values[node] = self._call(node, values)
                self.executed += 1
                for dead in self._last_use[node]:
                    values.pop(dead, None)
        self._drop_oldest()
        logits = values[self.program.outputs()["logits"]].float()
        used = [self._used[number] for number in range(len(self.program.layers))]
        return Output(logits, tuple(one.kept for one in used), tuple(one.tokens for one in used))

    def _resume(self, batch: Hashable, input_ids: np.ndarray) -> tuple[dict[fx.Node, Any], int]:
        """Cached values to resume from, and the index of the first node to run."""
        for cut in reversed(self._cuts):
            key = self._key(batch, cut)
            if key in self._states_kept:
                self._states_kept.move_to_end(key)
                values, used = self._states_kept[key]
                self._used = dict(used)
                return dict(values), cut
        self.reset()
        fed = self.feeds(input_ids)
        names = [spec.name for spec in self.program.inputs] + [state.input.name for state in self.program.states]
        placeholders = self.program.graph.find_nodes(op="placeholder")
        self._used = {}
        return {node: fed[name] for node, name in zip(placeholders, names, strict=True)}, 0

    def _keep(self, batch: Hashable, cut: int, values: Mapping[fx.Node, Any]) -> None:
        key = self._key(batch, cut)
        if key in self._states_kept:
            return
        held = {node: values[node] for node in self._crossing[cut] if node in values}
        self._states_kept[key] = (held, dict(self._used))
        for value in _tensors(held):
            self._state_used += 0 if self._holders[id(value)] else value.nbytes
            self._holders[id(value)] += 1

    def _drop_oldest(self) -> None:
        """Drop the states that were used longest ago until the others fit into the limit."""
        room = self._state_used + psutil.virtual_memory().available
        limit = min(STATE_BYTES, int(STATE_SHARE * room)) if self._state_bytes is None else self._state_bytes
        while self._state_used > limit:
            _, (old, _) = self._states_kept.popitem(last=False)
            for value in _tensors(old):
                self._holders[id(value)] -= 1
                if not self._holders[id(value)]:
                    del self._holders[id(value)]
                    self._state_used -= value.nbytes

    def _key(self, batch: Hashable, cut: int) -> tuple[Hashable, ...]:
        """The batch, the cut and all choices before the cut."""
        return (batch, cut, *(self._choice(site) for start, site in self._sites if start < cut))

    def _choice(self, site: tuple[str, int]) -> Hashable:
        kind, index = site
        chosen = {"format": self._variant.formats, "prune": self._variant.removed, "policy": self._variant.policies}
        return chosen[kind][index]

    def _needed(self) -> list[fx.Node]:
        wanted = ancestors([self.program.outputs()["logits"]])
        return [node for node in self.program.graph.nodes if node in wanted]

    def _find_sites(self) -> list[tuple[int, tuple[str, int]]]:
        """Index of the first node that depends on each choice, and the choice, in graph order."""
        found: dict[tuple[str, int], int] = {}
        resolve = self.program.weights.resolve
        for index, node in enumerate(self._nodes):
            names = {resolve(str(source.target)) for source in node.all_input_nodes if source.op == "get_attr"}
            sites = [("format", self._part_of[name]) for name in names if name in self._part_of]
            sites += [("prune", number) for number, own in enumerate(self._prunable) if names & own]
            if node in self._numbers:
                sites.append(("policy", self._numbers[node]))
            for site in sites:
                found.setdefault(site, index)
        return sorted((index, site) for site, index in found.items())

    def _across(self, cut: int) -> tuple[fx.Node, ...]:
        """Nodes before a cut whose values are used after it."""
        before = set(self._nodes[:cut])
        used = {source for node in self._nodes[cut:] for source in node.all_input_nodes}
        logits = self.program.outputs()["logits"]
        return tuple(node for node in self._nodes[:cut] if node in before and (node in used or node is logits))

    def _set(self, variant: Variant) -> None:
        self._variant, self._weights = variant, self._weights_of(variant)

    def weights_of(self, variant: Variant) -> dict[str, LazyTensor]:
        """The weights of a variant that differ from the pretrained model."""
        return {name: own.tensor for name, own in self._weights_of(variant).items()}

    def _weights_of(self, variant: Variant) -> dict[str, _Weight]:
        found: dict[str, _Weight] = {}
        for part, text in zip(self._parts, variant.formats, strict=True):
            if text != FLOAT:
                found |= {name: _Weight(f"{name} {text}", self._in_format(name, text)) for name in part.names}
        for number, removed in enumerate(variant.removed):
            for name, rows in self._rows_of(number, removed).items():
                own = found.get(name, _Weight(name, self.program.weights[name]))
                key = f"{own.key} without {removed}"
                found[name] = _Weight(key, SelectedRows(own.tensor, rows.indices))
        return found

    def _in_format(self, name: str, text: str) -> LazyTensor:
        source, fmt = self.program.weights[name], parse_format(text)
        if isinstance(fmt, IntegerFormat):
            return quantized(name, source, fmt, self._codes.get((name, text)))
        if isinstance(fmt, PaletteFormat):
            return palettized(name, source, fmt)
        assert isinstance(fmt, FloatFormat)
        return Float16(source) if fmt.kind is FloatKind.FP16 else source

    def _rows_of(self, number: int, removed: tuple[int, ...]) -> dict[str, SelectedRows]:
        """The weights that lose rows when experts of a layer are removed, with their remaining rows."""
        if not removed:
            return {}
        if (number, removed) not in self._pruned:
            layers = len(self.program.layers)
            every = tuple(removed if layer == number else () for layer in range(layers))
            result = PruneExperts(every).run(self.program)
            self._pruned[number, removed] = {
                name: tensor
                for name in map(self.program.weights.resolve, self.program.weight_names())
                if isinstance(tensor := result.program.weights[name], SelectedRows)
                and tensor is not self.program.weights[name]
            }
        return self._pruned[number, removed]

    def _weight(self, node: fx.Node, row: int | None = None) -> Tensor:
        name = self.program.weights.resolve(str(node.target))
        own = self._weights.get(name)
        if own is None:
            return super()._weight(node, row)
        return self._reader.read(own.key, own.tensor, node.meta["val"].dtype, row)

    def _experts(
        self, node: fx.Node, values: dict[fx.Node, Any], hidden: Tensor, indices: Tensor, weights: Tensor
    ) -> Tensor:
        number = self._numbers[node]
        policy, routed = self._variant.policies[number], weights
        if policy is not None:
            weights = select(policy, 0, hidden, indices, weights)
        live = weights != 0
        experts = self.program.layers[number].num_experts - len(self._variant.removed[number])
        tokens = torch.bincount(indices[live].long(), minlength=experts)
        self._used[number] = _Used(float(live.sum()) / weights.numel(), tokens)
        found = super()._experts(node, values, hidden, indices, weights)
        own = None if policy is None or self._compensations is None else self._compensations.of(number, policy)
        if own is None:
            return found
        dropped = torch.where(live, 0.0, routed).clamp(min=0.0)
        return found + own.without(self._variant.removed[number]).of(hidden, indices, dropped)


def _tensors(values: Mapping[fx.Node, Any]) -> list[Tensor]:
    return [value for value in values.values() if isinstance(value, Tensor)]
