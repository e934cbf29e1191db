#!/usr/bin/env bash
# transformers' chunked form of the gated delta rule loses float32 digits if the decay is strong.
#
# Qwen3-Next, Qwen3.5 and others process a prompt in chunks of 64 tokens (`torch_chunk_gated_delta_rule`) and single
# tokens by the recurrence (`torch_recurrent_gated_delta_rule`), both in float32. Compared with the recurrence in
# float64, the error of the chunked form is up to twenty times that of the recurrent form, and grows with the decay. A
# test that compares an export with transformers' prefill includes this error.
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
from transformers.models.qwen3_next import modeling_qwen3_next as modeling

print("transformers", transformers.__version__, "torch", torch.__version__)
HEADS, WIDTH, TOKENS = 4, 16, 130


def exact(query, key, value, decay, beta):
    """The recurrence, token by token in float64 (arXiv 2412.06464): [1, T, H, D]."""
    query, key, value, decay, beta = (item.double() for item in (query, key, value, decay, beta))
    state, outputs = torch.zeros(1, HEADS, WIDTH, WIDTH, dtype=torch.float64), []
    for t in range(TOKENS):
        state = state * decay[:, t, :, None, None].exp()
        change = (value[:, t] - torch.einsum("bhkv,bhk->bhv", state, key[:, t])) * beta[:, t, :, None]
        state = state + key[:, t, :, :, None] * change[:, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]) * WIDTH**-0.5)
    return torch.stack(outputs, 1)


def errors(strength):
    chunks = tokens = 0.0
    for seed in range(6):
        torch.manual_seed(seed)
        query, key = (torch.nn.functional.normalize(torch.randn(1, TOKENS, HEADS, WIDTH), dim=-1) for _ in range(2))
        value, beta = torch.randn(1, TOKENS, HEADS, WIDTH), torch.rand(1, TOKENS, HEADS)
        decay = -torch.rand(1, TOKENS, HEADS) * strength
        want = exact(query, key, value, decay, beta)
        settings = {"g": decay, "beta": beta, "initial_state": None, "output_final_state": True}
        for_prompts, _ = modeling.torch_chunk_gated_delta_rule(query, key, value, **settings)
        for_tokens, _ = modeling.torch_recurrent_gated_delta_rule(query, key, value, **settings)
        chunks = max(chunks, float((for_prompts - want).abs().max() / want.abs().max()))
        tokens = max(tokens, float((for_tokens - want).abs().max() / want.abs().max()))
    return chunks, tokens


found = {strength: errors(strength) for strength in (0.1, 1.0, 4.0)}
for strength, (chunks, tokens) in found.items():
    print(f"log decay down to -{strength}: chunks {chunks:.1e} of the largest output, token by token {tokens:.1e}")
sys.exit(0 if found[4.0][0] > 6 * found[4.0][1] and found[4.0][0] > 3 * found[0.1][0] else 1)
PY
