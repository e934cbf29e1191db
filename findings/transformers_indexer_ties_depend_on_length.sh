#!/usr/bin/env bash
# Sparse attention of DeepSeek-V3.2 in transformers: with few indexer heads, cached decoding differs from one forward pass.
#
# The indexer sums ReLU scores of its heads. A token for which every head is negative scores exactly 0, and so do others:
# with few heads, equal scores are common at the border of the `index_topk` largest. Which of them `torch.topk` takes
# depends on the length of the row, and that is the number of new and cached tokens, masked ones included. A prompt in one
# pass and the same prompt token by token then attend to other tokens. With 16 heads, as small releases have, no such tie
# occurs here. It matters for test models with reduced sizes, and for exporters that compare steps with one pass.
#
# Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0'
"$folder/venv/bin/pip" install --quiet 'transformers==5.24.0' 'numpy>=2'
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import sys

import torch
import transformers
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
LENGTH, TOP_K = 64, 8


@torch.no_grad()
def differing(heads):
    """Positions at which decoding token by token is off by more than 1e-4 of the largest logit."""
    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=24,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        index_n_heads=heads,
        index_head_dim=16,
        index_topk=TOP_K,
        max_position_embeddings=256,
        initializer_range=0.5,
    )
    model = DeepseekV32ForCausalLM._from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(0, 128, (1, LENGTH))
    whole, cache, steps = model(input_ids=ids).logits, None, []
    for token in range(LENGTH):
        out = model(input_ids=ids[:, token : token + 1], cache=cache, use_cache=True)
        cache = out.cache if "cache" in out else out.past_key_values
        steps.append(out.logits)
    error = (whole - torch.cat(steps, 1)).abs().amax(-1)[0] / whole.abs().max()
    print(f"{heads:2} heads: {int((error > 1e-4).sum())} of {LENGTH} positions differ, by up to {float(error.max()):.0e}")
    return (error > 1e-4).nonzero().flatten().tolist()


few, many = differing(1), differing(16)
expected = len(few) > LENGTH // 2 and min(few) == TOP_K and not many
print("as described" if expected else "changed")
sys.exit(0 if expected else 1)
PY
