"""The ONNX target: `model.onnx` with external data, for ONNX Runtime and, with `--flavor portable`, any runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from moec.compiler.common.choices import Choice
from moec.compiler.common.errors import UsageError
from moec.compiler.common.progress import Progress
from moec.compiler.common.rejections import Rejection
from moec.targets import base, paging, runners

if TYPE_CHECKING:
    from moec.compiler.ir.interpreter import ActivationRounding
    from moec.compiler.ir.program import Program
    from moec.targets.onnx.context import Dialect
    from moec.targets.stored_weights import StoredWeight


MAX_GROUPED_EXPERTS = 2048
"""Number of experts in all layers up to which grouped experts pay off: each adds two nodes to the graph."""


class Flavor(Choice):
    """Dialects of the model."""

    DEFAULT = "default", "ONNX Runtime's fused kernels"
    GENAI = "genai", "for onnxruntime-genai, past and present in one buffer"
    PORTABLE = "portable", "standard opset 24 only"
    WEB = "web", "for browsers: ONNX Runtime web, transformers.js"


class Experts(Choice):
    """How float experts are computed."""

    KERNEL = "kernel", "ONNX Runtime's MoE, a small graph"
    GROUPED = "grouped", "two matrix products per expert over its own tokens, a faster prefill"
    AUTO = "auto", f"grouped in float32 up to {MAX_GROUPED_EXPERTS} experts in all"


class Provider(Choice):
    """Execution providers that `genai_config.json` can name; the values are onnxruntime-genai's spelling."""

    CPU = "cpu", "none is named"
    CUDA = "cuda", "NVIDIA GPUs"
    DML = "dml", "DirectML"
    WEBGPU = "webgpu", "WebGPU"
    OPENVINO = "openvino", "Intel"
    QNN = "qnn", "Qualcomm"
    VITISAI = "vitisai", "AMD"
    TENSORRT_RTX = "nvtensorrtrtx", "TensorRT-RTX"


EXPERT_CLASSES = ("experts_gate_up", "experts_down")


class OnnxOptions(base.TargetOptions):
    """Options of the ONNX target."""

    flavor: Flavor = Field(Flavor.DEFAULT, description=Flavor.meanings())
    experts: Experts = Field(Experts.AUTO, description=f"experts in floating point. {Experts.meanings()}")
    provider: Provider = Field(
        Provider.CPU,
        description="execution provider that genai_config.json names (--flavor genai); gates run on the CPU. "
        f"{Provider.meanings()}",
    )

    routing_outputs: bool = Field(
        False, description="also return the experts of each token and their weights; moec serve counts them"
    )


class OnnxTarget(base.Target):
    """Lowers to ONNX."""

    name: ClassVar[str] = "onnx"
    Options: ClassVar[type[base.TargetOptions]] = OnnxOptions
    tools: ClassVar[tuple[str, ...]] = ("onnx-ir", "onnx", "onnxruntime")
    state_kinds: ClassVar[frozenset[str]] = frozenset({"key", "value", "index_key", "conv", "recurrent"})
    takes_embeddings: ClassVar[bool] = True

    def capabilities(self, options: base.TargetOptions, phase: base.Phase) -> base.Capabilities:  # noqa: ARG002
        """Every flavor skips experts: the MoE kernels drop slots of weight 0, and so does the form in standard ops."""
        return base.Capabilities(skips_experts=True)

    def check(self, options: base.TargetOptions, config: Mapping[str, Any]) -> None:
        """Refuse an execution provider that no file would name; see `Target.check`."""
        assert isinstance(options, OnnxOptions)
        super().check(options, config)
        if options.provider is not Provider.CPU and options.flavor is not Flavor.GENAI:
            raise UsageError(
                f"--provider {options.provider}: only the flavor genai has a file that names it",
                hint="add --flavor genai, or choose the provider where the artifact is run",
            )

    def lint(self, program: Program, options: base.TargetOptions) -> tuple[Rejection, ...]:
        """Ops without a lowering and what the flavor cannot express; else the first thing that the lowering refuses."""
        from moec.targets.common.refusals import refused_by, unsupported_ops
        from moec.targets.onnx import lower
        from moec.targets.onnx.lowerings import experts, group_query
        from moec.targets.onnx.lowerings.table import TABLE

        assert isinstance(options, OnnxOptions)
        portable = options.flavor is Flavor.PORTABLE
        refused = group_query.refusals(program) if options.flavor is Flavor.GENAI else ()
        refused += experts.refusals(program) if portable else ()
        refused += unsupported_ops(self.name, TABLE, program.graph.nodes)
        return refused or refused_by(self.name, lambda: lower.build(program, _dialect(program, options)))

    def fast_activations(self, options: base.TargetOptions) -> Literal["float", "int8-dynamic"]:
        """MLAS has faster kernels for int8 activations. Standard ops compute in floats, as does a browser's `QMoE`."""
        assert isinstance(options, OnnxOptions)
        return "float" if options.flavor in (Flavor.PORTABLE, Flavor.WEB) else "int8-dynamic"

    def scale_types_of(self, program: Program) -> frozenset[str]:
        """MatMulNBits has the scales in the dtype of its activations, so float32 would be rounded in an fp16 graph."""
        return self.scale_types - ({"fp32"} if program.dtype.itemsize == 2 else set())

    def cache_formats(self, options: base.TargetOptions) -> frozenset[str]:
        """`GroupQueryAttention` reads and writes codes in its buffers; standard `Attention` has no such form."""
        assert isinstance(options, OnnxOptions)
        return frozenset({"int8"}) if options.flavor is Flavor.GENAI else frozenset()

    def auto_formats(self, options: base.TargetOptions, tensor_class: str) -> tuple[str, ...]:
        """ONNX Runtime's kernels take zero points; standard ops take neither zero points nor quantized experts."""
        assert isinstance(options, OnnxOptions)
        if options.flavor is not Flavor.PORTABLE:
            return base.SYMMETRIC + base.ASYMMETRIC
        return () if tensor_class in EXPERT_CLASSES else base.SYMMETRIC

    def kept_formats(self, options: base.TargetOptions, tensor_class: str, dtype: str) -> tuple[str, ...]:
        """Per-channel scales are stored as blocks of equal scales; scales of linears have the graph's dtype."""
        formats = self.auto_formats(options, tensor_class)
        if not formats:
            return ()
        asymmetric = tuple(
            f"{form}:asym" for form in base.PER_CHANNEL if form.startswith("int4") and base.ASYMMETRIC[0] in formats
        )
        stored = "fp32" if tensor_class in EXPERT_CLASSES else dtype
        return base.with_scales(stored, (*formats, *base.PER_CHANNEL, *asymmetric))

    def lower(self, program: Program, options: base.TargetOptions, directory: Path, progress: Progress) -> base.Lowered:
        """Write the graph, its data and, for onnxruntime-genai, `genai_config.json`."""
        from moec.targets.common.refusals import RefusedError
        from moec.targets.onnx import genai, lower, web
        from moec.targets.onnx.files import MODEL
        from moec.targets.onnx.lowerings.group_query import refusals

        assert isinstance(options, OnnxOptions)
        shared, browser = options.flavor is Flavor.GENAI, options.flavor is Flavor.WEB
        if shared and (refused := refusals(program)):
            raise RefusedError(refused[0].where, refused[0].reason, hint="use the default flavor")
        program = genai.with_genai_states(program) if shared else web.with_web_names(program) if browser else program
        dialect = _dialect(program, options)
        model, ctx = lower.build(program, dialect, routing=options.routing_outputs)
        counts: dict[str, int] = {}
        for node in model.graph.all_nodes():
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
        path = directory / (web.model_name(program) if browser else MODEL)
        path.parent.mkdir(exist_ok=True)
        data = lower.write(model, ctx, path, progress, limit=web.DATA_LIMIT if browser else None)
        if shared:
            genai.write(program, MODEL, directory, "" if options.provider is Provider.CPU else options.provider)
        files = [path.relative_to(directory).as_posix()]
        files += [(path.parent / name).relative_to(directory).as_posix() for name in data]
        return base.Lowered(
            (*files, *((genai.CONFIG,) if shared else ())),
            lower.signature(program, routing=options.routing_outputs),
            tuple(ctx.rejections),
            {
                "opset": dialect.opset,
                "ops": dict(sorted(counts.items())),
                "expert_tensor_bytes": {name: ctx.bytes_of(name) for name in sorted(ctx.experts)},
            },
        )

    def package(self, options: base.TargetOptions, directory: Path) -> tuple[str, ...]:
        """Complete `genai_config.json`, or the section of transformers.js in config.json."""
        from moec.targets.onnx import genai, web

        assert isinstance(options, OnnxOptions)
        if options.flavor is Flavor.GENAI:
            genai.complete(directory)
        if options.flavor is Flavor.WEB:
            web.complete(directory)
        return ()

    def open(self, directory: Path, *, threads: int = 0) -> runners.Runner:
        """Open the artifact with ONNX Runtime on CPU."""
        from moec.targets.onnx.runner import OnnxRunner

        return OnnxRunner(directory, threads=threads)

    def open_reference(self, directory: Path, *, threads: int = 0) -> runners.Runner:
        """Open the artifact; large weights are packed on the disk for it and mapped."""
        from moec.targets.onnx.packing import open_with_little_memory

        return open_with_little_memory(directory, threads)

    def packing(self) -> base.Packing:
        """MLAS chooses its kernels, and so the layout of packed weights, by the instruction set."""
        import onnxruntime

        from moec.compiler.common.machine import cpu_name, instruction_set

        return base.Packing(f"onnxruntime {onnxruntime.__version__}", cpu_name(), instruction_set())

    def pack(self, directory: Path, output: Path) -> runners.Runner:
        """Let ONNX Runtime write what its kernels pack when they open a model."""
        from moec.targets.onnx.packing import pack

        return pack(directory, output)

    def weight_sizes(self, directory: Path) -> paging.WeightSizes:
        """The places of the weights in the data files, by the graph."""
        from moec.targets.onnx.places import places_of

        return places_of(directory).sizes()

    def open_paged(
        self, directory: Path, memory: Callable[[], int], *, threads: int = 0, drop_cache: bool = False
    ) -> paging.PagingRunner:
        """Map the weights, and read experts when tokens are routed to them."""
        from moec.targets.onnx.paging import PagedRunner

        return PagedRunner(directory, memory, threads=threads, drop_cache=drop_cache)

    def open_experts(self, directory: Path, *, threads: int = 0) -> Mapping[str, base.ExpertsRunner]:
        """The experts of each layer as a subgraph of the model."""
        from moec.targets.onnx.experts import OnnxExperts
        from moec.targets.onnx.files import model_path

        return {model_path(directory).name: OnnxExperts(directory, threads=threads)}

    def open_for_browser(self, directory: Path) -> base.BrowserModel:
        """The graph with the routing as outputs."""
        from moec.targets.onnx.page_graph import PageGraph

        return PageGraph(directory)

    def activation_rounding(self, directory: Path) -> ActivationRounding | None:
        """MLAS's rounding of activations to int8 in the blocks of the weights, if this machine rounds in this way."""
        from moec.targets.onnx.rounding import activation_rounding

        return activation_rounding(directory)

    def stored_weights(self, directory: Path) -> Mapping[str, StoredWeight]:
        """Weights as read back by the table in the model's metadata."""
        from moec.targets.onnx.stored import stored_weights

        return stored_weights(directory)


def _dialect(program: Program, options: OnnxOptions) -> Dialect:
    from moec.targets.onnx.lowerings.table import onnx_dialect

    contrib, shared = options.flavor is not Flavor.PORTABLE, options.flavor is Flavor.GENAI
    return onnx_dialect(
        contrib=contrib,
        shared_buffer=shared,
        grouped=_grouped(program, options),
        recent_qmoe=options.flavor is not Flavor.WEB,
        decode=options.flavor is Flavor.WEB and options.experts is not Experts.KERNEL and not _is_half(program),
    )


def _is_half(program: Program) -> bool:
    import torch

    return program.dtype is torch.float16


def _grouped(program: Program, options: OnnxOptions) -> bool:
    import torch

    if options.experts is Experts.AUTO:
        experts = sum(layer.num_experts for layer in program.layers)
        return program.dtype is torch.float32 and experts <= MAX_GROUPED_EXPERTS
    return options.experts is Experts.GROUPED
