#!/usr/bin/env bash
# transformers' OpenVINO exporter keeps the caches inside of the model only if the input is called `cache`.
#
# OpenVINOConfig.stateful (on by default) folds caches that go in and come out into states of the OpenVINO model, which
# adds the input beam_idx. Pairs of inputs and outputs are found by name. Models of transformers 5.24 return the field
# `cache`, and still take their cache as `past_key_values` or as `cache`. With `past_key_values` in the sample inputs,
# as in most code that is published, the names differ, and the export is stateless without a warning: a runtime that
# expects states, such as OpenVINO GenAI, finds four inputs that it does not know and no states. With `cache` the same call is stateful.
#
# Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0'
"$folder/venv/bin/pip" install --quiet 'transformers==5.24.0' 'openvino==2026.4.1' 'numpy>=2'
"$folder/venv/bin/python" - "$folder" 2>/dev/null <<'PY'
import sys

import openvino
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config
from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
model = AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=64, num_hidden_layers=2, **sizes)).eval()


@torch.no_grad()
def exported(name):
    """The states and inputs of an export whose cache is called `name`."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.arange(3, 10)[None], past_key_values=cache, use_cache=True)
    inputs = {
        "input_ids": torch.arange(3, 8)[None],
        "attention_mask": torch.ones(1, 12, dtype=torch.long),
        "position_ids": torch.arange(7, 12)[None],
        name: cache,
    }
    out = f"{sys.argv[1]}/{name}"
    OpenVINOExporter().export(model, inputs, config=OpenVINOConfig(dynamic=True, stateful=True)).save_pretrained(out)
    found = openvino.Core().read_model(f"{out}/openvino_model.xml")
    return len(found.get_variables()), [port.get_any_name() for port in found.inputs]


print("transformers", transformers.__version__, "openvino", openvino.__version__)
results = {name: exported(name) for name in ("past_key_values", "cache")}
for name, (states, inputs) in results.items():
    print(f"{name}: {states} states, inputs: {', '.join(inputs)}")
expected = results["past_key_values"][0] == 0 and results["cache"][0] == 4 and "beam_idx" in results["cache"][1]
sys.exit(0 if expected else 1)
PY
