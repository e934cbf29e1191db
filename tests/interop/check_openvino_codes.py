"""Write a model with weights in int8 for each row and in int4 in blocks, and read their values back.

python check_openvino_codes.py FOLDER      prints precision and relative error of each tensor as JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as op

from moec.compiler.foreign.openvino import OpenvinoModel

HELD: list[np.ndarray] = []
"""Packed codes, whose memory OpenVINO shares."""


def rounded(values: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, zero points and scales of the last axis."""
    low, high = values.min(-1, keepdims=True), values.max(-1, keepdims=True)
    scales = ((high - low) / largest).astype(np.float16).astype(np.float32)
    points = np.clip(np.round(-low / scales), 0, largest)
    return np.clip(np.round(values / scales) + points, 0, largest), points, scales


def four_bits(codes: np.ndarray) -> Any:
    pairs = codes.astype(np.uint8).reshape(-1, 2)
    HELD.append(np.ascontiguousarray(pairs[:, 0] | (pairs[:, 1] << 4)))
    return op.constant(ov.Tensor(HELD[-1], ov.Shape(codes.shape), ov.Type.u4))


def values_of(codes: Any, points: Any, scales: np.ndarray, kind: str) -> Any:
    scale = op.constant(scales.astype(np.float16 if kind == "f16" else np.float32))
    return op.multiply(op.subtract(op.convert(codes, kind), op.convert(points, kind)), scale)


def main(folder: str) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    codes, points, scales = rounded(weight, 255)
    eight = values_of(op.constant(codes.astype(np.uint8)), op.constant(points.astype(np.uint8)), scales, "f32")
    codes, points, scales = rounded(weight.reshape(64, 4, 32), 15)
    blocks = values_of(four_bits(codes), four_bits(points), scales, "f16")
    four = op.convert(op.reshape(blocks, op.constant(np.array([64, 128])), False), "f32")
    tokens = op.parameter([-1, 128], ov.Type.f32, name="x")
    products = [op.matmul(tokens, each, False, True) for each in (eight, four)]
    path = Path(folder) / "model.xml"
    ov.save_model(ov.Model(products, [tokens], "codes"), path, compress_to_fp16=False)
    found = [
        (tensor.precision, float(np.linalg.norm(tensor.read() - weight) / np.linalg.norm(weight)))
        for tensor in OpenvinoModel(path).tensors()
        if tensor.read is not None
    ]
    print(json.dumps(sorted(found)))


if __name__ == "__main__":
    main(sys.argv[1])
