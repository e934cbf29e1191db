#!/usr/bin/env bash
# transformers' dequantization of block-scaled fp8 weights derives the block size from the number of scales.
#
# A checkpoint with `weight_block_size: [128, 128]` has one scale for each block of 128 rows. The last block is shorter
# if 128 does not divide the number of rows (DeepSeek-V3's kv_a_proj_with_mqa has 576 rows and 5 scales).
# `Fp8Dequantize` instead divides the number of rows by the number of scales: it refuses 576 / 5, and takes 192 / 2 for
# blocks of 96 rows, so that rows 96 to 127 silently get the scale of the next block.
#
# Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0'
"$folder/venv/bin/pip" install --quiet 'transformers==5.24.0' 'numpy>=2'
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
import transformers
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

print("transformers", transformers.__version__, "torch", torch.__version__)
BLOCK = 128
operation = Fp8Dequantize(hf_quantizer=None)


def weight_and_scales(rows):
    """Ones in fp8, and scales 1, 2, 3 ... of the blocks of 128 rows."""
    blocks = -(-rows // BLOCK)
    scales = torch.arange(1, blocks + 1, dtype=torch.float32)[:, None]
    return torch.ones(rows, BLOCK).to(torch.float8_e4m3fn), scales


weight, scales = weight_and_scales(192)
found = operation._dequantize_one(weight, scales).float()
right = scales.repeat_interleave(BLOCK, 0)[:192].expand(192, BLOCK)
wrong_rows = (found != right).any(1).nonzero().flatten().tolist()
print(f"192 rows, 2 scales: {len(wrong_rows)} rows have the scale of another block: {wrong_rows[0]} to {wrong_rows[-1]}")

weight, scales = weight_and_scales(576)
try:
    operation._dequantize_one(weight, scales)
    refused = ""
except ValueError as error:
    refused = str(error)
print(f"576 rows, 5 scales: {refused or 'read'}")
sys.exit(0 if wrong_rows == list(range(96, 128)) and "not divisible by scale grid" in refused else 1)
PY
