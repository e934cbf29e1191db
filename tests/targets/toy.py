"""A complete target in one file, as an example: it stores the calls of core ops, and its runner executes them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from moec.compiler.common.progress import Progress
from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.program import Program, module_of
from moec.compiler.ir.stages import CORE
from moec.targets.base import Capabilities, Lowered, Phase, Target, TargetOptions
from moec.targets.runners import Runner
from moec.targets.stored_weights import StoredWeight

FILE = "model.pt"
OPS = {str(op): op for op in CORE}
"""The lowering table; in this target, core ops have torch's names."""


class ToyTarget(Target):
    name: ClassVar[str] = "toy"

    def capabilities(self, options: TargetOptions, phase: Phase) -> Capabilities:  # noqa: ARG002
        return Capabilities(skips_experts=True)

    def lint(self, program: Program, options: TargetOptions) -> tuple[Rejection, ...]:  # noqa: ARG002
        calls = [node for node in program.graph.nodes if node.op == "call_function" and str(node.target) not in OPS]
        return tuple(Rejection(self.name, module_of(node), f"no lowering for {node.target}") for node in calls)

    def lower(self, program: Program, options: TargetOptions, directory: Path, progress: Progress) -> Lowered:  # noqa: ARG002
        def plain(argument: Any) -> Any:
            return fx.map_arg(argument, lambda node: ("value", node.name))

        nodes = program.graph.nodes
        content = {
            "calls": [
                (node.name, str(node.target), plain(list(node.args)), plain(dict(node.kwargs)))
                for node in nodes
                if node.op == "call_function"
            ],
            "weights": {
                node.name: program.weights[str(node.target)].read().to(node.meta["val"].dtype)
                for node in nodes
                if node.op == "get_attr"
            },
            "names": {node.name: str(node.target) for node in nodes if node.op == "get_attr"},
            "inputs": [node.name for node in nodes if node.op == "placeholder"],
            "states": {
                f"past_{state.layer}_{state.kind}": (state.output.name, [*state.input.shape], state.input.dtype)
                for state in program.states
            },
            "outputs": {name: node.name for name, node in program.outputs().items()},
        }
        torch.save(content, directory / FILE)
        return Lowered((FILE,), {"inputs": content["inputs"]})

    def open(self, directory: Path, *, threads: int = 0) -> Runner:  # noqa: ARG002
        return ToyRunner(torch.load(directory / FILE, weights_only=False))

    def stored_weights(self, directory: Path) -> Mapping[str, StoredWeight]:
        content = torch.load(directory / FILE, weights_only=False)

        def stored(value: Tensor) -> StoredWeight:
            return StoredWeight(None, lambda start, stop: value[start:stop].float().numpy())

        return {content["names"][name]: stored(value) for name, value in content["weights"].items() if value.ndim > 1}


class ToyRunner:
    """Executes the stored calls in order with torch."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.reset()

    def reset(self) -> None:
        self._states: dict[str, Tensor] = {}
        self._past = 0

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        self.reset()
        return self.decode(input_ids, attention_mask)

    @torch.no_grad()
    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        batch, length = input_ids.shape
        total = self._past + length
        mask = torch.ones(batch, total, dtype=torch.long) if attention_mask is None else torch.tensor(attention_mask)
        values: dict[str, Any] = {
            **self.content["weights"],
            "input_ids": torch.tensor(input_ids),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -length:],
            "cache_position": torch.arange(self._past, total),
            **(self._states or self._empty(batch)),
        }
        for name, op, args, kwargs in self.content["calls"]:
            values[name] = _call(OPS[op], _filled(args, values), _filled(kwargs, values))
        outputs = self.content["outputs"]
        self._states = {past: values[outputs[out]] for past, (out, _, _) in self.content["states"].items()}
        self._past = total
        return np.asarray(values[outputs["logits"]].float().numpy())

    def _empty(self, batch: int) -> dict[str, Tensor]:
        sizes = {"batch": batch, "past_sequence": 0}
        return {
            past: torch.zeros([sizes.get(size, size) for size in shape], dtype=dtype)
            for past, (_, shape, dtype) in self.content["states"].items()
        }

    def facts(self) -> Mapping[str, Any]:
        return {"runtime": "toy"}


def _call(op: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return args[0][args[1]] if op is operator.getitem else op(*args, **kwargs)


def _filled(argument: Any, values: Mapping[str, Any]) -> Any:
    """`argument` with each ("value", name) replaced by the value of that name."""
    if isinstance(argument, tuple) and len(argument) == 2 and argument[0] == "value":
        return values[argument[1]]
    if isinstance(argument, list | tuple):
        return [_filled(item, values) for item in argument]
    if isinstance(argument, dict):
        return {key: _filled(item, values) for key, item in argument.items()}
    return argument
