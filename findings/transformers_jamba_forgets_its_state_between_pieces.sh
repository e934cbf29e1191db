#!/usr/bin/env bash
# Jamba in transformers: a prompt fed in pieces of several tokens gives other logits than the prompt in one piece.
#
# With a cache, a step of one token goes on from the recurrent state, but a step of several tokens does not: the scan of
# Mamba layers has no argument for an initial state, so each piece starts from zeros and then overwrites the state. The
# convolution's state is handed over, and no error or warning is given. So chunked prefill and continued conversations
# are wrong, and only one token at a time is right. Granite 4 hybrids (Mamba-2) do the same steps correctly.
# It matters to exporters that take the cached forward pass as the reference.
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
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, JambaConfig, JambaForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
JAMBA = JambaConfig(
    **SIZES,
    attn_layer_period=4,
    attn_layer_offset=2,
    expert_layer_period=2,
    expert_layer_offset=1,
    num_experts=4,
    num_experts_per_tok=2,
    mamba_d_state=8,
    mamba_dt_rank=8,
)
GRANITE = GraniteMoeHybridConfig(
    **SIZES,
    layer_types=["mamba", "mamba", "attention", "mamba"],
    shared_intermediate_size=32,
    num_local_experts=4,
    num_experts_per_tok=2,
    mamba_n_heads=8,
    mamba_d_head=16,
    mamba_d_state=8,
    mamba_n_groups=1,
    mamba_chunk_size=8,
)


@torch.no_grad()
def error(model, ids, pieces):
    """Largest difference from one forward pass, relative to the largest logit, and the first position that is off."""
    whole, cache, steps, start = model(input_ids=ids).logits, None, [], 0
    for length in pieces:
        out = model(input_ids=ids[:, start : start + length], cache=cache, use_cache=True)
        cache = out.cache if "cache" in out else out.past_key_values
        steps.append(out.logits)
        start += length
    error = (torch.cat(steps, 1) - whole).abs().amax(-1)[0] / whole.abs().max()
    wrong = (error > 1e-3).nonzero().flatten().tolist()
    return float(error.max()), wrong[:1]


found = {}
for name, kind, config in (("jamba", JambaForCausalLM, JAMBA), ("granitemoehybrid", GraniteMoeHybridForCausalLM, GRANITE)):
    torch.manual_seed(0)
    model = kind(config).eval()
    ids = torch.randint(3, 128, (1, 24))
    for pieces in ([12] + [1] * 12, [12, 12]):
        size, first = found[name, len(pieces)] = error(model, ids, pieces)
        text = f"24 tokens in {len(pieces)} pieces"
        print(f"{name:16} {text}: error {size:.0e}" + (f" from position {first[0]}" if first else ""))
expected = found["jamba", 2][1] == [12] and not any(found[key][1] for key in found if key != ("jamba", 2))
print("as described" if expected else "changed")
sys.exit(0 if expected else 1)
PY
