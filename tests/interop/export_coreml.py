"""Converts a checkpoint by coremltools from `torch.export`: `export_coreml.py CHECKPOINT OUT.mlpackage [palette]`.

The sequence has a fixed length of 64 tokens, and nothing is kept between calls. With `palette`, weights are rounded to
palettes of 16 values by coremltools.optimize.
"""

from __future__ import annotations

import sys
from typing import Any

import coremltools as ct
import coremltools.optimize.coreml as cto
import torch
from coremltools.converters.mil import Builder
from coremltools.converters.mil.frontend.torch.ops import _get_inputs
from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op
from transformers import AutoModelForCausalLM

LENGTH = 64


@register_torch_op
def alias(context: Any, node: Any) -> None:
    """coremltools 9.0 does not know the op, which the batched products of experts are exported with."""
    context.add(Builder.identity(x=_get_inputs(context, node, expected=1)[0], name=node.name))


class Logits(torch.nn.Module):
    """The model without a cache; a mask of four axes, since coremltools cannot convert how transformers makes one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits


def main(checkpoint: str, out: str, palette: str = "") -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    model.set_experts_implementation("batched_mm")
    given = (torch.zeros(1, LENGTH, dtype=torch.int32), torch.zeros(1, 1, LENGTH, LENGTH))
    exported = torch.export.export(Logits(model), given).run_decompositions({})
    converted = ct.convert(exported, minimum_deployment_target=ct.target.iOS18, compute_precision=ct.precision.FLOAT32)
    if palette:
        settings = cto.OpPalettizerConfig(nbits=4, mode="uniform", weight_threshold=512)
        converted = cto.palettize_weights(converted, cto.OptimizationConfig(global_config=settings))
    converted.save(out)


main(*sys.argv[1:])
