"""A variant of a model: its policies, pruned experts and formats, and the recipe sections that describe them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moec.compiler.ir.program import Program
from moec.passes.routing.policies.base import Policy
from moec.passes.routing.policies.per_layer import PerLayer
from moec.passes.routing.policies.table import parameters_of, policy
from moec.quantize.formats import IntegerFormat, parse_format
from moec.quantize.methods.rounding import Method
from moec.quantize.plan import QuantizationPlan
from moec.quantize.planning.sensitivity import Part, plan_of

FLOAT = "none"
"""Text form of the format of a part that is not quantized."""


@dataclass(frozen=True)
class Variant:
    """The differences from the pretrained model.

    Attributes:
        policies: Routing policy of each MoE layer; None: all slots are kept.
        removed: Experts that are pruned from each MoE layer.
        formats: Text form of the format of each part, in the order of `parts_of`.
    """

    policies: tuple[Policy | None, ...]
    removed: tuple[tuple[int, ...], ...]
    formats: tuple[str, ...]

    @classmethod
    def unchanged(cls, program: Program, parts: Sequence[Part]) -> Variant:
        """The pretrained model itself."""
        layers = len(program.layers)
        return cls((None,) * layers, ((),) * layers, (FLOAT,) * len(parts))

    @classmethod
    def of(cls, sections: Mapping[str, Any], program: Program, parts: Sequence[Part]) -> Variant:
        """The inverse of `sections`.

        Raises:
            UsageError: A policy or a format is invalid.
        """
        found = cls.unchanged(program, parts)
        routing, quantize = sections.get("routing"), sections.get("quantize")
        if routing and routing.get("removed"):
            found = replace(found, removed=tuple(tuple(layer) for layer in routing["removed"]))
        if routing and routing.get("parameters"):
            chosen = policy(routing["policy"], **routing["parameters"])
            assert isinstance(chosen, PerLayer)
            found = replace(found, policies=chosen.layers)
        if quantize:
            plan = QuantizationPlan.from_dict(quantize["format"])
            found = replace(found, formats=tuple(_format_of(plan, part) for part in parts))
        return found

    def sections(self, parts: Sequence[Part]) -> dict[str, Any]:
        """The recipe sections `routing` and `quantize`; a section that would change nothing is left out."""
        routing: dict[str, Any] = {}
        if any(self.policies):
            parameters = json.loads(json.dumps(parameters_of(PerLayer(layers=self.policies))))
            routing |= {"policy": PerLayer.name, "parameters": parameters}
        if any(self.removed):
            routing |= {"removed": [list(layer) for layer in self.removed]}
        chosen = {part: parse_format(text) for part, text in zip(parts, self.formats, strict=True) if text != FLOAT}
        if not chosen:
            return {"routing": routing} if routing else {}
        fine = any(isinstance(fmt, IntegerFormat) and fmt.bits == 4 for fmt in chosen.values())
        rounding = Method.GPTQ if fine else Method.RTN
        quantize = {"format": plan_of(chosen).to_dict(), "rounding": rounding.value}
        return {**({"routing": routing} if routing else {}), "quantize": quantize}


def _format_of(plan: QuantizationPlan, part: Part) -> str:
    return str(plan.format_for(part.classes[0], layer=None if part.layer < 0 else part.layer))
