#!/usr/bin/env bash
# transformers reports a cache length of 0 for MiniMax models whose first layer is lightning attention.
#
# `MiniMaxCache.get_seq_length()` asks layer 0, which has a state of fixed size and no keys, and returns 0. A step with a
# past but without `position_ids`, as in exporters and evaluation loops, then treats its token as the first one: rotary
# positions in the attention layers are silently wrong. `generate` passes positions itself. MiniMax-Text-01 begins with
# lightning attention; if the first layer is full attention, the length is right.
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
from transformers import MiniMaxConfig, MiniMaxForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
IDS = torch.arange(10)[None]


@torch.no_grad()
def last_logits(model, **positions):
    """The length of the cache after nine tokens, and the logits of the tenth, fed as a step of its own."""
    first = model(IDS[:, :9], use_cache=True)
    length = first.past_key_values.get_seq_length()
    mask = torch.ones(1, 10, dtype=torch.long)
    second = model(IDS[:, 9:], past_key_values=first.past_key_values, attention_mask=mask, **positions)
    return length, second.logits[:, -1]


def check(kinds):
    torch.manual_seed(0)
    config = MiniMaxConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=2,
        layer_types=kinds,
        initializer_range=0.5,
    )
    model = MiniMaxForCausalLM(config).eval()
    with torch.no_grad():
        whole = model(IDS).logits[:, -1]
    length, step = last_logits(model)
    _, told = last_logits(model, position_ids=torch.tensor([[9]]))
    errors = [float((found - whole).abs().max() / whole.abs().max()) for found in (step, told)]
    print(f"{' then '.join(kinds)}: {length} tokens in the cache after 9; the tenth token is off by {errors[0]:.0e},")
    print(f"  and by {errors[1]:.0e} with position_ids given")
    return length, *errors


lightning_first = check(["linear_attention", "full_attention"])
attention_first = check(["full_attention", "linear_attention"])
right = attention_first[0] == 9 and max(attention_first[1:]) < 1e-4
wrong = lightning_first[0] == 0 and lightning_first[1] > 1e-2 and lightning_first[2] < 1e-4
sys.exit(0 if right and wrong else 1)
PY
