"""The ONNX target: `model.onnx` with external data, for ONNX Runtime and, with `--flavor portable`, any runtime."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from moec.compiler.common.errors import LoweringError
from moec.compiler.common.progress import Progress
from moec.compiler.common.rejections import Rejection
from moec.targets.base import (
    ASYMMETRIC,
    BY_ROW,
    SYMMETRIC,
    Capabilities,
    ExpertReader,
    ExpertsRunner,
    Lowered,
    Phase,
    Runner,
    Target,
    TargetOptions,
)

if TYPE_CHECKING:
    from moec.compiler.ir.program import Program
    from moec.targets.onnx.context import Dialect


class Flavor(StrEnum):
    """Dialects of the model."""

    DEFAULT = "default"
    GENAI = "genai"
    PORTABLE = "portable"


class Experts(StrEnum):
    """Forms of experts in floating point."""

    AUTO = "auto"
    KERNEL = "kernel"
    GROUPED = "grouped"


MOST_GROUPED = 2048
"""Experts in all layers up to which products of their own pay: each costs the graph two nodes."""


EXPERT_CLASSES = ("experts_gate_up", "experts_down")


class OnnxOptions(TargetOptions):
    """Options of the ONNX target."""

    flavor: Flavor = Field(
        Flavor.DEFAULT,
        description="default: ONNX Runtime's fused kernels; genai: for onnxruntime-genai, past and present in one "
        "buffer; portable: standard opset 24 only",
    )
    experts: Experts = Field(
        Experts.AUTO,
        description="experts in floating point. kernel: ONNX Runtime's MoE, a small graph; grouped: two products each "
        f"over its own tokens, a faster prefill; auto: grouped in float32 up to {MOST_GROUPED} experts in all",
    )


class OnnxTarget(Target):
    """Lowers to ONNX."""

    name: ClassVar[str] = "onnx"
    Options: ClassVar[type[TargetOptions]] = OnnxOptions
    tools: ClassVar[tuple[str, ...]] = ("onnx-ir", "onnx", "onnxruntime")
    state_kinds: ClassVar[frozenset[str]] = frozenset({"key", "value", "conv"})
    takes_embeddings: ClassVar[bool] = True

    def capabilities(self, options: TargetOptions, phase: Phase) -> Capabilities:  # noqa: ARG002
        """Every flavor skips: the MoE kernels drop slots of weight 0, and so do the Ifs of the portable one."""
        return Capabilities(skips_experts=True)

    def lint(self, program: Program, options: TargetOptions) -> tuple[Rejection, ...]:
        """Ops that have no lowering, what the flavor cannot express, and whatever else lowering refuses.

        The last is found by lowering itself, of which only the writing of weights takes time.
        """
        from moec.targets.onnx import lower
        from moec.targets.onnx.lowerings import experts, group_query, quantized
        from moec.targets.onnx.lowerings.table import TABLE

        assert isinstance(options, OnnxOptions)
        portable = options.flavor is Flavor.PORTABLE
        refused = group_query.refusals(program) if options.flavor is Flavor.GENAI else ()
        refused += experts.refusals(program, contrib=not portable)
        if not portable:
            refused += quantized.refusals(program)
        refused += tuple(
            Rejection(self.name, str(node.meta.get("module", "")), f"no lowering for {node.target}")
            for node in program.graph.nodes
            if node.op == "call_function" and node.target not in TABLE
        )
        if refused:
            return refused
        try:
            lower.build(program, _dialect(program, options))
        except LoweringError as error:
            where, _, reason = str(error).partition(": ")
            return (Rejection(self.name, where, reason),)
        return ()

    def auto_formats(self, options: TargetOptions, tensor_class: str) -> tuple[str, ...]:
        """ONNX Runtime's kernels take zero points; the standard form has none, and none for experts."""
        assert isinstance(options, OnnxOptions)
        if options.flavor is not Flavor.PORTABLE:
            return SYMMETRIC + ASYMMETRIC
        return () if tensor_class in EXPERT_CLASSES else SYMMETRIC

    def kept_formats(self, options: TargetOptions, tensor_class: str) -> tuple[str, ...]:
        """One scale for a row is written as blocks of equal scales."""
        formats = self.auto_formats(options, tensor_class)
        asymmetric = tuple(f"{form}:asym" for form in BY_ROW if form.startswith("int4") and ASYMMETRIC[0] in formats)
        return (*formats, *BY_ROW, *asymmetric)

    def lower(self, program: Program, options: TargetOptions, directory: Path, progress: Progress) -> Lowered:
        """Write `model.onnx`, `model.onnx_data` and, for onnxruntime-genai, `genai_config.json`."""
        from moec.targets.onnx import genai, lower
        from moec.targets.onnx.lowerings.group_query import refusals

        assert isinstance(options, OnnxOptions)
        shared = options.flavor is Flavor.GENAI
        if shared and (refused := refusals(program)):
            raise LoweringError(f"{refused[0].where}: {refused[0].reason}", hint="take the default flavor")
        dialect = _dialect(program, options)
        model, ctx = lower.build(program, dialect)
        counts: dict[str, int] = {}
        for node in model.graph.all_nodes():
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
        lower.write(model, ctx, directory, progress)
        if shared:
            genai.write(program, lower.MODEL, directory)
        return Lowered(
            (lower.MODEL, lower.DATA, *((genai.CONFIG,) if shared else ())),
            lower.signature(program),
            tuple(ctx.rejections),
            {
                "opset": dialect.opset,
                "ops": dict(sorted(counts.items())),
                "expert_tensor_bytes": {name: ctx.bytes_of(name) for name in sorted(ctx.experts)},
            },
        )

    def package(self, options: TargetOptions, directory: Path) -> tuple[str, ...]:
        """Complete `genai_config.json` by what the model's own configs say of tokens and of how they are chosen."""
        from moec.targets.onnx import genai

        assert isinstance(options, OnnxOptions)
        if options.flavor is Flavor.GENAI:
            genai.complete(directory)
        return ()

    def open(self, directory: Path, *, threads: int = 0) -> Runner:
        """Open with ONNX Runtime on CPU."""
        from moec.targets.onnx.runner import OnnxRunner

        return OnnxRunner(directory, threads=threads)

    def open_experts(self, directory: Path, *, threads: int = 0) -> Mapping[str, ExpertsRunner]:
        """A cut of `model.onnx` at the operands of each layer's experts."""
        from moec.targets.onnx.experts import MODEL, OnnxExperts

        return {MODEL: OnnxExperts(directory, threads=threads)}

    def expert_tensors(self, directory: Path) -> Mapping[str, ExpertReader]:
        """Read the experts back from the files, in the layout of the Program."""
        import onnx_ir as ir

        model = ir.load(directory / "model.onnx")
        table = json.loads(model.metadata_props["moec.experts"])
        return {name: _reader(model.graph.initializers, entry) for name, entry in table.items()}


def _dialect(program: Program, options: OnnxOptions) -> Dialect:
    from moec.targets.onnx.lowerings.table import onnx_dialect

    contrib, shared = options.flavor is not Flavor.PORTABLE, options.flavor is Flavor.GENAI
    return onnx_dialect(contrib=contrib, shared_buffer=shared, grouped=_grouped(program, options))


def _grouped(program: Program, options: OnnxOptions) -> bool:
    import torch

    if options.experts is Experts.AUTO:
        return program.dtype is torch.float32 and sum(layer.num_experts for layer in program.layers) <= MOST_GROUPED
    return options.experts is Experts.GROUPED


def _reader(initializers: Mapping[str, object], entry: Mapping[str, object]) -> ExpertReader:
    def values(name: str) -> np.ndarray:
        return initializers[name].const_value.numpy()  # type: ignore[attr-defined, no-any-return]

    def read(index: int) -> np.ndarray:
        if "quantized" in entry:
            value = _dequantized(values, entry, index)
            if entry["interleaved"]:
                value = np.concatenate([value[0::2], value[1::2]])
        elif "per_expert" in entry:
            value = values(str(entry["per_expert"]).format(index))
        else:
            value = values(str(entry["initializer"]))[index]
            if entry["interleaved"]:
                value = np.concatenate([value[0::2], value[1::2]])
        return np.ascontiguousarray(value.T) if entry["transposed"] else np.asarray(value)

    return read


_PAIRS = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=-1).astype(np.float32)
"""The two codes of four bits that a byte holds, [256, 2]."""


def _dequantized(values: Callable[[str], np.ndarray], entry: Mapping[str, object], index: int) -> np.ndarray:
    """One expert [N, K] float32 from its packed codes, scales and zero points."""
    name, bits, signed = str(entry["quantized"]), int(str(entry["bits"])), bool(entry.get("signed"))
    codes, scales = values(f"{name}.codes")[index], values(f"{name}.scales")[index].astype(np.float32)
    packed = bits == 4 and not signed
    steps = _PAIRS.take(codes, axis=0).reshape(len(codes), -1) if packed else codes.astype(np.float32)
    points = np.full(scales.shape, 0 if signed else 1 << (bits - 1), np.float32)
    if not entry["symmetric"]:
        points = _PAIRS[values(f"{name}.zero_points")[index]].reshape(len(scales), -1)[:, : scales.shape[1]]
    rows, columns = steps.shape
    block = int(str(entry.get("block", columns // scales.shape[1])))
    if short := scales.shape[1] * block - columns:  # the last block of a row
        steps = np.pad(steps, ((0, 0), (0, short)))
    groups = steps.reshape(rows, -1, block)
    groups -= points[:, :, None]
    groups *= scales[:, :, None]
    result: np.ndarray = groups.reshape(rows, -1)[:, :columns]
    return result
