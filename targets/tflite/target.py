"""The TFLite target: `model.tflite` for LiteRT, with the signatures `decode` and `prefill_N`, and an IF per expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PositiveInt

from moec.compiler.common.choices import Choice
from moec.compiler.common.errors import UsageError
from moec.compiler.common.model_config import cache_length
from moec.compiler.common.progress import Progress
from moec.compiler.common.rejections import Rejection
from moec.targets import base, runners
from moec.targets.next_steps import CHAT, VALIDATE, NextStep

if TYPE_CHECKING:
    from moec.compiler.ir.interpreter import ActivationRounding
    from moec.compiler.ir.program import Program
    from moec.targets.stored_weights import StoredWeight
    from moec.targets.tflite.context import Shared
    from moec.targets.tflite.model import Model, Weight

MODEL = "model.tflite"
DEFAULT_CONTEXT = 1024


QUANTIZED = ("experts_gate_up", "experts_down", "shared_expert", "attention", "embedding", "lm_head")
"""Tensor classes that the presets quantize."""

_INT4_ROWS = "int4:channel:fp32:int8-dynamic"
_ROWS, _BLOCKS = "int8:channel:fp32:int8-dynamic", "int4:auto32:bf16:int8-dynamic"
"""The file holds scales of blocks in fp16, but XNNPACK rounds them to bf16: these scales are exact in both."""


class Flavor(Choice):
    """How experts are computed."""

    DEFAULT = "default", "one branch per expert, skipped where no token needs it"
    NO_CONTROL_FLOW = "no-control-flow", "every expert is computed, for delegates without IF"


class Runtime(Choice):
    """The runtime that the file is for and that the gates use."""

    LITERT = "litert", "the newest"
    TFLITE_RUNTIME = "tflite-runtime", "release 2.14, in a separate virtual environment and with fewer formats"


class TfliteOptions(base.TargetOptions):
    """Options of the TFLite target."""

    flavor: Flavor = Field(Flavor.DEFAULT, description=Flavor.meanings())
    runtime: Runtime = Field(Runtime.LITERT, description=Runtime.meanings())
    prefill: tuple[PositiveInt, ...] = Field(
        (128,), description="prompt lengths to build signatures for; each costs memory when the file is loaded"
    )
    bundle: bool = Field(False, description="also write model.litertlm for LiteRT-LM: the model with its tokenizer")
    context: PositiveInt | None = Field(
        None, description=f"tokens that the KV cache holds (default: the model's context, at most {DEFAULT_CONTEXT})"
    )


class TfliteTarget(base.Target):
    """Lowers to LiteRT."""

    name: ClassVar[str] = "tflite"
    Options: ClassVar[type[base.TargetOptions]] = TfliteOptions
    extra: ClassVar[str | None] = "tflite"
    modules: ClassVar[tuple[str, ...]] = ("ai_edge_litert", "flatbuffers")
    tools: ClassVar[tuple[str, ...]] = ("ai-edge-litert", "flatbuffers", "litert-lm-builder")
    takes_embeddings: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "int8": dict.fromkeys(QUANTIZED, _ROWS),
        # LiteRT looks up embeddings with one scale per row only, and lm_head is as sensitive to 4 bits.
        "int4": {name: _ROWS if name in {"embedding", "lm_head"} else _BLOCKS for name in QUANTIZED},
    }
    scale_types: ClassVar[frozenset[str]] = frozenset({"fp16", "bf16", "fp32"})
    state_kinds: ClassVar[frozenset[str]] = frozenset({"key", "value", "index_key", "conv", "recurrent"})
    next_steps: ClassVar[tuple[NextStep, ...]] = (
        CHAT,
        VALIDATE,
        NextStep(f"adb push {{directory}}/{MODEL} /data/local/tmp/", "copies it to an Android device"),
    )

    def auto_formats(self, options: base.TargetOptions, tensor_class: str) -> tuple[str, ...]:
        """The formats of the presets and larger blocks; for tflite-runtime, those with float activations."""
        assert isinstance(options, TfliteOptions)
        if options.runtime is Runtime.TFLITE_RUNTIME:
            return ("int8:channel",)
        if self.presets["int4"][tensor_class] == _ROWS:
            return (_ROWS,)
        return (*(_BLOCKS.replace(":auto32:", f":{size}:") for size in (128, 64, 32)), _ROWS)

    def kept_formats(self, options: base.TargetOptions, tensor_class: str, dtype: str) -> tuple[str, ...]:  # noqa: ARG002
        """4-bit formats only: LiteRT's int8 kernels do not take -128, which occurs in codes of other tools."""
        blocks = tuple(form for form in self.auto_formats(options, tensor_class) if form.startswith("int4"))
        return (*blocks, _INT4_ROWS) if blocks else ()

    def capabilities(self, options: base.TargetOptions, phase: base.Phase) -> base.Capabilities:
        """Decode skips experts that its token does not need, prefill those that no token of the piece needs."""
        assert isinstance(options, TfliteOptions)
        if options.flavor is Flavor.NO_CONTROL_FLOW:
            return base.Capabilities(skips_experts=False, reason="the flavor no-control-flow computes every expert")
        if phase is base.Phase.PREFILL:
            return base.Capabilities(
                skips_experts=False,
                reason="an expert that one token of a piece needs is computed for all its tokens",
            )
        return base.Capabilities(skips_experts=True)

    def check(self, options: base.TargetOptions, config: Mapping[str, Any]) -> None:
        """Refuse a KV cache that is longer than the model's context or shorter than a prompt; see `Target.check`."""
        assert isinstance(options, TfliteOptions)
        super().check(options, config)
        _capacity(config, options)

    def lint(self, program: Program, options: base.TargetOptions) -> tuple[Rejection, ...]:
        """What lowering refuses and, with --bundle, states and inputs that LiteRT-LM does not support."""
        from moec.targets.common.refusals import refused_by, unsupported_formats, unsupported_ops
        from moec.targets.tflite.lower import computed
        from moec.targets.tflite.lowerings.table import TABLE
        from moec.targets.tflite.weights import HINT, unsupported_reason

        assert isinstance(options, TfliteOptions)
        found = (
            *unsupported_ops(self.name, TABLE, computed(program)),
            *unsupported_formats(self.name, program, lambda own: unsupported_reason(own.format, own.shape[-1]), HINT),
        )
        if options.bundle and program.replaced:
            state = program.replaced[0]
            reason = f"LiteRT-LM (--bundle) supports only KV caches, not states of kind {state.kind}"
            found += (Rejection(self.name, f"layer {state.layer}", reason, "export without --bundle"),)
        if options.bundle:
            reason = "LiteRT-LM (--bundle) does not feed such an input"
            added = program.input_defaults
            found += tuple(
                Rejection(self.name, f"input {name}", reason, "export without it or without --bundle") for name in added
            )
        return found or refused_by(self.name, lambda: _build(program, options))

    def lower(self, program: Program, options: base.TargetOptions, directory: Path, progress: Progress) -> base.Lowered:
        """Write `model.tflite`."""
        from moec.targets.tflite import lower
        from moec.targets.tflite.writer import write

        assert isinstance(options, TfliteOptions)
        model, shared = _build(program, options)
        write(model, directory / MODEL, progress)
        counts: dict[str, int] = {}
        for graph in model.graphs():
            for operator in graph.operators:
                counts[operator.name] = counts.get(operator.name, 0) + 1
        facts = {
            "context": _capacity(program.config, options),
            "prefill_lengths": list(_lengths(options)[1:]),
            "subgraphs": len(model.graphs()),
            "ops": dict(sorted(counts.items())),
            "expert_tensor_bytes": _expert_bytes(model.weights(), shared.experts),
            **_to_call(program),
        }
        return base.Lowered((MODEL,), lower.signature(program, model), tuple(shared.rejections), facts)

    def package(self, options: base.TargetOptions, directory: Path) -> tuple[str, ...]:
        """Write the bundle if `bundle` is set."""
        from moec.targets.tflite.bundle import write_bundle
        from moec.targets.tflite.reader import TfliteFile

        assert isinstance(options, TfliteOptions)
        if not options.bundle:
            return ()
        return (write_bundle(directory, MODEL, int(TfliteFile(directory / MODEL).facts["capacity"])),)

    def open(self, directory: Path, *, threads: int = 0) -> runners.Runner:
        """Open the artifact on CPU with the runtime that it was built for."""
        from moec.targets.tflite.runner import TfliteRunner

        return TfliteRunner(directory / MODEL, threads=threads)

    def open_experts(self, directory: Path, *, threads: int = 0) -> Mapping[str, base.ExpertsRunner]:
        """The experts of each signature, layer by layer, in LiteRT."""
        from moec.targets.tflite.experts import open_experts

        return open_experts(directory / MODEL, threads)

    def activation_rounding(self, directory: Path) -> ActivationRounding:  # noqa: ARG002
        """XNNPACK's rounding of activations to int8, with a range per row."""
        from moec.quantize.activations import round_rows_to_int8

        return round_rows_to_int8

    def stored_weights(self, directory: Path) -> Mapping[str, StoredWeight]:
        """Weights as read back from the file, whose tensors have the Program's names."""
        from moec.targets.tflite.reader import TfliteFile

        return TfliteFile(directory / MODEL).stored_weights()

    def doctor(self) -> Mapping[str, str]:
        """Build, run and measure all work where LiteRT is installed.

        Raises:
            MissingExtraError: LiteRT is not installed.
        """
        from moec.targets.tflite.library import module

        for name in ("ai_edge_litert.interpreter", "flatbuffers"):
            module(name)
        return super().doctor()


def _build(program: Program, options: TfliteOptions) -> tuple[Model, Shared]:
    """The model, without reading its weights.

    Raises:
        LoweringError: An op or a weight's format is not supported.
    """
    from moec.targets.tflite import lower

    return lower.build(
        program,
        lengths=_lengths(options),
        capacity=_capacity(program.config, options),
        branches=options.flavor is not Flavor.NO_CONTROL_FLOW,
        legacy=options.runtime is Runtime.TFLITE_RUNTIME,
    )


def _lengths(options: TfliteOptions) -> tuple[int, ...]:
    """Tokens per step of each signature, `decode` first."""
    return (1, *sorted({length for length in options.prefill if length > 1}))


def _to_call(program: Program) -> dict[str, Any]:
    """What an app must know beyond names and shapes to call the model; empty for most models.

    `inputs` are the defaults of added inputs, `rotary_borders` the lengths that the padding of a prompt must not cross.
    """
    from moec.targets.common.added_inputs import default_values

    facts = {"inputs": default_values(program), "rotary_borders": list(program.rotary_borders)}
    return {name: value for name, value in facts.items() if value}


def _capacity(config: Mapping[str, Any], options: TfliteOptions) -> int:
    """Slots of the KV cache.

    Raises:
        UsageError: The cache is longer than the model's context, or shorter than a prefill signature.
    """
    capacity = cache_length(config, options.context, DEFAULT_CONTEXT)
    longest = max(options.prefill, default=1)
    if longest > capacity:
        raise UsageError(
            f"--prefill {longest} is longer than the KV cache of {capacity} tokens",
            hint=f"use a --prefill of at most {capacity}, or a larger --context",
        )
    return capacity


def _expert_bytes(weights: Sequence[Weight], experts: Mapping[str, object]) -> dict[str, int]:
    """Program name of an expert tensor -> bytes of its codes and scales in the file."""
    found = dict.fromkeys(experts, 0)
    for weight in weights:
        name, _, index = weight.name.rpartition(".")
        if name in found and index.isdigit():
            found[name] += weight.total_bytes
    return found
