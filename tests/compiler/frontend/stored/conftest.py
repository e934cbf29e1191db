"""Tiny checkpoints in stored formats, packed here with numpy, apart from the code that reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moec.compiler.families.tiny_models import tiny_model, write_tiny_checkpoint

Tensors = dict[str, torch.Tensor]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)


def store(
    checkpoint: Path,
    settings: dict[str, Any],
    chosen: Callable[[str, torch.Tensor], bool],
    pack: Callable[..., Tensors],
) -> None:
    """Replace chosen weights of a checkpoint by `pack(name without "weight", value)`, and say so in its config."""
    tensors: Tensors = {}
    for name, value in load_file(checkpoint / "model.safetensors").items():
        if chosen(name, value):
            tensors |= pack(name.removesuffix("weight"), value)
        else:
            tensors[name] = value
    save_file({name: value.contiguous() for name, value in tensors.items()}, checkpoint / "model.safetensors")
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))


def linears(name: str, value: torch.Tensor) -> bool:
    """The weights that quantizers convert: matrices of linears but the head, the embedding and routers."""
    return value.ndim == 2 and name.endswith("proj.weight")


def words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Unsigned numbers [R, C] packed along the rows: int32 [R * bits / 32, C], the first in the lowest bits."""
    per = 32 // bits
    packed = np.zeros((codes.shape[0] // per, codes.shape[1]), dtype=np.uint32)
    for position in range(per):
        packed |= codes[position::per].astype(np.uint32) << np.uint32(bits * position)
    return torch.from_numpy(packed.view(np.int32))


def grouped(value: torch.Tensor, bits: int, symmetric: bool, index: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes [N, K], scales [N, G] (values of fp16) and zero points [N, G], all unsigned."""
    weight, groups = value.float().numpy(), int(index.max()) + 1
    scales, zeros = (np.zeros((len(weight), groups), dtype=np.float32) for _ in range(2))
    for group in range(groups):
        part = weight[:, index == group]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            low, high = -np.maximum(-low, high), np.maximum(-low, high)
        scales[:, group] = np.maximum((high - low) / (2**bits - 1), 1e-4).astype(np.float16)
        zeros[:, group] = 2 ** (bits - 1) if symmetric else np.clip(np.round(-low / scales[:, group]), 1, 2**bits - 1)
    codes = np.clip(np.round(weight / scales[:, index]) + zeros[:, index], 0, 2**bits - 1)
    return codes, scales, zeros


def gptq(bits: int, group: int, *, symmetric: bool = True, act_order: bool = False) -> Callable[..., Tensors]:
    def pack(name: str, value: torch.Tensor) -> Tensors:
        index = np.arange(value.shape[1]) // group
        if act_order:
            index = np.random.default_rng(0).permutation(index)
        codes, scales, zeros = grouped(value, bits, symmetric, index)
        return {
            f"{name}qweight": words(codes.T, bits),
            f"{name}qzeros": words(zeros - 1, bits).T,
            f"{name}scales": torch.from_numpy(scales.T.astype(np.float16)),
            f"{name}g_idx": torch.from_numpy(index.astype(np.int32)),
        }

    return pack


def awq(group: int) -> Callable[..., Tensors]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def interleaved(numbers: np.ndarray) -> torch.Tensor:
        """[N, R] -> int32 [R, N / 8]: the i-th number of a word is `order[i]` of its eight."""
        return words(numbers.reshape(-1, 8, numbers.shape[1])[:, order].reshape(numbers.shape), 4).T

    def pack(name: str, value: torch.Tensor) -> Tensors:
        codes, scales, zeros = grouped(value, 4, False, np.arange(value.shape[1]) // group)
        return {
            f"{name}qweight": interleaved(codes),
            f"{name}qzeros": interleaved(zeros),
            f"{name}scales": torch.from_numpy(scales.T.astype(np.float16)),
        }

    return pack


def fp8(block: tuple[int, int]) -> Callable[..., Tensors]:
    def pack(name: str, value: torch.Tensor) -> Tensors:
        rows, columns = value.shape
        high, wide = block
        padded = torch.nn.functional.pad(value.float(), (0, -columns % wide, 0, -rows % high))
        blocks = padded.reshape(padded.shape[0] // high, high, padded.shape[1] // wide, wide)
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).reshape(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn)
        return {f"{name}weight": codes, f"{name}weight_scale_inv": scales}

    return pack


def mxfp4(name: str, value: torch.Tensor) -> Tensors:
    """[E, K, N] -> blocks [E, N, K / 32, 16] and scales [E, N, K / 32]."""
    weight = value.float().numpy().transpose(0, 2, 1)
    blocks = weight.reshape(*weight.shape[:2], -1, 32)
    exponent = np.floor(np.log2(np.abs(blocks).max(-1))) - 2
    scaled = blocks / np.exp2(exponent)[..., None]
    codes = np.abs(np.abs(scaled)[..., None] - E2M1).argmin(-1) + 8 * (scaled < 0)
    packed = (codes[..., 0::2] + 16 * codes[..., 1::2]).astype(np.uint8)
    return {
        f"{name}_blocks": torch.from_numpy(packed),
        f"{name}_scales": torch.from_numpy((exponent + 127).astype(np.uint8)),
    }


def mixtral_linears(name: str, value: torch.Tensor) -> bool:
    return value.ndim == 2 and name.endswith((".w1.weight", ".w2.weight", ".w3.weight", "proj.weight"))


def experts(name: str, value: torch.Tensor) -> bool:
    return value.ndim == 3 and name.endswith("proj")


GPTQ: dict[str, Any] = {"quant_method": "gptq", "group_size": 32, "checkpoint_format": "gptq"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], Callable[..., bool], Callable[..., Tensors]]] = {
    "gpt_oss mxfp4": ("gpt_oss", {"intermediate_size": 64}, {"quant_method": "mxfp4"}, experts, mxfp4),
    # Block sizes that do not divide, as 576 = 4.5 x 128 of DeepSeek-V3's kv_a_proj does not.
    "deepseek_v3 fp8": ("deepseek_v3", {}, {**FP8, "weight_block_size": [16, 24]}, linears, fp8((16, 24))),
    "qwen3_moe fp8": (
        "qwen3_moe",
        {"moe_intermediate_size": 32},
        {**FP8, "weight_block_size": [16, 32]},
        linears,
        fp8((16, 32)),
    ),
    "qwen3_moe gptq": (
        "qwen3_moe", {"moe_intermediate_size": 64}, {**GPTQ, "bits": 4, "sym": True}, linears, gptq(4, 32)
    ),
    "qwen3_moe gptq 8": (
        "qwen3_moe", {"moe_intermediate_size": 64}, {**GPTQ, "bits": 8, "sym": True}, linears, gptq(8, 32)
    ),
    "mixtral gptq act-order": (
        "mixtral",
        {"intermediate_size": 64},
        {**GPTQ, "bits": 4, "desc_act": True, "sym": False},
        mixtral_linears,
        gptq(4, 32, symmetric=False, act_order=True),
    ),
    "mixtral awq": (
        "mixtral",
        {"intermediate_size": 64},
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        mixtral_linears,
        awq(32),
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def stored_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of one of CHECKPOINTS, written once per session."""
    written: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in written:
            family, sizes, settings, chosen, pack = CHECKPOINTS[name]
            directory = tmp_path_factory.mktemp(family)
            write_tiny_checkpoint(family, directory, tokenizer=True)
            tiny_model(family, **sizes).save_pretrained(directory)
            store(directory, settings, chosen, pack)
            written[name] = directory
        return written[name]

    return checkpoint
