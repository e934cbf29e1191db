#!/usr/bin/env bash
# MiniMax-01 in transformers: the decay rates of its linear attention depend on the dtype that the checkpoint was saved in.
#
# The decays follow from the number of heads and layers and are no weights, but they are persistent buffers: save_pretrained
# writes them, in bfloat16 with a bfloat16 model, and from_pretrained takes them from the file even with dtype=float32. So
# a float32 model that was loaded differs from one that was made from the same config. A decay is applied once for each
# token: an error of 2e-3 in a rate of 0.5 per token changes what is left after 100 tokens by a tenth. An exporter that
# recomputes the decays from the config disagrees with the loaded model, and is the one that is right.
#
# Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0'
"$folder/venv/bin/pip" install --quiet 'transformers==5.24.0' 'numpy>=2'
"$folder/venv/bin/python" - "$folder/model" 2>/dev/null <<'PY'
import math
import sys

import torch
import transformers
from transformers import MiniMaxConfig, MiniMaxForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
config = MiniMaxConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    block_size=16,
)


def rates(model):
    return model.get_buffer("model.layers.1.self_attn.slope_rate").double().flatten()


torch.manual_seed(0)
fresh = MiniMaxForCausalLM(config)
right = rates(fresh)
fresh.to(torch.bfloat16).save_pretrained(sys.argv[1])
loaded = rates(MiniMaxForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32))
for made, read in zip(right.tolist(), loaded.tolist()):
    left = math.exp(100 * (made - read)) - 1
    print(f"decay per token {made:.6f}, loaded {read:.6f}: after 100 tokens {left:+.2%} of the state")
worst = float(((loaded - right) / right).abs().max())
print(f"largest relative difference {worst:.1e}")
expected = 1e-3 < worst < 4e-3
print("as described" if expected else "changed")
sys.exit(0 if expected else 1)
PY
