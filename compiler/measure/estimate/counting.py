"""Counts the bytes that one decode step of a Program reads, and its FLOPs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from moec.compiler.ir.program import Program
from moec.compiler.measure.summary import model_summary
from moec.quantize.formats import FP16
from moec.quantize.lazy import Coded, Float16
from moec.quantize.plan import TensorClass
from moec.quantize.planning.sensitivity import size_of
from moec.quantize.tensor_classes import weight_roles

EXPERTS = (TensorClass.EXPERTS_GATE_UP.value, TensorClass.EXPERTS_DOWN.value)


@dataclass(frozen=True)
class Counts:
    """Counts of a final Program.

    Attributes:
        weight_bytes: Tensor class -> bytes of its weights.
        read_bytes: Tensor class -> bytes of its weights that one token reads.
        flops: FLOPs of the products with weights, per token.
        state_bytes: Bytes of the KV cache per token of context.
        state_flops: FLOPs of attention per token of context.
        parameters: Number of all parameters.
        active: Number of the parameters that one token uses.
        nodes: Number of operations of one step.
        fixed_state_bytes: Bytes of the states of convolutions and scans, which do not grow with the context.
    """

    weight_bytes: Mapping[str, int]
    read_bytes: Mapping[str, float]
    flops: float
    state_bytes: int
    state_flops: float
    parameters: int
    active: int
    nodes: int
    fixed_state_bytes: int = 0

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(self.weight_bytes.values())

    def expert_bytes(self) -> float:
        """Bytes of expert weights that one token reads."""
        return sum(self.read_bytes.get(name, 0.0) for name in EXPERTS)

    def dense_bytes(self) -> float:
        """Bytes of all other weights that one token reads."""
        return sum(self.read_bytes.values()) - self.expert_bytes()

    def states_at(self, context: int) -> int:
        """Bytes of all states after `context` tokens."""
        return self.fixed_state_bytes + self.state_bytes * context

    def state_flops_at(self, context: int) -> float:
        """FLOPs of attention and scans for one token after `context` others.

        A scan takes 7 FLOPs for each float32 value of its state: decay, comparison with the key, update and output.
        """
        return self.state_flops * context + 7 / 4 * self.fixed_state_bytes


def formats(program: Program) -> dict[str, str]:
    """Tensor class -> format of most of its weights, for the classes that are quantized or stored as fp16."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for name, role in weight_roles(program).items():
        tensor = program.weights[name]
        if isinstance(tensor, Coded | Float16):
            chosen = tensor.format if isinstance(tensor, Coded) else FP16
            found[role.tensor_class.value][str(chosen)] += math.prod(tensor.shape)
    return {tensor_class: each.most_common(1)[0][0] for tensor_class, each in sorted(found.items())}


def count(program: Program, kept_share: float = 1.0) -> Counts:
    """Count a final Program.

    Args:
        program: The Program with its quantized weights, whose values are not read.
        kept_share: Share of the pretrained top-k that a token uses and the target executes.
    """
    roles, weights = weight_roles(program), program.weights
    shares = {
        weights.resolve(name): layer.top_k / layer.num_experts * kept_share
        for layer in program.layers
        for name in (layer.gate_up_proj, layer.down_proj)
    }
    total: dict[str, int] = defaultdict(int)
    read: dict[str, float] = defaultdict(float)
    flops = 0.0
    for name in dict.fromkeys(map(weights.resolve, program.weight_names())):
        tensor = weights[name]
        chosen = tensor.format if isinstance(tensor, Coded) else FP16 if isinstance(tensor, Float16) else None
        tensor_class = roles[name].tensor_class if name in roles else TensorClass.OTHER
        size = size_of(program, [name], chosen)
        share = 1 / tensor.shape[0] if tensor_class is TensorClass.EMBEDDING else shares.get(name, 1.0)
        total[tensor_class.value] += size
        read[tensor_class.value] += size * share
        if name in roles and tensor_class is not TensorClass.EMBEDDING:
            flops += 2 * math.prod(tensor.shape) * share
    found = model_summary(program)
    state_bytes = int(found["states"]["bytes_per_token"])
    return Counts(
        dict(total),
        dict(read),
        flops,
        state_bytes,
        2.0 * sum(math.prod(size for size in own.input.shape if isinstance(size, int)) for own in program.caches),
        int(found["parameters"]["total"]),
        int(found["parameters"]["active"]),
        sum(node.op == "call_function" for node in program.graph.nodes),
        int(found["states"]["bytes_fixed"]),
    )
