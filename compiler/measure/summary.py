"""A model in figures, for moec.json, `moec inspect` and reports."""

from __future__ import annotations

import math
from typing import Any

from moec.compiler.common.model_config import context_length, layer_count
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.program import EXPERTS, MoeLayer, Program, StateSpec
from moec.compiler.ir.weights import Constant


def model_summary(program: Program) -> dict[str, Any]:
    """Layers, parameters and states of a Program, as a deterministic mapping for JSON.

    `parameters.active` counts the parameters that one token uses: all but those of the experts to which it is not
    routed. Embeddings are counted as a whole, and tied weights once.
    """
    total, active = _parameters(program)
    return {
        "model_type": program.config.get("model_type", ""),
        "architectures": list(program.config.get("architectures") or []),
        "layers": layer_count(program.config),
        "vocab_size": program.vocab_size,
        "max_position_embeddings": context_length(program.config),
        "parameters": {"total": total, "active": active},
        "moe_layers": [_layer(layer) for layer in program.layers],
        "states": _states(program),
        "notes": list(program.provenance.notes),
        "left_out": dict(program.provenance.left_out),
    }


def _parameters(program: Program) -> tuple[int, int]:
    weights = program.weights
    names = dict.fromkeys(weights.resolve(name) for name in program.weight_names())
    sizes = {name: math.prod(weights[name].shape) for name in names if not isinstance(weights[name], Constant)}
    total = sum(sizes.values())
    idle = 0
    for node, layer in zip(program.nodes(EXPERTS), program.layers, strict=True):
        held = sum(math.prod(stack.meta["val"].shape) for stack in Experts.of(node).stacks.values())
        idle += held // layer.num_experts * (layer.num_experts - layer.top_k)
    return total, total - idle


def _layer(layer: MoeLayer) -> dict[str, Any]:
    return {
        "module": layer.module,
        "num_experts": layer.num_experts,
        "top_k": layer.top_k,
        "hidden_size": layer.hidden_size,
        "intermediate_size": layer.intermediate_size,
    }


def _states(program: Program) -> dict[str, Any]:
    per_token = sum(map(_bytes, program.caches))
    return {
        "count": len(program.states),
        "layers": len({state.layer for state in program.states}),
        "kinds": sorted({state.kind for state in program.states}),
        "bytes_per_token": per_token,
        "cache_dtypes": sorted({str(state.input.dtype).removeprefix("torch.") for state in program.caches}),
        # Per sequence, independent of its length.
        "bytes_fixed": sum(map(_bytes, program.states)) - per_token,
    }


def _bytes(state: StateSpec) -> int:
    """Bytes of a state for one sequence, or per token for a KV cache."""
    return math.prod(size for size in state.input.shape if isinstance(size, int)) * state.input.dtype.itemsize
