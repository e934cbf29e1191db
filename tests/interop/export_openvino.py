"""Export a checkpoint with the OpenVINO exporter of transformers, with caches that the model keeps itself.

python export_openvino.py CHECKPOINT OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import openvino
import torch
from openvino._offline_transformations import apply_make_stateful_transformation
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter


def main(checkpoint: str, output: str) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.arange(3, 10)[None], past_key_values=cache, use_cache=True)
        inputs = {
            "input_ids": torch.arange(3, 8)[None],
            "attention_mask": torch.ones(1, 12, dtype=torch.long),
            "position_ids": torch.arange(7, 12)[None],
            "past_key_values": cache,
        }
        exported = OpenVINOExporter().export(model, inputs, config=OpenVINOConfig(dynamic=True))
    folder = Path(output)
    exported.save_pretrained(folder / "stateless")
    found = openvino.Core().read_model(folder / "stateless" / "openvino_model.xml")
    caches = {port.get_any_name(): port.partial_shape for port in found.inputs[3:]}
    # A state without tokens has no batch of its own, from which OpenVINO could take the size.
    found.reshape({name: openvino.PartialShape([1, shape[1], -1, shape[3]]) for name, shape in caches.items()})
    inside = {port.get_any_name(): port.get_any_name().replace("past_key_values", "cache") for port in found.inputs[3:]}
    apply_make_stateful_transformation(found, inside)
    openvino.save_model(found, folder / "openvino_model.xml", compress_to_fp16=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
