"""Reads weights back from the constants of a package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moec.targets.coreml.executor import MilModel
from moec.targets.coreml.metadata import read_metadata
from moec.targets.coreml.package import PACKAGE
from moec.targets.stored_weights import Codes, StoredWeight, stack

if TYPE_CHECKING:
    from moec.targets.coreml.executor.constants import Constant

Find = Callable[[str], "Constant"]
"""Name of a constant -> the constant."""


def stored_weights(directory: Path) -> Mapping[str, StoredWeight]:
    """The tensors of experts and the other weights that the model's metadata names.

    Converting folds ops whose operands are constants, such as the comparison of a frequency with a border: such
    operands are not in the package.
    """
    constants, metadata = MilModel.open(directory / PACKAGE).constants(), read_metadata(directory)
    experts = {name: _experts(constants.__getitem__, pattern) for name, pattern in metadata.experts.items()}
    others = {name: constants[label] for name, label in metadata.matrices.items() if label in constants}
    return {name: _matrix(constant) for name, constant in others.items()} | experts


def _experts(find: Find, pattern: str) -> StoredWeight:
    def rows(start: int, stop: int) -> Codes | np.ndarray:
        return stack([_stored(find(pattern.format(index))) for index in range(start, stop)])

    return StoredWeight(_bits(find(pattern.format(0))), rows)


def _matrix(constant: Constant) -> StoredWeight:
    def rows(start: int, stop: int) -> Codes | np.ndarray:
        found = _stored(constant)
        return found.cut(start, stop) if isinstance(found, Codes) else found[start:stop]

    return StoredWeight(_bits(constant), rows)


def _bits(constant: Constant) -> int | None:
    return _codes_of(constant).type.element.bits if constant.parts else None


def _codes_of(constant: Constant) -> Constant:
    """The constant with the codes of a quantized constant."""
    inner = constant.parts.get("data", constant)
    return inner.parts.get("indices", inner)


def _stored(constant: Constant) -> Codes | np.ndarray:
    """The codes of a constant, with scales, a lookup table, or both; or its floats."""
    parts, bits = constant.parts, _bits(constant)
    if bits is None:
        return constant.load()
    inner = parts.get("data", constant)
    codes, offset, scale = _codes_of(constant).load(), parts.get("offset"), parts.get("scale")
    table = inner.parts["lut"].load()[:, 0, :, 0] if inner.parts else None
    if scale is None:
        return Codes(bits, codes, table=table)
    scales, zero_points = scale.load(), None if offset is None else offset.load()
    return Codes(bits, codes, scales, codes.shape[-1] // scales.shape[-1], zero_points, table)
