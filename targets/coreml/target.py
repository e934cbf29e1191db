"""The CoreML target: `model.mlpackage`, an ML program with states for iOS 18 and macOS 15 or later."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from moec.compiler.common.model_config import cache_length
from moec.compiler.common.progress import Progress
from moec.compiler.common.rejections import Rejection
from moec.targets import base, runners
from moec.targets.coreml.flavors import Flavor
from moec.targets.next_steps import CHAT, VALIDATE, NextStep

if TYPE_CHECKING:
    from moec.compiler.ir.program import Program
    from moec.targets.coreml.interface import Shape
    from moec.targets.coreml.lower import Built
    from moec.targets.model_files import FileFormat, ModelFile
    from moec.targets.stored_weights import StoredWeight

DEFAULT_CONTEXT = 2048
MIN_CONTEXT = 4
"""swift-transformers aborts unless the number of tokens per call is a range; this is its minimum upper bound."""
TABLES = ("table4:32", "table4:16")
"""Formats of MXFP4 and NVFP4."""
INSTALL = "pip install 'moec[coreml]'"


class Minimum(StrEnum):
    """Oldest system that the model must run on. Unsupported ones are listed so that their refusal gives a reason."""

    IOS16 = "ios16"
    IOS17 = "ios17"
    IOS18 = "ios18"
    MACOS13 = "macos13"
    MACOS14 = "macos14"
    MACOS15 = "macos15"


TOO_OLD = (Minimum.IOS16, Minimum.IOS17, Minimum.MACOS13, Minimum.MACOS14)
SPECIFICATION_VERSION = 9
"""Version of the model format of iOS 18 and macOS 15."""


class CoremlOptions(base.TargetOptions):
    """Options of the CoreML target."""

    minimum: Minimum = Field(Minimum.IOS18, description="oldest system to run on: ios18 or macos15")
    context: int | None = Field(
        None,
        ge=2,
        description=f"tokens that the KV cache holds; default: the model's context, at most {DEFAULT_CONTEXT}",
    )
    prefill_chunk: int = Field(128, ge=2, description="maximum number of tokens per call of the prefill function")
    flavor: Flavor = Field(
        Flavor.DEFAULT,
        description=Flavor.meanings(),
    )
    hub_name: str = Field(
        "", description="name on the Hub, from which swift-transformers loads the tokenizer if the app has none"
    )
    author: str = Field("", description="author shown by Xcode")
    license: str = Field("", description="licence of the weights, shown by Xcode")

    @field_validator("minimum")
    @classmethod
    def _has_states(cls, minimum: Minimum) -> Minimum:
        if minimum in TOO_OLD:
            raise ValueError(
                f"{minimum} supports neither states, which hold the KV cache, nor int4 weights: "
                "both came with ios18 and macos15"
            )
        return minimum

    @model_validator(mode="after")
    def _is_a_range(self) -> CoremlOptions:
        if self.flavor is Flavor.SWIFT and self.context is not None and self.context < MIN_CONTEXT:
            raise ValueError(f"swift-transformers needs a context of at least {MIN_CONTEXT} tokens")
        return self


class CoremlTarget(base.Target):
    """Lowers to a CoreML package."""

    name: ClassVar[str] = "coreml"
    Options: ClassVar[type[base.TargetOptions]] = CoremlOptions
    extra: ClassVar[str | None] = "coreml"
    modules: ClassVar[tuple[str, ...]] = ("coremltools",)
    tools: ClassVar[tuple[str, ...]] = ("coremltools",)
    default_dtype: ClassVar[Literal["fp32", "fp16"]] = "fp16"
    takes_embeddings: ClassVar[bool] = True
    weight_formats: ClassVar[frozenset[str]] = frozenset({"int8", "int4", "palettize4", "table4"})
    state_kinds: ClassVar[frozenset[str]] = frozenset({"key", "value", "index_key", "conv", "recurrent"})
    next_steps: ClassVar[tuple[NextStep, ...]] = (
        CHAT,
        dataclasses.replace(VALIDATE, does="runs the gates on a Mac, by Core ML itself"),
        NextStep("xcrun coremlcompiler compile {directory}/model.mlpackage .", "compiles it for an app, on a Mac"),
    )

    def capabilities(self, options: base.TargetOptions, phase: base.Phase) -> base.Capabilities:
        """Decode skips experts by a `cond` around each; prefill computes every expert for every token."""
        assert isinstance(options, CoremlOptions)
        if phase is base.Phase.DECODE:
            return base.Capabilities(skips_experts=True)
        if options.flavor is Flavor.SWIFT:
            return base.Capabilities(
                skips_experts=False, reason="an expert that one token of a call needs is computed for all its tokens"
            )
        return base.Capabilities(skips_experts=False, reason="prefill computes every expert for every token")

    def check(self, options: base.TargetOptions, config: Mapping[str, Any]) -> None:
        """Refuse a KV cache that is longer than the model's context; see `Target.check`."""
        assert isinstance(options, CoremlOptions)
        super().check(options, config)
        cache_length(config, options.context, DEFAULT_CONTEXT)

    def lint(self, program: Program, options: base.TargetOptions) -> tuple[Rejection, ...]:
        """What the flavor or the lowering does not support."""
        from moec.targets.common.refusals import refused_by, unsupported_formats, unsupported_ops
        from moec.targets.coreml.context import MIL_NAMES
        from moec.targets.coreml.interface import refusals
        from moec.targets.coreml.lowerings.table import TABLE
        from moec.targets.coreml.weights import HINT, unsupported_reason

        assert isinstance(options, CoremlOptions)
        computes_in = MIL_NAMES[program.dtype]
        found = (
            *refusals(program, options.flavor),
            *unsupported_ops(self.name, TABLE, program.graph.nodes),
            *unsupported_formats(self.name, program, lambda own: unsupported_reason(own.format, computes_in), HINT),
        )
        return found or refused_by(self.name, lambda: _build(program, options, blank=True))

    def auto_formats(self, options: base.TargetOptions, tensor_class: str) -> tuple[str, ...]:  # noqa: ARG002
        """Formats with blocks, with zero points or without."""
        return base.SYMMETRIC + base.ASYMMETRIC

    def kept_formats(self, options: base.TargetOptions, tensor_class: str, dtype: str) -> tuple[str, ...]:
        """Also per-channel scales, and lookup tables with scales per block; scales have the program's precision."""
        formats = (*self.auto_formats(options, tensor_class), *base.PER_CHANNEL, "int4:channel:asym", *TABLES)
        return base.with_scales(dtype, formats)

    def lower(self, program: Program, options: base.TargetOptions, directory: Path, progress: Progress) -> base.Lowered:
        """Write `model.mlpackage`."""
        from moec.targets.coreml import lower
        from moec.targets.coreml.library import quiet
        from moec.targets.coreml.package import PACKAGE, write_package

        assert isinstance(options, CoremlOptions)
        shape, texts = _shape(program.config, options), metadata_texts(program.config, options)
        built = _build(program, options)
        with quiet():
            progress("weights", 0, 1)
            spec = write_package(
                built.program,
                directory / PACKAGE,
                SPECIFICATION_VERSION,
                lambda spec, renamed: lower.describe(spec, built, shape, texts, renamed),
            )
            progress("weights", 1, 1)
        facts = {
            "flavor": str(options.flavor),
            "minimum": str(options.minimum),
            "context": shape.context,
            "prefill_chunk": shape.chunk,
            "ops": built.ops,
            "expert_tensor_bytes": lower.expert_bytes(built),
            **({"inputs": built.defaults} if built.defaults else {}),
        }
        return base.Lowered(
            lower.model_files(directory / PACKAGE), lower.signature(spec), tuple(built.rejections), facts
        )

    def open(self, directory: Path, *, threads: int = 0) -> runners.Runner:  # noqa: ARG002
        """Open the artifact with Core ML on macOS, with moec's executor elsewhere."""
        from moec.targets.coreml.runner import CoremlRunner

        return CoremlRunner(directory)

    def open_experts(self, directory: Path, *, threads: int = 0) -> Mapping[str, base.ExpertsRunner]:  # noqa: ARG002
        """The experts of each function, layer by layer, in moec's executor."""
        from moec.targets.coreml.experts import open_experts

        return open_experts(directory)

    def stored_weights(self, directory: Path) -> Mapping[str, StoredWeight]:
        """Weights as read back from the constants of the package."""
        from moec.targets.coreml.stored import stored_weights

        return stored_weights(directory)

    def file_format(self) -> FileFormat[ModelFile]:
        """Packages of coremltools and others, which run here in moec's executor."""
        from moec.targets.coreml.model_file import FORMAT

        return FORMAT

    def doctor(self) -> Mapping[str, str]:
        """Building and running work on every system; measuring needs macOS."""
        from moec.compiler.common.errors import MissingExtraError
        from moec.targets.coreml.library import coremltools_module

        try:
            coremltools_module()
        except MissingExtraError:
            return {"build": "no", "run": "no", "measure": "no", "install": INSTALL}
        mac = sys.platform == "darwin"
        return {
            "build": "yes",
            "run": "yes, by Core ML" if mac else "yes, by moec's executor in numpy",
            "measure": "yes" if mac else "no: needs macOS",
            "install": "",
        }


def _build(program: Program, options: CoremlOptions, *, blank: bool = False) -> Built:
    """The MIL program; see `moec.targets.coreml.lower.build`."""
    from moec.targets.coreml import lower
    from moec.targets.coreml.library import quiet

    with quiet():
        return lower.build(program, _shape(program.config, options), options.flavor, blank=blank)


def _shape(config: Mapping[str, Any], options: CoremlOptions) -> Shape:
    from moec.targets.coreml.interface import Shape

    context = cache_length(config, options.context, DEFAULT_CONTEXT)
    return Shape(context, context if options.flavor is Flavor.SWIFT else min(options.prefill_chunk, context))


def metadata_texts(config: Mapping[str, object], options: CoremlOptions) -> Mapping[str, str]:
    """Description, author and license of a model, as Xcode shows them."""
    import moec

    names = config.get("architectures") or [config.get("model_type", "language model")]
    name = str(names[0] if isinstance(names, list) else names)
    functions = (
        "one function takes prompts and single tokens, and skips the experts that no token of a call needs."
        if options.flavor is Flavor.SWIFT
        else "prefill takes a piece of the prompt, decode one token and skips the experts that it does not need."
    )
    return {
        "author": options.author,
        "license": options.license,
        "name": options.hub_name or name,
        "description": f"{name}: mixture-of-experts language model with a KV cache in states. Functions: {functions}",
        "version": moec.__version__,
    }
