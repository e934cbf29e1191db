"""Quantized weights: `QMoE`, `MatMulNBits`, `GatherBlockQuantized`, or blocked `DequantizeLinear` in standard ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from moec.compiler.ir.experts import Gate
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.weights import LazyTensor, concatenate
from moec.quantize.formats import Activations
from moec.quantize.lazy import Quantized, Scales
from moec.quantize.methods.tensors import QuantizedTensor
from moec.targets.onnx.context import MS, Context
from moec.targets.onnx.lowerings.layouts import interleave, interleaved_rows

BLOCKS = (128, 64, 32, 16)
"""Block sizes of the kernels."""
INT8_ACTIVATIONS = 4
"""The `accuracy_level` with which a kernel quantizes its activations to int8."""
LINEAR_KERNEL, EXPERTS_KERNEL = "MatMulNBits", "QMoE"

Product = Callable[[ir.Value], ir.Value]
"""A product with a constant matrix: activations [..., K] -> [..., N]."""


@dataclass(frozen=True)
class Packed(LazyTensor):
    """Codes, scales or zero points of a `Quantized` in a kernel's layout, computed slice by slice.

    `function` takes a QuantizedTensor, or with `scales_alone` a `Scales`, and returns its rows in that layout.
    """

    source: Quantized
    function: Callable[[Any], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype

    scales_alone: bool = False
    identity: str = ""
    """Tensors of the same identity have the same bytes, whatever their shapes, and are stored once."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Pack the same rows of the source."""
        read = self.source.scale_rows if self.scales_alone else self.source.quantized_rows
        return self.function(read(start, stop))


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., K] -> bytes [..., K * bits / 8], the lower nibble first."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    # Two bytes read as an int16 are low + 256 * high (every machine that runs torch is little-endian).
    pairs = codes.contiguous().view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8)


def expand_scales(scales: Tensor, groups: int) -> Tensor:
    """Repeat scales [..., G] of larger blocks to [..., groups] scales of smaller ones."""
    return scales.repeat_interleave(groups // scales.shape[-1], dim=-1)


def accuracy_level(*tensors: Quantized) -> int:
    """`accuracy_level` for weights of these formats.

    ONNX Runtime on CPU has no kernel for 8-bit weights with float activations: it would dequantize the whole matrix for
    every token (an lm_head of 32000 x 1024 took 250 ms in place of 4).
    """
    rounded = any(item.format.activations is Activations.INT8_DYNAMIC or item.format.bits == 8 for item in tensors)
    return INT8_ACTIVATIONS if rounded else 0


def kernel_block(*tensors: Quantized) -> int:
    """The largest block size of the kernels (128 .. 16) that divides the block sizes of all tensors.

    With one scale per row, the row may have any length: kernels accept a shorter last block.
    """
    for size in BLOCKS:
        if all(tensor.block % size == 0 for tensor in tensors):
            return size
    for size in BLOCKS[2:]:
        if all(tensor.block % size == 0 or tensor.format.granularity == "channel" for tensor in tensors):
            return size
    raise ValueError("blocks of 16 or more divide every quantized dimension")


def kernel_groups(weight: Quantized, block: int) -> int:
    """Number of blocks per row; the last one may be shorter."""
    return -(-weight.shape[-1] // block)


def rounding_kernel(kernel: str, *tensors: Quantized) -> str | None:
    """`kernel` if it rounds its activations for weights of these formats, else None."""
    return kernel if accuracy_level(*tensors) else None


def stored_entry(weight: Quantized, block: int, *, base: str, first: int = 0, **others: Any) -> dict[str, Any]:
    """The entry in `moec.targets.onnx.stored.TABLE` for a weight whose initializers are `{base}.codes` and so on."""
    return {
        "codes": f"{base}.codes",
        "scales": f"{base}.scales",
        "zero_points": None if weight.format.symmetric else f"{base}.zero_points",
        "first": first,
        "shape": list(weight.shape),
        "bits": weight.format.bits,
        "block": block,
        "signed": False,
        "interleaved": False,
        "rounded_by": None,
        **others,
    }


# Linear ---------------------------------------------------------------------------------------------------------


def product_with(ctx: Context, matrix: ir.Value) -> Product:
    """The product with a matrix [K, N] of floats."""
    return lambda x: ctx.op("MatMul", x, matrix)


def packed_product(ctx: Context, x: ir.Value, weights: Mapping[str, Quantized], dtype: torch.dtype) -> ir.Value:
    """`x @ weight.T` by one MatMulNBits for several weights of the same format and K, with outputs concatenated.

    Args:
        ctx: The lowering.
        x: Activations [..., K].
        weights: Weights [N, K] by name.
        dtype: dtype of the activations.
    """
    name, stores, first = "+".join(weights), list(weights.values()), 0
    kernel = rounding_kernel(LINEAR_KERNEL, *stores)
    for own_name, own in weights.items():
        ctx.others[own_name] = stored_entry(own, kernel_block(*stores), first=first, base=name, rounded_by=kernel)
        first += own.shape[0]
    return _product(ctx, x, name, stores, dtype)


def packed_products(ctx: Context, name: str, stack: Quantized, dtype: torch.dtype) -> list[Product]:
    """One MatMulNBits for each matrix of a stack of experts [E, N, K]."""
    kernel = rounding_kernel(LINEAR_KERNEL, stack)
    ctx.experts[name] = stored_entry(stack, kernel_block(stack), base=f"{name}.{{}}", rounded_by=kernel)

    def product(member: Quantized) -> Product:
        return lambda x: _product(ctx, x, member.name, [member], dtype)

    return [product(member) for member in stack.members()]


def _product(ctx: Context, x: ir.Value, name: str, stores: Sequence[Quantized], dtype: torch.dtype) -> ir.Value:
    fmt, columns = stores[0].format, stores[0].shape[1]
    block, bits = kernel_block(*stores), fmt.bits
    groups = kernel_groups(stores[0], block)

    def packed(part: QuantizedTensor) -> Tensor:
        whole = torch.nn.functional.pad(part.unsigned_codes(), (0, groups * block - columns))
        return pack(whole, bits).reshape(len(part.codes), groups, -1)

    codes: list[LazyTensor] = [
        Packed(own, packed, (own.shape[0], groups, block * bits // 8), torch.uint8, identity=stored_once_as(own, block))
        for own in stores
    ]
    zero_points = None
    if not fmt.symmetric:
        zero_points = ctx.initializer(
            f"{name}.zero_points", concatenate([zero_points_of(own, groups) for own in stores], 0)
        )
    return ctx.op(
        LINEAR_KERNEL,
        x,
        ctx.initializer(f"{name}.codes", concatenate(codes, 0)),
        scales_of(ctx, name, stores, groups, dtype),
        zero_points,
        domain=MS,
        K=columns,
        N=sum(own.shape[0] for own in stores),
        bits=bits,
        block_size=block,
        accuracy_level=accuracy_level(*stores),
    )


def stored_once_as(weight: Quantized, block: int) -> str:
    """`Packed.identity` of codes: the matrix of a product has the bytes of a table, if its rows are whole blocks.

    A shorter last block is filled up for the product, and not in the table.
    """
    return "" if weight.shape[-1] % block else f"{weight.name}.codes"


def scales_of(ctx: Context, name: str, weights: Sequence[Quantized], groups: int, dtype: torch.dtype) -> ir.Value:
    """Scales [..., groups] in the dtype of the graph, as kernels read them.

    Kernels pack constants when a model is loaded. A scale that the graph casts is a constant only after graph
    optimization: without it, MatMulNBits packs codes without scales and silently returns zeros. (QMoE handles both
    cases, so its scales keep the smaller dtype of the format.)
    """

    def expanded(part: Scales) -> Tensor:
        return expand_scales(part.scales, groups).to(dtype)

    tensors = [Packed(own, expanded, (*own.shape[:-1], groups), dtype, scales_alone=True) for own in weights]
    return ctx.initializer(f"{name}.scales", concatenate(tensors, 0))


def zero_points_of(weight: Quantized, groups: int) -> Packed:
    """Zero points [..., groups], two to a byte for 4 bits."""
    bits = weight.format.bits
    return Packed(
        weight,
        lambda part: pack(expand_scales(part.unsigned_zero_points(), groups), bits),
        (*weight.shape[:-1], (groups * bits + 7) // 8),
        torch.uint8,
        scales_alone=True,
    )


# Experts --------------------------------------------------------------------------------------------------------


def experts(
    ctx: Context,
    node: fx.Node,
    gate: Gate,
    router: ir.Value,
    attributes: dict[str, Any],
    *,
    router_weights: ir.Value | None = None,
) -> ir.Value:
    """`QMoE`, which drops slots of weight 0 before it groups tokens by expert, so that they cost nothing.

    Args:
        ctx: The lowering.
        node: The experts node.
        gate: The activation of its experts.
        router: [T, E]. Its largest entries select the experts of a token.
        attributes: Those that select the activation.
        router_weights: Routing weights [T, E], which are not normalised; None: the softmax of `router` over the
            selected experts.
    """
    own = Experts.of(node)
    tensors = [_quantized(ctx, argument) for argument in (own.gate_up_proj, own.down_proj)]
    biases = (own.gate_up_bias, own.down_bias)
    block = kernel_block(*(tensor for _, tensor in tensors))
    operands: list[ir.Value | None] = [ctx.tensor(own.hidden_states), router]
    zero_point_inputs: list[ir.Value | None] = []
    for (name, tensor), bias, first in zip(tensors, biases, (True, False), strict=True):
        interleaved = first and gate.gated and not gate.interleaved
        codes, scales, zero_points = _stack(tensor, kernel_groups(tensor, block), interleaved)
        operands += [ctx.initializer(f"{name}.codes", codes), ctx.initializer(f"{name}.scales", scales)]
        operands.append(None if bias is None else _bias(ctx, bias, interleaved))
        zero_point_inputs.append(None if zero_points is None else ctx.initializer(f"{name}.zero_points", zero_points))
        # QMoE rounds with an accuracy level or 8 bits, and not before a product whose last block is shorter.
        rounds = (ctx.dialect.recent_qmoe or tensor.format.bits == 8) and tensor.shape[-1] % block == 0
        kernel = rounding_kernel(EXPERTS_KERNEL, *(item for _, item in tensors)) if rounds else None
        ctx.experts[name] = stored_entry(tensor, block, base=name, interleaved=interleaved, rounded_by=kernel)
    (bits,) = {tensor.format.bits for _, tensor in tensors}
    level = {"accuracy_level": accuracy_level(*(tensor for _, tensor in tensors))} if ctx.dialect.recent_qmoe else {}
    return ctx.op(
        EXPERTS_KERNEL,
        *operands,
        *(None,) * 3,
        *zero_point_inputs,
        None,
        router_weights,
        domain=MS,
        k=own.top_k,
        normalize_routing_weights=int(router_weights is None),
        # One number for both projections (see `same_bits`): ONNX Runtime 1.30 does not know the attributes for each.
        expert_weight_bits=bits,
        block_size=block,
        **level,
        **attributes,
    )


def fills_bytes(weight: Quantized) -> bool:
    """Whether no row of int4 codes ends within a byte."""
    return weight.format.bits != 4 or weight.shape[-1] % 2 == 0


def same_bits(*stacks: Quantized) -> bool:
    """Whether `QMoE` can compute with these projections: it needs the same number of bits for both."""
    return len({stack.format.bits for stack in stacks}) <= 1


def _quantized(ctx: Context, argument: Any) -> tuple[str, Quantized]:
    name = ctx.program.weights.resolve(str(argument.target))
    tensor = ctx.program.weights[name]
    assert isinstance(tensor, Quantized)
    return name, tensor


def _bias(ctx: Context, bias: Any, interleaved: bool) -> ir.Value:
    tensor = ctx.lazy(bias)
    entry = {"initializer": f"{bias.target}.moe", "interleaved": interleaved, "transposed": False}
    ctx.experts[str(bias.target)] = entry
    return ctx.initializer(f"{bias.target}.moe", interleaved_rows(tensor) if interleaved else tensor)


def _stack(tensor: Quantized, groups: int, interleaved: bool) -> tuple[Packed, Packed, Packed | None]:
    """Codes [E, N, K * bits / 8], scales [E, N, groups] and zero points; gate and up rows are interleaved if asked."""
    count, rows, columns = tensor.shape
    bits, stored = tensor.format.bits, tensor.format.scale_type.dtype

    def ordered(value: Tensor) -> Tensor:
        return interleave(value) if interleaved else value

    codes = Packed(
        tensor, lambda part: ordered(pack(part.unsigned_codes(), bits)), (count, rows, columns * bits // 8), torch.uint8
    )
    scales = Packed(
        tensor, lambda part: ordered(expand_scales(part.scales, groups)).to(stored), (count, rows, groups), stored, True
    )
    if tensor.format.symmetric:
        return codes, scales, None
    width = (groups * bits + 7) // 8
    zero_points = Packed(
        tensor,
        lambda part: ordered(pack(expand_scales(part.unsigned_zero_points(), groups), bits)),
        (count, rows, width),
        torch.uint8,
        True,
    )
    return codes, scales, zero_points
