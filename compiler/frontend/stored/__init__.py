"""Quantized weights as checkpoints store them: one file and one line in `FORMATS` per format.

A format decodes stored tensors to float weights lazily, a stack of experts one expert at a time. The decoded weights
keep their codes (`moec.compiler.ir.encoded_weights.Encoded`), which `--quantize keep` writes to the artifact.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.frontend.stored.awq import AWQ
from moec.compiler.frontend.stored.base import SAVE_FLOAT, Settings, StoredFormat
from moec.compiler.frontend.stored.bitsandbytes import BITSANDBYTES
from moec.compiler.frontend.stored.compressed_tensors import COMPRESSED_TENSORS
from moec.compiler.frontend.stored.fp8 import FP8
from moec.compiler.frontend.stored.gptq import GPTQ
from moec.compiler.frontend.stored.mxfp4 import MXFP4
from moec.compiler.ir.safetensors_file import StoredEntry
from moec.compiler.ir.weights import LazyTensor, Stored

FORMATS: Mapping[str, StoredFormat] = {
    "awq": AWQ,
    "bitsandbytes": BITSANDBYTES,
    "compressed-tensors": COMPRESSED_TENSORS,
    "fbgemm_fp8": COMPRESSED_TENSORS,
    "fp8": FP8,
    "gptq": GPTQ,
    "mxfp4": MXFP4,
}
"""`quant_method` of a checkpoint's quantization_config -> how its weights are read."""


def stored_format(settings: Settings, where: Path) -> StoredFormat:
    """The format that `settings` name.

    Raises:
        UnsupportedModelError: moec does not read the format, or this variant of it.
    """
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # as older releases of transformers wrote it
    if not isinstance(method, str) or method not in FORMATS:
        raise UnsupportedModelError(
            f"{where}: the weights are quantized ({method or 'quantization_config has no quant_method'}), "
            f"and moec reads {', '.join(sorted(FORMATS))}",
            hint=SAVE_FLOAT,
        )
    chosen = FORMATS[method]
    if reason := chosen.refuse(settings):
        raise UnsupportedModelError(f"{where}: {reason}", hint=SAVE_FLOAT)
    return chosen


def float_tensors(entries: Mapping[str, StoredEntry], settings: Settings, where: Path) -> Mapping[str, LazyTensor]:
    """Name -> float tensor of a checkpoint.

    Args:
        entries: Name -> tensor in the files.
        settings: `quantization_config`; empty where nothing is quantized.
        where: The checkpoint, for messages.

    Raises:
        UnsupportedModelError: moec does not read the format, or this variant of it.
        CheckpointError: Tensors of a weight are missing or do not fit together.
    """
    tensors = {name: Stored(entry) for name, entry in entries.items()}
    if not settings:
        return tensors
    return stored_format(settings, where).decoded(tensors, settings, where)
