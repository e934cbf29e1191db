"""For comparison: export a checkpoint with the exporter of transformers, with dynamic axes for decode and prefill.

python benchmarks/export_with_transformers.py CHECKPOINT OUTPUT
"""

from __future__ import annotations

import sys
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter  # type: ignore[attr-defined]


def main(checkpoint: str, output: str) -> None:
    torch.set_num_threads(1)
    start = time.process_time()
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
        exported = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True))
    exported.save_pretrained(output)
    print(f"{time.process_time() - start:.1f} CPU s")


if __name__ == "__main__":
    main(*sys.argv[1:])
