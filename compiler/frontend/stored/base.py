"""Common parts of the stored formats: the tensors of one weight, the rules that find them, and unpacking integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.compiler.common.errors import CheckpointError, UnsupportedModelError
from moec.compiler.ir.weights import LazyTensor, Stored

Settings = Mapping[str, Any]
"""`quantization_config` of config.json."""


@dataclass(frozen=True)
class Parts:
    """The stored tensors that make one weight.

    Attributes:
        name: Common prefix of their names.
        tensors: Rest of the name -> tensor.
        settings: `quantization_config`.
        where: The checkpoint, for messages.
    """

    name: str
    tensors: Mapping[str, Stored]
    settings: Settings
    where: Path

    def __getitem__(self, rest: str) -> Stored:
        """A required tensor.

        Raises:
            CheckpointError: It is missing.
        """
        if rest not in self.tensors:
            found = ", ".join(sorted(f"{self.name}{other}" for other in self.tensors))
            raise CheckpointError(
                f"{self.where}: {self.name}{rest} is missing from the files; {found} cannot be decoded without it",
                hint="the checkpoint is incomplete; download it again",
            )
        return self.tensors[rest]

    def get(self, rest: str) -> Stored | None:
        """A tensor, or None if it is missing."""
        return self.tensors.get(rest)

    def expect(self, rest: str, *shapes: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = ()) -> Stored:
        """A required tensor with one of these shapes and dtypes; any shape or dtype if none is given.

        Raises:
            CheckpointError: It is missing, or has another shape or dtype.
        """
        tensor = self[rest]
        if (shapes and tensor.shape not in shapes) or (dtypes and tensor.dtype not in dtypes):
            raise self.misfit(rest)
        return tensor

    def misfit(self, rest: str) -> CheckpointError:
        """The error for a tensor that does not fit the other tensors of the weight."""
        all_of = ", ".join(
            f"{self.name}{other} {list(tensor.shape)} {tensor.entry.kind}"
            for other, tensor in sorted(self.tensors.items())
        )
        return CheckpointError(
            f"{self.where}: {self.name}{rest} does not fit the other tensors of the weight: {all_of}",
            hint="the checkpoint is damaged, or its quantization_config belongs to another one",
        )

    def unsupported(self, what: str) -> UnsupportedModelError:
        """The error for a weight that is stored in a variant that moec does not read."""
        return UnsupportedModelError(f"{self.where}: {self.name}: {what}", hint=SAVE_FLOAT)


def packed_matrices(parts: Parts) -> tuple[Stored, Stored, Stored]:
    """The matrices `qweight`, `qzeros` (packed in int32 words) and `scales` of AWQ and GPTQ.

    Raises:
        CheckpointError: One is missing, or has another dtype or rank.
    """
    qweight, qzeros = (parts.expect(rest, dtypes=(torch.int32,)) for rest in ("qweight", "qzeros"))
    scales = parts["scales"]
    if not len(qweight.shape) == len(qzeros.shape) == len(scales.shape) == 2:
        raise parts.misfit("qweight")
    return qweight, qzeros, scales


SAVE_FLOAT = "export the float checkpoint that it was quantized from, or save it dequantized"


@dataclass(frozen=True)
class Rule:
    """How the weights of a format are found and decoded.

    Attributes:
        anchor: Name suffix of the tensor by which a weight is found.
        companions: Name suffixes of the other tensors that may belong to it.
        target: Name suffix of the float weight.
        decode: Makes the float weight.
    """

    anchor: str
    companions: tuple[str, ...]
    target: str
    decode: Callable[[Parts], LazyTensor]


@dataclass(frozen=True)
class StoredFormat:
    """One way to store quantized weights.

    Attributes:
        rules: One for each form that a weight may have. A tensor that no rule finds is kept as it is.
        refuse: Settings -> why a checkpoint with them cannot be read; empty if it can.
    """

    rules: tuple[Rule, ...]
    refuse: Callable[[Settings], str] = lambda _: ""

    def decoded(self, tensors: Mapping[str, Stored], settings: Settings, where: Path) -> dict[str, LazyTensor]:
        """Replace the stored tensors of each quantized weight by the float weight.

        Raises:
            CheckpointError: Tensors of a weight are missing or do not fit together.
            UnsupportedModelError: A weight is stored in a variant that moec does not read.
        """
        rest: dict[str, LazyTensor] = dict(tensors)
        made: dict[str, LazyTensor] = {}
        for rule in self.rules:
            for name in [name for name in rest if name.endswith(rule.anchor)]:
                base = name.removesuffix(rule.anchor)
                ends = (rule.anchor, *rule.companions)
                found = {end: tensors[base + end] for end in ends if base + end in rest}
                made[base + rule.target] = rule.decode(Parts(base, found, settings, where))
                for end in found:
                    del rest[base + end]
        return rest | made


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unpack unsigned numbers of 2, 4 or 8 bits from integers along the last axis, lowest bits first.

    Args:
        words: Integers of any width, [..., W].
        bits: Bits of a number.

    Returns:
        uint8 [..., W * bits of a word / bits].
    """
    # Every machine that runs torch is little-endian.
    data = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return data
    shifts = range(0, 8, bits)
    return torch.stack([(data >> shift) & ((1 << bits) - 1) for shift in shifts], -1).flatten(-2)


def signed(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes (uint8) minus half their range, as int8."""
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
