"""The TensorRT target: `model.onnx` in operators that TensorRT supports, and an engine built from it without a GPU."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from moec.compiler.common.choices import Choice
from moec.compiler.common.errors import LoweringError
from moec.compiler.common.model_config import cache_length
from moec.compiler.common.progress import Progress
from moec.compiler.common.rejections import Rejection
from moec.targets import base, runners
from moec.targets.common.added_inputs import default_values, row_widths
from moec.targets.next_steps import CHAT, VALIDATE, NextStep
from moec.targets.tensorrt import builder
from moec.targets.tensorrt.capability import DEFAULT, parse
from moec.targets.tensorrt.forms import ExpertShape, Form, choose
from moec.targets.tensorrt.library import CLASSIC, RTX, Library, module_name, version
from moec.targets.tensorrt.settings import ADDED_INPUTS, EngineSettings
from moec.targets.tensorrt.settings import FILE as SETTINGS

if TYPE_CHECKING:
    import onnx_ir as ir

    from moec.compiler.ir.program import Program
    from moec.compiler.ir.weights import LazyTensor
    from moec.targets.onnx.context import Context
    from moec.targets.stored_weights import StoredWeight
    from moec.targets.tensorrt.build import Failure
    from moec.targets.tensorrt.profiles import Sizes

DEFAULT_CONTEXT = 1024


class AttentionForm(Choice):
    """How attention is expressed in ONNX."""

    DECOMPOSED = "decomposed", "elementary ops"
    FUSED = "fused", "the ONNX op Attention, fp16 only"


class TensorrtOptions(base.TargetOptions):
    """Options of the TensorRT target."""

    compute_capability: tuple[str, ...] = Field(
        DEFAULT, description="GPUs that the engine is for, such as 8.6,8.9,12.0; RTX engines do not support 9.0"
    )
    experts: Form = Field(Form.AUTO, description=Form.meanings())
    attention: AttentionForm = Field(AttentionForm.DECOMPOSED, description=AttentionForm.meanings())
    opset: int = Field(24, description="ONNX opset; from 23 on, norms and rotary embeddings are single ops")
    batch: PositiveInt = Field(1, description="maximum number of sequences at once")
    prompt: PositiveInt = Field(128, description="tokens of a typical prompt, for which prefill is optimised")
    piece: PositiveInt = Field(512, description="maximum number of tokens of one prefill step")
    context: PositiveInt | None = Field(
        None, description=f"tokens that the KV cache holds (default: the model's context, at most {DEFAULT_CONTEXT})"
    )
    workspace: int = Field(0, ge=0, description="maximum scratch memory on the GPU in MiB; 0: TensorRT decides")
    weight_streaming: bool = Field(False, description="keep weights in host memory if they do not fit on the GPU")
    library: Library = Field(
        Library.AUTO, description="rtx builds without a GPU; classic builds for the GPU of this machine"
    )
    engine: bool = Field(True, description="build the engine, or only write model.onnx and a script that builds it")
    timing_cache: Path | None = Field(None, exclude=True, description="timing cache to use and update (classic only)")
    memory_limit: PositiveFloat | None = Field(
        None, exclude=True, description="maximum memory for building, in GB (default: the free memory)"
    )

    @field_validator("compute_capability")
    @classmethod
    def _known(cls, wanted: tuple[str, ...]) -> tuple[str, ...]:
        return parse(wanted)


class TensorrtTarget(base.Target):
    """Lowers to an ONNX model and a TensorRT engine."""

    name: ClassVar[str] = "tensorrt"
    Options: ClassVar[type[base.TargetOptions]] = TensorrtOptions
    extra: ClassVar[str | None] = "tensorrt"
    tools: ClassVar[tuple[str, ...]] = ("tensorrt-rtx", "onnx-ir", "onnx", "onnxruntime")
    takes_embeddings: ClassVar[bool] = True
    state_kinds: ClassVar[frozenset[str]] = frozenset({"key", "value", "index_key", "conv", "recurrent"})
    next_steps: ClassVar[tuple[NextStep, ...]] = (
        NextStep("moec doctor", "shows whether this machine has a GPU and a driver that run the engine"),
        dataclasses.replace(VALIDATE, does="runs the gates on the engine, on the machine with the GPU"),
        CHAT,
    )

    def capabilities(self, options: base.TargetOptions, phase: base.Phase) -> base.Capabilities:
        """`loop-if` skips experts that no token of a step uses; the other forms skip nothing."""
        assert isinstance(options, TensorrtOptions)
        if options.experts in (Form.GATHER, Form.DENSE):
            return base.Capabilities(skips_experts=False, reason=f"the form {options.experts} computes every slot")
        if phase is base.Phase.PREFILL:
            reason = "an expert that one token of a step needs is computed for all its tokens"
            return base.Capabilities(skips_experts=False, reason=reason)
        return base.Capabilities(skips_experts=True)

    def check(self, options: base.TargetOptions, config: Mapping[str, Any]) -> None:
        """Refuse a KV cache longer than the model's context, or a missing library; see `Target.check`."""
        assert isinstance(options, TensorrtOptions)
        if options.engine:
            module_name(options.library)
        _sizes(config, options)

    def kept_formats(self, options: base.TargetOptions, tensor_class: str, dtype: str) -> tuple[str, ...]:  # noqa: ARG002
        """Scales are stored in their own dtype and cast in the graph."""
        return base.with_scales("fp32", self.auto_formats(options, tensor_class))

    def lint(self, program: Program, options: base.TargetOptions) -> tuple[Rejection, ...]:
        """Opsets and ops that the parser does not support, types that GPUs lack, and what lowering refuses."""
        from moec.targets.common.refusals import refused_by
        from moec.targets.tensorrt.lowerings.table import tensorrt_dialect
        from moec.targets.tensorrt.program_lint import check_program

        assert isinstance(options, TensorrtOptions)
        found = check_program(program, options, tensorrt_dialect(Form.LOOP_IF, options.opset).table)
        return found or refused_by(self.name, lambda: _build(program, options))

    def lower(self, program: Program, options: base.TargetOptions, directory: Path, progress: Progress) -> base.Lowered:
        """Write `model.onnx`, `tensorrt.json`, `build_engine.py` and the engine.

        Raises:
            LoweringError: A rule, the parser or the builder refuses the model, or memory does not suffice.
            MissingExtraError: TensorRT is not installed.
        """
        from moec.targets.onnx import lower
        from moec.targets.onnx.files import MODEL
        from moec.targets.tensorrt import build

        assert isinstance(options, TensorrtOptions)
        model, ctx, form = _build(program, options)
        settings = make_settings(program, options, form)
        added = {"input_defaults": settings.input_defaults, "token_inputs": settings.token_inputs}
        model.metadata_props[ADDED_INPUTS] = json.dumps(added)
        data = lower.write(model, ctx, directory / MODEL, progress)
        settings.write(directory)
        shutil.copyfile(builder.__file__, directory / build.SCRIPT)
        files = [MODEL, *data, SETTINGS, build.SCRIPT]
        if options.engine:
            limit = build.memory_limit(options.memory_limit)
            settings = build_engine(directory, settings, options, ctx, limit, progress)
            files.append(builder.ENGINES[settings.library])
        return base.Lowered(
            tuple(files),
            lower.signature(program, defaults=False),
            tuple(ctx.rejections),
            _facts(model, ctx, settings, form),
        )

    def open(self, directory: Path, *, threads: int = 0) -> runners.Runner:
        """Open the engine on a GPU that it was built for; without one, `model.onnx`."""
        from moec.targets.tensorrt.engine import open_engine, why_engine_cannot_run

        if why_engine_cannot_run(EngineSettings.read(directory)):
            return self.open_reference(directory, threads=threads)
        return open_engine(directory)

    def open_reference(self, directory: Path, *, threads: int = 0) -> runners.Runner:
        """Open `model.onnx` with ONNX Runtime on CPU."""
        from moec.targets.tensorrt.runner import TwinRunner

        return TwinRunner(directory, threads=threads)

    def gates(self) -> tuple[base.TargetGate, ...]:
        """The gates of the engine: its contents and its execution."""
        from moec.targets.tensorrt.gates import GATES

        return GATES

    def open_experts(self, directory: Path, *, threads: int = 0) -> Mapping[str, base.ExpertsRunner]:
        """The experts of each layer as a subgraph of `model.onnx`, from which the engine was built."""
        from moec.targets.onnx.experts import OnnxExperts
        from moec.targets.onnx.files import MODEL

        return {MODEL: OnnxExperts(directory, threads=threads)}

    def stored_weights(self, directory: Path) -> Mapping[str, StoredWeight]:
        """Weights as read back from `model.onnx`, by the table in its metadata."""
        from moec.targets.onnx.stored import stored_weights

        return stored_weights(directory)

    def doctor(self) -> Mapping[str, str]:
        """What the installed libraries, the driver and the GPU allow."""
        from moec.targets.tensorrt.doctor import findings

        return findings()


def _build(program: Program, options: TensorrtOptions) -> tuple[ir.Model, Context, Form]:
    """The model, without reading its weights, and the form of its experts.

    Raises:
        LoweringError: The model breaks a rule, or memory will not suffice for building the engine.
    """
    from moec.targets.common.refusals import RefusedError
    from moec.targets.onnx import lower
    from moec.targets.tensorrt import build, lint
    from moec.targets.tensorrt.lowerings.table import tensorrt_dialect

    form = choose_form(program, options)
    fused = options.attention is AttentionForm.FUSED
    model, ctx = lower.build(program, tensorrt_dialect(form, options.opset, fused=fused))
    if broken := lint.check(model, ctx.origins):
        raise RefusedError(broken[0].where, broken[0].reason, hint="docs/tensorrt.md lists the rules")
    if options.engine:
        weights = sum(tensor.nbytes for _, tensor in ctx.initializers.values())
        build.check_memory(weights, build.memory_limit(options.memory_limit))
    return model, ctx, form


def choose_form(program: Program, options: TensorrtOptions) -> Form:
    """The form of the experts in the options or, for "auto", the one that moves the fewest bytes."""
    from moec.compiler.ir.program import SELECT

    shapes = []
    for layer in program.layers:
        stored = (program.weights[name] for name in (layer.gate_up_proj, layer.down_proj))
        shapes.append(ExpertShape(layer.num_experts, layer.top_k, sum(_bytes(t) for t in stored) // layer.num_experts))
    return choose(options.experts, shapes, options.batch, options.prompt, dynamic=bool(program.nodes(SELECT)))


def _bytes(tensor: LazyTensor) -> int:
    from moec.quantize.lazy import Coded

    return tensor.format.planned_bytes(tensor.shape) if isinstance(tensor, Coded) else tensor.nbytes


def make_settings(program: Program, options: TensorrtOptions, form: Form) -> EngineSettings:
    """The contents of `tensorrt.json`, by which `build_engine.py` builds the engine.

    Raises:
        UsageError: The sizes of the profiles contradict each other or the model.
    """
    from moec.targets.onnx.files import MODEL
    from moec.targets.onnx.lower import signature
    from moec.targets.tensorrt.profiles import profiles, trtexec

    sizes = _sizes(program.config, options)
    made = profiles(signature(program, defaults=False), sizes)
    module = module_name(options.library) if options.engine else RTX
    return EngineSettings(
        onnx=MODEL,
        library=module,
        library_version=version(module.replace("_", "-")) if options.engine else "",
        engine=builder.ENGINES[module] if options.engine else None,
        compute_capabilities=options.compute_capability,
        experts=form.value,
        batch=sizes.batch,
        context=sizes.context,
        piece=sizes.piece,
        workspace_mib=options.workspace,
        weight_streaming=options.weight_streaming,
        input_defaults=default_values(program),
        token_inputs=row_widths(program),
        profiles=made,
        trtexec=trtexec(MODEL, builder.ENGINES[CLASSIC], made),
    )


def _sizes(config: Mapping[str, Any], options: TensorrtOptions) -> Sizes:
    from moec.targets.tensorrt.profiles import Sizes

    context = cache_length(config, options.context, DEFAULT_CONTEXT)
    piece = min(options.piece, context)
    return Sizes(options.batch, context, min(options.prompt, piece), piece)


def build_engine(
    directory: Path, settings: EngineSettings, options: TensorrtOptions, ctx: Context, limit: int, progress: Progress
) -> EngineSettings:
    """Build the engine, and write and return `settings` with facts about it.

    Raises:
        LoweringError: The parser or the builder failed; the message names the op and its module, if known.
    """
    from moec.targets.tensorrt import build

    name = builder.ENGINES[settings.library]
    built = build.run(directory, settings.library, name, limit=limit, cache=options.timing_cache, progress=progress)
    if built.failure is not None:
        raise _refused(built.failure, ctx)
    settings = settings.model_copy(update={"built": built.found})
    settings.write(directory)
    return settings


def _refused(failure: Failure, ctx: Context) -> LoweringError:
    where = ctx.origins.get(failure.node, "")
    op = f"{failure.operator}: " if failure.operator else ""
    reason = failure.message.splitlines()[0] if failure.message else "no reason given"
    stage = "parser" if failure.stage == "parse" else "builder"
    return LoweringError(
        f"{where + ': ' if where else ''}{op}TensorRT's {stage} failed: {reason}",
        hint="try other values of --experts, --attention or --opset; see docs/tensorrt.md",
    )


def _weights(ctx: Context) -> dict[str, int]:
    """Bytes of all weights in the file, and numbers of int8 and int4 values."""
    kinds = {"INT8": "Int8", "INT4": "Int4"}
    counts = {"bytes": sum(tensor.nbytes for _, tensor in ctx.initializers.values())}
    for value, _ in ctx.initializers.values():
        kind = None if value.dtype is None else kinds.get(value.dtype.name)
        if kind is not None and value.shape is not None:
            counts[kind] = counts.get(kind, 0) + math.prod(int(size) for size in value.shape.numpy())
    return counts


def _facts(model: ir.Model, ctx: Context, settings: EngineSettings, form: Form) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for node in model.graph.all_nodes():
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return {
        "opset": model.opset_imports[""],
        "experts": form.value,
        "compute_capabilities": list(settings.compute_capabilities),
        "ops": dict(sorted(counts.items())),
        "expert_tensor_bytes": {name: ctx.bytes_of(name) for name in sorted(ctx.experts)},
        "weights": _weights(ctx),
        **({} if settings.built is None else {"engine": settings.built.to_json()}),
    }
