"""Costs of a variant that are computed, not measured: bytes, FLOPs and the time that bandwidth and FLOP/s allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moec.compiler.ir.program import Program
from moec.compiler.measure.estimate.counting import count
from moec.compiler.measure.estimate.devices import Device
from moec.compiler.search.objectives import BYTES, DECODE, EXPERT_FLOPS, MEMORY, PREFILL, SIZE
from moec.compiler.search.variant import FLOAT, Variant
from moec.passes.routing import compensation
from moec.quantize.formats import parse_format
from moec.quantize.plan import TensorClass
from moec.quantize.planning.sensitivity import Part, size_of

CONTEXT = 128
"""Past tokens of the decode step, as in `moec estimate`."""
PROMPT = 512
"""Tokens of the prefill."""


@dataclass(frozen=True)
class Speed:
    """Peak speed of a device.

    Attributes:
        bandwidth: Bytes per second.
        flops: FLOP per second; None if unknown.
    """

    bandwidth: float
    flops: float | None = None

    @classmethod
    def of(cls, device: Device) -> Speed:
        """Take the speed of a device profile."""
        return cls(device.bandwidth, device.flops)


class Costs:
    """Computes the costs of variants of a Program.

    Args:
        program: The pretrained model, in float32.
        parts: The parts whose formats are chosen.
        pruned: MoE layer -> the weights that lose rows when its experts are pruned.
        itemsize: Bytes per element of weights that are not quantized, in the artifact.
        skips: Whether the target skips the experts of dropped slots.
        speed: Speed of the device.
    """

    def __init__(
        self,
        program: Program,
        parts: Sequence[Part],
        pruned: Callable[[int], frozenset[str]],
        *,
        itemsize: int,
        skips: bool,
        speed: Speed,
    ) -> None:
        self._program, self._parts, self._skips, self._speed = program, tuple(parts), skips, speed
        self._itemsize = itemsize
        self._known: dict[tuple[int, str], int] = {}
        self._counts = count(program)
        resolve = program.weights.resolve
        names = dict.fromkeys(map(resolve, program.weight_names()))
        quantized = {name for part in parts for name in part.names}
        pruned_rest = [
            {name for name in pruned(number) if name not in quantized} for number in range(len(program.layers))
        ]
        self._rest = self._float(
            [name for name in names if name not in quantized and name not in set().union(*pruned_rest)]
        )
        self._routers = [self._float(sorted(own)) for own in pruned_rest]
        expert = {resolve(name): row.index for row in program.layers for name in (row.gate_up_proj, row.down_proj)}
        self._layer_of = [expert.get(part.names[0], -1) for part in parts]
        sizes = [self._expert_weights(number) for number in range(len(program.layers))]
        slots = np.array([row.top_k * size for row, size in zip(program.layers, sizes, strict=True)], dtype=float)
        self._slots = max(float(slots.sum()), 1.0)
        self._slot_share = slots / self._slots
        self._expert_flops = 2.0 * float(slots.sum())

    def of(self, variant: Variant, kept: Sequence[float] | np.ndarray) -> dict[str, float]:
        """All computed objectives of a variant, by name.

        Args:
            variant: The variant.
            kept: Share of the pretrained slots that the policy of each MoE layer keeps.
        """
        added, stored, rows = self._compensations(variant)
        executed = float(np.dot(self._slot_share, kept))
        work = (executed if self._skips else 1.0) + added / self._slots
        size, read = float(self._rest + stored), float(self._rest + rows)
        for number, row in enumerate(self._program.layers):
            share = 1 - len(variant.removed[number]) / row.num_experts
            size += self._routers[number] * share
            read += self._routers[number] * share
        for index, (part, text) in enumerate(zip(self._parts, variant.formats, strict=True)):
            whole, layer = self.part_bytes(index, text), self._layer_of[index]
            if layer >= 0:
                row = self._program.layers[layer]
                size += whole * (1 - len(variant.removed[layer]) / row.num_experts)
                read += whole * row.top_k / row.num_experts * (kept[layer] if self._skips else 1.0)
            else:
                size += whole
                read += whole / self._rows(part) if part.classes == (TensorClass.EMBEDDING,) else whole
        states = self._counts.states_at(CONTEXT) * self._itemsize // 4
        flops = self._counts.flops - self._expert_flops * (1 - work)
        return {
            EXPERT_FLOPS.name: work,
            SIZE.name: size,
            MEMORY.name: size + states,
            BYTES.name: read + states,
            DECODE.name: self._seconds(read + states, flops + self._counts.state_flops_at(CONTEXT)),
            PREFILL.name: self._seconds(size, PROMPT * (flops + self._counts.state_flops_at(PROMPT // 2))),
        }

    def compensation_share(self, layer: int, rank: int) -> float:
        """Work of what stands in for dropped experts in an MoE layer, relative to all slots of the layer."""
        row = self._program.layers[layer]
        slots = row.top_k * self._expert_weights(layer)
        return compensation.work(row.top_k, row.hidden_size, rank) / slots if rank else 0.0

    def _compensations(self, variant: Variant) -> tuple[int, int, int]:
        """Multiplications per token, bytes, and bytes read per token of what stands in for dropped experts."""
        found = np.zeros(3, dtype=np.int64)
        for row, own, removed in zip(self._program.layers, variant.policies, variant.removed, strict=True):
            if own is not None and own.compensation:
                experts, hidden = row.num_experts - len(removed), row.hidden_size
                stored = compensation.size(experts, hidden, own.compensation) * self._itemsize
                read = compensation.size(row.top_k, hidden, own.compensation) * self._itemsize
                found += [compensation.work(row.top_k, hidden, own.compensation), stored, read]
        return int(found[0]), int(found[1]), int(found[2])

    def _seconds(self, read: float, flops: float) -> float:
        by_flops = 0.0 if self._speed.flops is None else flops / self._speed.flops
        return max(read / self._speed.bandwidth, by_flops)

    def part_bytes(self, part: int, text: str) -> int:
        """Bytes of a part in a format given by its text form."""
        if (part, text) not in self._known:
            self._known[part, text] = self._bytes(part, text)
        return self._known[part, text]

    def _bytes(self, part: int, text: str) -> int:
        names = self._parts[part].names
        return self._float(names) if text == FLOAT else size_of(self._program, names, parse_format(text))

    def _float(self, names: Sequence[str]) -> int:
        return size_of(self._program, names, None) * self._itemsize // self._program.dtype.itemsize

    def _rows(self, part: Part) -> int:
        return int(self._program.weights[part.names[0]].shape[0])

    def _expert_weights(self, number: int) -> int:
        row, weights = self._program.layers[number], self._program.weights
        stacks = (weights[weights.resolve(name)].shape for name in (row.gate_up_proj, row.down_proj))
        return sum(math.prod(shape[1:]) for shape in stacks)


Predicted = Mapping[str, float]
"""Name of an objective -> its value."""
