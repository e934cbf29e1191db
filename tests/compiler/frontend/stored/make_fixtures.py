"""Small quantized tensors made by the libraries that define their formats, with the values that these read them as.

    python make_fixtures.py OUT

Runs without moec, in an environment with torch 2.13.0, safetensors, numpy, auto-gptq 0.7.1, gptqmodel 7.7.0 (its
source on PYTHONPATH is enough), autoawq 0.2.9, bitsandbytes 0.50.2 and compressed-tensors 0.20.0. Each file holds
tensors named as in a checkpoint, `expected` [N, K], and in its metadata the quantization_config and the versions.
"""

import importlib.metadata
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROWS, COLUMNS, GROUP = 32, 128, 32
Made = tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]


def without_init(package: str, *folders: str) -> None:
    """Make modules of an installed package importable without its __init__, which wants a whole model zoo."""
    base = Path(importlib.metadata.distribution(package).locate_file(folders[0].split(".")[0]))
    for folder in folders:
        module = types.ModuleType(folder)
        module.__path__ = [str(base.joinpath(*folder.split(".")[1:]))]
        sys.modules[folder] = module


def weight(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 8


def linear(value: torch.Tensor) -> torch.nn.Linear:
    made = torch.nn.Linear(value.shape[1], value.shape[0], bias=False)
    made.weight.data = value
    return made


def grid(value: torch.Tensor, bits: int, symmetric: bool, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points [N, G] of groups of columns, as GPTQ's quantizer chooses them."""
    groups = int(index.max()) + 1
    scales, zeros = torch.empty(len(value), groups), torch.empty(len(value), groups)
    for group in range(groups):
        part = value[:, index == group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scales[:, group] = ((high - low) / (2**bits - 1)).half().float()
        middle = torch.full_like(low, 2 ** (bits - 1))
        zeros[:, group] = middle if symmetric else (-low / scales[:, group]).round().clamp(1, 2**bits - 1)
    return scales, zeros


def gptq(bits: int, symmetric: bool, act_order: bool) -> Made:
    without_init("auto-gptq", "auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear")
    from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear

    value = weight()
    index = torch.arange(COLUMNS) // GROUP
    if act_order:
        index = index[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))]
    scales, zeros = grid(value, bits, symmetric, index)
    layer = QuantLinear(bits, GROUP, COLUMNS, ROWS, bias=False, weight_dtype=torch.float16)
    layer.pack(linear(value), scales, zeros, index.to(torch.int32))
    layer.eval()
    layer.use_cuda_fp16 = False
    with torch.no_grad():
        expected = layer(torch.eye(COLUMNS, dtype=torch.float32)).T.contiguous()
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": act_order, "sym": symmetric}
    names = ("qweight", "qzeros", "scales", "g_idx")
    return {name: getattr(layer, name) for name in names}, expected, config


def gptq_v2(bits: int) -> Made:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    value = weight(2)
    index = torch.arange(COLUMNS) // GROUP
    scales, zeros = grid(value, bits, symmetric=False, index=index)
    layer = TorchLinear(bits, GROUP, sym=False, desc_act=False, in_features=COLUMNS, out_features=ROWS, bias=False)
    layer.pack_original(linear(value), scales, zeros, index.to(torch.int32))
    layer.post_init()
    with torch.no_grad():
        expected = layer.dequantize_weight().T.contiguous()
    config = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": bits, "group_size": GROUP, "sym": False}
    return {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}, expected, config


def awq() -> Made:
    without_init("autoawq", "awq", "awq.utils", "awq.modules", "awq.modules.linear")
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    value = weight(3)
    scales, zeros = grid(value, 4, symmetric=False, index=torch.arange(COLUMNS) // GROUP)
    layer = WQLinear_GEMM.from_linear(
        linear(value.half()), 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
    )
    expected = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, GROUP).T.contiguous()
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    return {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}, expected, config


def bitsandbytes_4bit(kind: str, double: bool) -> Made:
    from bitsandbytes import functional

    # The number of blocks is no multiple of that of a block of absmax, 256, nor a whole number of them.
    value = weight(4, 129 if double else ROWS)
    data, state = functional.quantize_4bit(value.half(), compress_statistics=double, quant_type=kind)
    expected = functional.dequantize_4bit(data, state)
    stored = {"weight": data} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return stored, expected, config


def bitsandbytes_int8() -> Made:
    from bitsandbytes import functional

    data, stats, _ = functional.int8_vectorwise_quant(weight(5).half())
    expected = functional.int8_vectorwise_dequant(data, stats)
    stored = {"weight": data, "SCB": stats, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, expected, {"quant_method": "bitsandbytes", "load_in_8bit": True}


def compressed(form: str, rows: int = ROWS, columns: int = COLUMNS, **weights: Any) -> Made:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    value = weight(6, rows, columns).bfloat16()
    high, wide = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "block": weights.get("block_structure", (1, 1)),
    }.get(weights["strategy"], (1, weights.get("group_size", 1)))
    padded = torch.nn.functional.pad(value, (0, -columns % wide, 0, -rows % high))
    blocks = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
    options = {}
    state: dict[str, torch.Tensor] = {"weight": value}
    if weights["strategy"] == "tensor_group":
        from compressed_tensors.quantization.utils import generate_gparam

        whole = generate_gparam(value.amin().reshape(1), value.amax().reshape(1))
        options["global_scale"] = state["weight_global_scale"] = whole
    scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args, **options)
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"weights": args.model_dump(mode="json"), "targets": ["Linear"]}},
    }
    return stored, expected, config


FIXTURES: dict[str, Callable[[], Made]] = {
    "gptq-4-sym": lambda: gptq(4, symmetric=True, act_order=False),
    "gptq-4-asym-act-order": lambda: gptq(4, symmetric=False, act_order=True),
    "gptq-8-asym": lambda: gptq(8, symmetric=False, act_order=False),
    "gptq-2-asym": lambda: gptq(2, symmetric=False, act_order=False),
    "gptq-v2-4-asym": lambda: gptq_v2(4),
    "gptq-v2-8-asym": lambda: gptq_v2(8),
    "awq": awq,
    "nf4": lambda: bitsandbytes_4bit("nf4", double=False),
    "nf4-double": lambda: bitsandbytes_4bit("nf4", double=True),
    "fp4": lambda: bitsandbytes_4bit("fp4", double=False),
    "llm-int8": bitsandbytes_int8,
    "pack-int4-group": lambda: compressed(
        "pack-quantized", num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP
    ),
    "pack-int4-group-asym": lambda: compressed(
        "pack-quantized", num_bits=4, type="int", symmetric=False, strategy="group", group_size=GROUP
    ),
    "pack-int8-channel": lambda: compressed(
        "pack-quantized", columns=100, num_bits=8, type="int", symmetric=True, strategy="channel"
    ),
    "int8-channel": lambda: compressed("int-quantized", num_bits=8, type="int", symmetric=True, strategy="channel"),
    "int8-channel-asym": lambda: compressed(
        "int-quantized", num_bits=8, type="int", symmetric=False, strategy="channel"
    ),
    "naive-int8-group": lambda: compressed(
        "naive-quantized", num_bits=8, type="int", symmetric=True, strategy="group", group_size=GROUP
    ),
    "fp8-tensor": lambda: compressed("float-quantized", num_bits=8, type="float", symmetric=True, strategy="tensor"),
    "fp8-channel": lambda: compressed("float-quantized", num_bits=8, type="float", symmetric=True, strategy="channel"),
    "fp8-block": lambda: compressed(
        "float-quantized", 40, 72, num_bits=8, type="float", symmetric=True, strategy="block", block_structure=[16, 32]
    ),
    "mxfp4-packed": lambda: compressed(
        "mxfp4-pack-quantized", num_bits=4, type="float", symmetric=True, strategy="group", group_size=32,
        scale_dtype=torch.uint8,
    ),
    "nvfp4-packed": lambda: compressed(
        "nvfp4-pack-quantized", num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    ),
}  # fmt: skip
PACKAGES = ("torch", "auto-gptq", "gptqmodel", "autoawq", "bitsandbytes", "compressed-tensors")


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "source"
    return found


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    wanted = sys.argv[2:] or list(FIXTURES)
    for name in wanted:
        stored, expected, config = FIXTURES[name]()
        tensors = {f"layer.{key}": value.detach().contiguous() for key, value in stored.items()}
        metadata = {"quantization_config": json.dumps(config, default=str), "versions": json.dumps(versions())}
        save_file(
            tensors | {"expected": expected.detach().to(expected.dtype).contiguous()},
            out / f"{name}.safetensors",
            metadata,
        )
        print(name, {key: (tuple(value.shape), str(value.dtype)) for key, value in tensors.items()}, expected.dtype)


if __name__ == "__main__":
    main()
