#!/usr/bin/env bash
# The Linux wheel of coreai-core has a runtime, but no program that the same wheel saves can be loaded by it.
#
# coreai-torch converts an exported program on Linux, and coreai-core saves it as an .aimodel folder with main.mlirb,
# main.hash and metadata.json, which its AIModelAsset reads back with a right summary. coreai.runtime.AIModel exists and
# imports on Linux too. Its load() looks in the folder for main-unspecialized.odix, a compiled program that nothing in
# the wheel writes, and fails with "No such file or directory" without naming the file. So a conversion can be inspected
# on Linux, and not executed: its numbers have to be checked on macOS.
#
# Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'coreai-core==1.0.0b3' 'coreai-torch==0.4.3' 'numpy==2.4.6'
"$folder/venv/bin/python" - "$folder/model.aimodel" 2>/dev/null <<'PY'
import asyncio
import importlib.metadata
import sys
from pathlib import Path

import coreai.runtime
import torch
from coreai.authoring import AIModelAsset
from coreai_torch import TorchConverter, get_decomp_table

path = Path(sys.argv[1])
exported = torch.export.export(torch.nn.Linear(4, 4).eval(), (torch.randn(1, 4),))
program = TorchConverter().add_exported_program(exported.run_decompositions(get_decomp_table())).to_coreai()
program.save_asset(path)
files = sorted(file.name for file in path.iterdir())
readable = "main" in str(AIModelAsset.load(path).summary())


async def load() -> str:
    try:
        await coreai.runtime.AIModel.load(path)
    except RuntimeError as error:
        return str(error)
    return "loaded"


answer = asyncio.run(load())
for name in ("coreai-core", "coreai-torch", "torch"):
    print(name, importlib.metadata.version(name))
print("saved:", ", ".join(files))
print("AIModelAsset reads it:", readable)
print("AIModel.load:", answer)
same = files == ["main.hash", "main.mlirb", "metadata.json"] and readable and "No such file" in answer
sys.exit(0 if same else 1)
PY
