#!/usr/bin/env bash
# ZAYA in transformers: from_pretrained replaces the last balancing bias of every router by -1, whatever the file holds.
#
# A router of ZAYA has one more output than experts, to skip the layer, and a balancing bias for each, which is stored.
# save_pretrained writes all of them, but after from_pretrained the last one is -1 in every layer, without a warning, and
# the loading report names neither missing nor unexpected keys. A fine-tuned bias is lost, and with it how often tokens
# skip a layer. A tool that reads the file directly routes other tokens than the loaded model.
#
# Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0'
"$folder/venv/bin/pip" install --quiet 'transformers==5.24.0' 'numpy>=2'
"$folder/venv/bin/python" - "$folder/model" 2>/dev/null <<'PY'
import sys

import torch
import transformers
from transformers import ZayaConfig, ZayaForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
config = ZayaConfig(
    vocab_size=128,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
    router_hidden_size=16,
)
model = ZayaForCausalLM(config)
names = [name for name in model.state_dict() if name.endswith("balancing_biases")]
with torch.no_grad():
    for name in names:
        model.state_dict()[name].copy_(torch.tensor([0.5, 0.25, 0.0, -0.25, 0.75]))
model.save_pretrained(sys.argv[1])
loaded, report = ZayaForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
reset = []
for name in names:
    stored, read = (each.state_dict()[name].tolist() for each in (model, loaded))
    print(f"{name}: stored {stored}, loaded {read}")
    reset.append(read == [*stored[:-1], -1.0])
silent = not report["missing_keys"] and not report["unexpected_keys"]
print("missing and unexpected keys in the report:", "none" if silent else "some")
expected = len(reset) == 3 and all(reset) and silent
print("as described" if expected else "changed")
sys.exit(0 if expected else 1)
PY
