"""How the kernels for quantized weights round activations on this machine, found by running them once.

MLAS has other kernels on other processors, and some round a whole row and not each block. So a product of known numbers
is computed by the runtime, and its rounding counts as known only if the result shows it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from moec.quantize.activations import round_blocks_to_int8
from moec.quantize.lazy import Quantized
from moec.targets.onnx.files import model_path
from moec.targets.onnx.lowerings.quantized import EXPERTS_KERNEL, INT8_ACTIVATIONS, LINEAR_KERNEL, pack
from moec.targets.onnx.runner import session_options
from moec.targets.onnx.stored import TABLE

if TYPE_CHECKING:
    from moec.compiler.ir.interpreter import ActivationRounding
    from moec.compiler.ir.weights import LazyTensor

MS = "com.microsoft"
SAME = 1e-5
"""Difference relative to the largest output; float32 gives about 2e-7, another rounding 3e-3 or more."""
TOKENS, BLOCKS = 3, 2
"""Rows and blocks per row of the product that is tried."""


def activation_rounding(directory: Path) -> ActivationRounding | None:
    """How the kernels of an artifact round the activations of each product; None if it is not known.

    Args:
        directory: The artifact. In one of an older moec, nothing says which kernels round.
    """
    model = onnx.load(model_path(directory), load_external_data=False)
    table = json.loads({item.key: item.value for item in model.metadata_props}.get(TABLE, "{}"))
    coded: Mapping[str, Mapping[str, Any]] = {name: entry for name, entry in table.items() if "codes" in entry}
    if not coded or any("rounded_by" not in entry for entry in coded.values()):
        return None
    rounded = {name: entry for name, entry in coded.items() if entry["rounded_by"]}
    kernels = {(entry["rounded_by"], entry["bits"], entry["block"]) for entry in rounded.values()}
    if not all(rounds_blocks(*kernel) for kernel in kernels):
        return None
    blocks = {name: int(entry["block"]) for name, entry in rounded.items()}

    def rounding(weight: LazyTensor, activations: Tensor) -> Tensor:
        block = blocks.get(weight.name) if isinstance(weight, Quantized) else None
        return activations if block is None else round_blocks_to_int8(activations, block)

    return rounding


@functools.cache
def rounds_blocks(kernel: str, bits: int, block: int) -> bool:
    """Whether `kernel` rounds activations as `round_blocks_to_int8` for weights of this format."""
    generator = torch.Generator().manual_seed(0)
    columns = BLOCKS * block
    codes = torch.randint(0, 1 << bits, (columns, columns), generator=generator, dtype=torch.uint8)
    x = torch.randn(TOKENS, columns, generator=generator)
    weight = codes.double() - (1 << (bits - 1))
    packed = pack(codes, bits).numpy()
    products = {LINEAR_KERNEL: 1, EXPERTS_KERNEL: 2}[kernel]
    want = x
    for _ in range(products):
        want = (round_blocks_to_int8(want, block).double() @ weight.T).float()
    got = _run(_linear(packed, bits, block) if products == 1 else _experts(packed, bits, block), x.numpy())
    return bool(np.abs(got - want.numpy()).max() <= SAME * np.abs(want.numpy()).max())


def _linear(packed: np.ndarray, bits: int, block: int) -> onnx.ModelProto:
    rows, columns = len(packed), BLOCKS * block
    node = helper.make_node(
        LINEAR_KERNEL, ["x", "codes", "scales"], ["y"], domain=MS, K=columns, N=rows, bits=bits, block_size=block,
        accuracy_level=INT8_ACTIVATIONS,
    )  # fmt: skip
    scales = np.ones((rows, BLOCKS), np.float32)
    return _model([node], {"codes": packed.reshape(rows, BLOCKS, -1), "scales": scales}, columns)


def _experts(packed: np.ndarray, bits: int, block: int) -> onnx.ModelProto:
    """One expert whose two matrices are equal. The kernel does not round if both are one constant of the graph."""
    columns = BLOCKS * block
    inputs = ["x", "weights", "first", "scales", "", "second", "second_scales", *[""] * 7, "weights"]
    nodes = [
        helper.make_node("ReduceSum", ["x", "axes"], ["sums"], keepdims=1),
        helper.make_node("Equal", ["sums", "sums"], ["same"]),
        helper.make_node("Cast", ["same"], ["weights"], to=TensorProto.FLOAT),
        helper.make_node(
            EXPERTS_KERNEL, inputs, ["y"], domain=MS, k=1, activation_type="identity", normalize_routing_weights=0,
            expert_weight_bits=bits, block_size=block, accuracy_level=INT8_ACTIVATIONS,
        ),
    ]  # fmt: skip
    scales = np.ones((1, columns, BLOCKS), np.float16)
    constants = {"first": packed[None], "second": packed[None], "scales": scales, "second_scales": scales}
    return _model(nodes, {**constants, "axes": np.array([1], np.int64)}, columns)


def _model(nodes: Sequence[onnx.NodeProto], constants: Mapping[str, np.ndarray], columns: int) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        list(nodes),
        "rounding",
        [info("x", TensorProto.FLOAT, [TOKENS, columns])],
        [info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    return np.asarray(found, np.float32)
