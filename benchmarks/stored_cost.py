"""Anonymous memory and CPU time of an export of gpt-oss-20b's shape from MXFP4 (random codes) to int4 ONNX.

    python benchmarks/stored_cost.py [--work DIR] [--layers N]

The checkpoint takes 12.9 GB and the artifact 11.4 GB; both are removed afterwards unless --work is given. Memory is
RssAnon, as in benchmarks/export_cost.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from export_cost import measure_export
from machine import describe

SIZES: dict[str, Any] = {
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "sliding_window": 128,
}
PIECE = 1 << 24


def stored(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of the tensors that the release stores for a weight of the model."""
    if len(shape) == 3 and name.endswith("proj"):
        experts, columns, rows = shape
        yield f"{name}_blocks", "U8", (experts, rows, columns // 32, 16)
        yield f"{name}_scales", "U8", (experts, rows, columns // 32)
    else:
        yield name, "BF16", shape


def mxfp4_checkpoint(directory: Path, layers: int) -> Path:
    """Write the checkpoint (once): random codes, exponents around 2 ** -7, random bfloat16 values elsewhere."""
    import torch
    from transformers import AutoModelForCausalLM, GptOssConfig

    path = directory / "model.safetensors"
    if path.is_file():
        return directory
    config = GptOssConfig(num_hidden_layers=layers, **SIZES)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.save_pretrained(directory)
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "mxfp4"}}))
    table: dict[str, Any] = {}
    offset = 0
    for name, value in model.state_dict().items():
        for own, kind, shape in stored(name, tuple(value.shape)):
            size = torch.Size(shape).numel() * (1 if kind == "U8" else 2)
            table[own] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
    generator = torch.Generator().manual_seed(0)
    header = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, entry in table.items():
            first, last = entry["data_offsets"]
            for start in range(first, last, PIECE):
                count = min(PIECE, last - start)
                if name.endswith("_blocks"):
                    data = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
                elif name.endswith("_scales"):
                    data = torch.randint(118, 122, (count,), generator=generator, dtype=torch.uint8)
                else:
                    value = torch.randn(count // 2, generator=generator) / 50
                    data = value.to(torch.bfloat16).view(torch.uint8)
                file.write(data.numpy().data)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="where to keep the checkpoint and the artifact")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        flags = ["--quantize", "int4", "--rounding", "rtn", "--overwrite"]
        print(json.dumps(measure_export(options.child[0], options.child[1], flags)))
        return
    print(describe())
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        checkpoint = mxfp4_checkpoint(work / "gpt-oss-mxfp4", options.layers)
        command = [sys.executable, __file__, "--child", str(checkpoint), str(work / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        row = json.loads(done.stdout.splitlines()[-1])
    print("\n| layers | CPU s | imports, anonymous GB | peak above them, GB | peak RSS, GB |\n|---|---|---|---|---|")
    above = row["peak_anon_gb"] - row["imports_anon_gb"]
    figures = (f"{row['cpu_s']:.0f}", f"{row['imports_anon_gb']:.2f}", f"{above:.2f}", f"{row['peak_rss_gb']:.2f}")
    print(f"| {options.layers} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
