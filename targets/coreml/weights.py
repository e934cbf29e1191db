"""Weights as MIL constants, float or quantized. Each is stored once in the package."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from moec.compiler.ir.weights import LazyTensor
from moec.quantize.keep import KeptTable
from moec.quantize.lazy import Coded, CodedFormat, Palettized, Quantized
from moec.targets.common.refusals import RefusedError
from moec.targets.coreml.library import coremltools_module

_TORCH: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "int32": torch.int32,
    "bool": torch.bool,
}
_NUMPY: Mapping[str, Any] = {"fp32": np.float32, "fp16": np.float16, "int32": np.int32, "bool": np.bool_}


HINT = "export with --dtype fp32, or use a format with fp16 scales, such as int4"


def unsupported_reason(form: CodedFormat, type_name: str) -> str:
    """Why a program that computes in the MIL type `type_name` cannot use weights of `form`; empty if it can.

    In Core ML, scales have the type of the dequantized weight.
    """
    stored = form.scale_type
    if stored.dtype.itemsize <= np.dtype(_NUMPY[type_name]).itemsize:
        return ""
    return f"its scales are {stored}, but the program computes in {type_name}"


class WeightPool:
    """The arrays of a model's weights by name, shared by all its functions.

    Functions share an entry of the weight file if their constants have the same `weight_id`. Each array is therefore
    made once, and its name is that id.

    Args:
        blank: Whether to use zeros without memory in place of all weights, for a lint.

    Attributes:
        stored_bytes: Name of an array -> its bytes in the weight file.
        matrices: Name of a weight that is stored as a whole -> name of its constant.
    """

    def __init__(self, *, blank: bool = False) -> None:
        self._blank = blank
        self._arrays: dict[str, np.ndarray] = {}
        self.stored_bytes: dict[str, int] = {}
        self.matrices: dict[str, str] = {}
        self._types = coremltools_module("coremltools.converters.mil.mil").types
        # To numpy this type is int8; the builder recognises it and stores 4 bits per element.
        self._int4 = self._types.nptype_from_builtin(self._types.int4)
        self._uint4 = self._types.nptype_from_builtin(self._types.uint4)

    def numpy_type(self, value: Any) -> Any:
        """The numpy type of a builder's value."""
        return self._types.nptype_from_builtin(value.dtype)

    def const(self, mb: Any, name: str, array: np.ndarray, label: str = "") -> Any:
        """A constant in the open block, stored once under `name`; it is called `label`, or `name` without a label."""
        kept = self._arrays.setdefault(name, array)
        value = mb.const(val=kept, name=identifier(label or name))
        # The builder may have changed the type, so the bytes follow from the type of its value.
        narrow = self._types.builtin_to_string(value.dtype) in _HALF_BYTES
        self.stored_bytes[name] = (kept.size + 1) // 2 if narrow else kept.nbytes
        if kept.size > 1:
            value.op.weight_id = name
        return value

    def array(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array called `name`; `make` computes it on first use."""
        if name not in self._arrays:
            self._arrays[name] = make()
        return self._arrays[name]

    def tensor(self, mb: Any, name: str, tensor: LazyTensor, type_name: str) -> Any:
        """A whole weight as a constant.

        Args:
            mb: The builder, inside the block that uses the weight.
            name: Name of the tensor.
            tensor: The weight. A `Quantized` is stored as codes and scales, a `Palettized` or `KeptTable` as codes and
                lookup tables.
            type_name: MIL type of the dequantized weight.

        Raises:
                RefusedError: The scales have another type than the program computes in.
        """
        self.matrices[name] = identifier(name)
        return self._stored(mb, name, tensor, type_name, None, identifier(name))

    def row(self, mb: Any, name: str, tensor: LazyTensor, type_name: str, index: int, label: str) -> Any:
        """Row `index` along axis 0 of a weight as a constant called `label`; for the other arguments, see `tensor`."""
        return self._stored(mb, f"{name}.{index}", tensor, type_name, index, label)

    def _stored(self, mb: Any, own: str, tensor: LazyTensor, type_name: str, row: int | None, label: str) -> Any:
        if isinstance(tensor, Coded) and (reason := unsupported_reason(tensor.format, type_name)):
            raise RefusedError(own, f"format {tensor.format}: {reason}", hint=HINT)
        if self._blank:
            shape = tensor.shape if row is None else tensor.shape[1:]
            return self.const(mb, own, np.broadcast_to(np.zeros((), _NUMPY[type_name]), shape), label)
        if isinstance(tensor, Quantized):
            return self._quantized(mb, own, tensor, type_name, row, label)
        if isinstance(tensor, Palettized | KeptTable):
            return self._palettized(mb, own, tensor, type_name, row, label)

        def make() -> np.ndarray:
            value = tensor.read() if row is None else tensor.rows(row, row + 1)[0]
            return np.ascontiguousarray(value.to(_TORCH[type_name]).numpy())

        return self.const(mb, own, self.array(own, make), label)

    def _quantized(self, mb: Any, own: str, tensor: Quantized, type_name: str, row: int | None, label: str) -> Any:
        """`constexpr_blockwise_shift_scale`: signed codes, with a scale and optionally an offset per block of a row."""
        codes, scales, zero_points = f"{own}.codes", f"{own}.scales", f"{own}.zero_points"
        if codes not in self._arrays:
            first, last = (0, tensor.shape[0]) if row is None else (row, row + 1)
            made = tensor.quantized_rows(first, last)
            for name, part in ((codes, made.codes), (scales, made.scales), (zero_points, made.zero_points)):
                if part is not None:
                    value = np.ascontiguousarray((part if row is None else part[0]).numpy())
                    packed = name != scales and tensor.format.bits == 4
                    self._arrays[name] = value.view(self._int4) if packed else value
        self._arrays[scales] = self._arrays[scales].astype(_NUMPY[type_name], copy=False)
        names = {"data": codes, "scale": scales, "offset": zero_points}
        operands = {
            key: self.const(mb, name, self._arrays[name], f"{label}_{key}")
            for key, name in names.items()
            if name in self._arrays
        }
        return mb.constexpr_blockwise_shift_scale(**operands, name=label)

    def _palettized(
        self, mb: Any, own: str, tensor: Palettized | KeptTable, type_name: str, row: int | None, label: str
    ) -> Any:
        """`constexpr_lut_to_dense`: unsigned codes, and lookup tables [groups, 1, entries, 1] for groups of rows.

        The table has the type of the result; its values are exact in fp16. If there are scales,
        `constexpr_blockwise_shift_scale` then multiplies the looked-up values by one scale per block.
        """
        codes, palettes, scales = f"{own}.codes", f"{own}.palettes", f"{own}.scales"
        if codes not in self._arrays:
            first, last = (0, tensor.shape[0]) if row is None else (row, row + 1)
            made = tensor.palettized_rows(first, last)
            made = made if row is None else made[0]
            table = made.palettes.numpy().astype(_NUMPY[type_name])
            self._arrays[codes] = np.ascontiguousarray(made.codes.numpy()).view(self._uint4)
            self._arrays[palettes] = np.ascontiguousarray(table[:, None, :, None])
            if made.scales is not None:
                self._arrays[scales] = np.ascontiguousarray(made.scales.numpy()).astype(_NUMPY[type_name], copy=False)
        indices = self.const(mb, codes, self._arrays[codes], f"{label}_indices")
        lut = self.const(mb, palettes, self._arrays[palettes], f"{label}_lut")
        if scales not in self._arrays:
            return mb.constexpr_lut_to_dense(indices=indices, lut=lut, name=label)
        values = mb.constexpr_lut_to_dense(indices=indices, lut=lut, name=f"{label}_values")
        scale = self.const(mb, scales, self._arrays[scales], f"{label}_scale")
        return mb.constexpr_blockwise_shift_scale(data=values, scale=scale, name=label)


_HALF_BYTES = ("int4", "uint4")


def identifier(name: str) -> str:
    """`name` as a valid MIL name: letters, digits and underscores, not starting with a digit."""
    plain = re.sub(r"\W", "_", name)
    return f"_{plain}" if plain[:1].isdigit() else plain
