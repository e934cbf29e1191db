"""The contract between the compiler and a deployment target. Imports no torch: `moec run` goes through here."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from moec.compiler.common.errors import MissingExtraError, UsageError
from moec.compiler.common.progress import Progress
from moec.compiler.common.rejections import Rejection
from moec.targets.next_steps import CHAT, SERVE, VALIDATE, NextStep
from moec.targets.paging import PagingRunner, WeightSizes
from moec.targets.runners import Runner

if TYPE_CHECKING:
    from moec.compiler.common.verdict import Verdict
    from moec.compiler.ir.interpreter import ActivationRounding
    from moec.compiler.ir.program import Program
    from moec.passes.base import Pass
    from moec.targets.model_files import FileFormat, ModelFile
    from moec.targets.stored_weights import StoredWeight


SYMMETRIC = ("int4:128", "int4:64", "int4:32", "int8:128", "int8:64", "int8:32")
ASYMMETRIC = ("int4:128:asym", "int4:64:asym", "int4:32:asym")
"""Formats with one scale per block, as `--quantize` spells them: without and with zero points."""
PER_CHANNEL = ("int8:channel", "int4:channel")
"""Formats with one scale per output channel (row)."""


def with_scales(dtype: str, forms: Iterable[str]) -> tuple[str, ...]:
    """`forms` with scales of `dtype`: "fp32" adds that suffix, anything else leaves the default, fp16."""
    return tuple(f"{form}:fp32" if dtype == "fp32" else form for form in forms)


class Phase(StrEnum):
    """The two phases of text generation."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a target does in one phase.

    `skips_experts`: an expert slot whose routing weight is 0 costs no computation. Where it is False, the report calls
    what dynamic routing saves "logical only" and gives `reason`.
    """

    skips_experts: bool
    reason: str = ""


class TargetOptions(BaseModel):
    """Base of every target's options. The CLI makes a flag of each field, with its description as help."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Lowered:
    """What a target wrote.

    Attributes:
        model_files: Names of the files in the directory whose hashes go into moec.json.
        signature: Inputs, outputs and states with shapes and dtypes, JSON-able.
        rejections: Nodes for which the target had to choose a slower form, with reasons.
        facts: What was built, JSON-able and equal on every rebuild: counts of ops, bytes of the experts.
    """

    model_files: tuple[str, ...]
    signature: Mapping[str, Any]
    rejections: tuple[Rejection, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def cannot_measure(target: Target) -> str:
    """Why latency cannot be measured on this machine, from `doctor()["measure"]`; empty if it can."""
    answer, _, reason = target.doctor().get("measure", "yes").partition(":")
    return "" if answer.strip().lower().startswith("yes") else reason.strip() or "this machine cannot"


@dataclass(frozen=True, slots=True)
class Packing:
    """What the layout of packed weights depends on.

    Attributes:
        runtime: Runtime and version, such as "onnxruntime 1.32.0".
        cpu: Name of the processor, for people.
        instruction_set: The extensions of the processor by which a runtime chooses its kernels.
    """

    runtime: str
    cpu: str
    instruction_set: tuple[str, ...]


ExpertsRunner = Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Index of a MoE layer, hidden_states [T, H], top_k indices [T, k] and routing weights [T, k] -> output [T, H].

It runs the artifact's own nodes and weights from the inputs of the layer's experts on. Callers ask for one layer after
another, so that only one needs to be loaded at a time.
"""


class BrowserModel(Protocol):
    """An artifact as a web page runs it, with ONNX Runtime web.

    Attributes:
        graph: The graph, an ONNX file. It returns logits, states and the routing; scalar inputs must be fed.
        path: Path of the graph in the artifact.
        data: Paths in the artifact of the data files, which the graph names without their folder.
        routing: For each MoE layer, the names of the outputs with indices and weights, both [T, k].
        scalars: Name of each scalar input, such as "routing_budget", and its default in the artifact.
        decoded_bytes: Bytes of the floats that the runtime makes of codes if it decodes them once.
    """

    graph: bytes
    path: str
    data: tuple[str, ...]
    routing: tuple[tuple[str, str], ...]
    scalars: Mapping[str, float]
    decoded_bytes: int

    def kept_shares(self, ids: Sequence[int], name: str) -> Callable[[float], float]:
        """Value of the scalar input `name` -> share of the routing slots of the text `ids` that are used."""


@dataclass(frozen=True)
class GateSubject:
    """What a target's own gate is given.

    Attributes:
        program: The final Program.
        directory: The artifact.
        facts: `Lowered.facts` of the artifact.
        parity: Name of a gate and a Runner -> that Runner's verdict on the cases of the parity gate.
    """

    program: Program
    directory: Path
    facts: Mapping[str, Any]
    parity: Callable[[str, Runner], Verdict]


@dataclass(frozen=True)
class TargetGate:
    """A gate that a target adds to the common ones: its name, its exit code on failure, and its check."""

    name: str
    exit_code: int
    judge: Callable[[GateSubject], Verdict]


class Target(ABC):
    """A deployment format.

    `name` is what `--target` takes; `Options` is a TargetOptions subclass; `extra` is the pip extra that it needs, if
    any; `tools` are the distributions, beyond torch, whose versions affect what the target writes and which moec.json
    therefore records. `modules` are the top-level modules of the extra; a build needs all of them.
    `takes_embeddings`: an artifact may have the input `inputs_embeds` (`moec.passes.inputs_embeds`).
    `default_dtype` is the precision where a recipe names none: "fp32" or "fp16".
    `presets` are names for `--quantize` that only this target has, or that it redefines: name -> format by tensor
    class, as in a recipe.
    `weight_formats` are the kinds of quantized weights that it supports, such as "int4": the first words of formats.
    `scale_types` are the dtypes of scales that it supports: "fp16", "bf16", "fp32".
    `state_kinds` are the kinds of state that it carries from step to step, see `moec.compiler.ir.program.StateSpec`.
    `next_steps` are three commands that a user of a new artifact is likely to want.
    Constructing a target imports nothing heavy: lowering modules are imported in the methods that need them.
    """

    name: ClassVar[str]
    Options: ClassVar[type[TargetOptions]] = TargetOptions
    extra: ClassVar[str | None] = None
    modules: ClassVar[tuple[str, ...]] = ()
    tools: ClassVar[tuple[str, ...]] = ()
    takes_embeddings: ClassVar[bool] = False
    default_dtype: ClassVar[Literal["fp32", "fp16"]] = "fp32"
    presets: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    weight_formats: ClassVar[frozenset[str]] = frozenset({"int8", "int4"})
    scale_types: ClassVar[frozenset[str]] = frozenset({"fp16", "fp32"})
    state_kinds: ClassVar[frozenset[str]] = frozenset({"key", "value"})
    next_steps: ClassVar[tuple[NextStep, ...]] = (CHAT, SERVE, VALIDATE)

    @abstractmethod
    def capabilities(self, options: TargetOptions, phase: Phase) -> Capabilities:
        """What this target can do in `phase`."""

    def check(self, options: TargetOptions, config: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Refuse options that cannot be built for a model, before the model is captured.

        Args:
            options: The target's options.
            config: config.json of the checkpoint.

        Raises:
            MissingExtraError: A module of the extra is not installed.
            UsageError: The options do not fit the model.
        """
        for module in self.modules:
            if importlib.util.find_spec(module) is None:
                raise MissingExtraError(
                    f"target {self.name} needs {module}, which is not installed",
                    hint=f"pip install 'moec[{self.extra}]'",
                )

    def passes(self, options: TargetOptions) -> tuple[Pass, ...]:  # noqa: ARG002
        """Passes that only this target needs; they run after the common ones."""
        return ()

    def lint(self, program: Program, options: TargetOptions) -> tuple[Rejection, ...]:  # noqa: ARG002
        """Everything in `program` that `lower` would refuse. Empty means that lowering should succeed."""
        return ()

    def refusals(self, program: Program, options: TargetOptions) -> tuple[Rejection, ...]:
        """Kinds of states, formats of caches and of weights that are not supported; if all are, what `lint` finds.

        `lint` is not asked about a Program with unsupported ones, so it need not handle them.
        """
        from moec.targets.common.unsupported import unsupported

        return tuple(unsupported(self, program, options)) or self.lint(program, options)

    def scale_types_of(self, program: Program) -> frozenset[str]:  # noqa: ARG002
        """The dtypes of scales that are supported in this Program."""
        return self.scale_types

    def file_format(self) -> FileFormat[ModelFile] | None:
        """The format of files of other tools that this target's runtime runs and moec's compiler does not know."""
        return None

    def cache_formats(self, options: TargetOptions) -> frozenset[str]:  # noqa: ARG002
        """Formats other than floats in which artifacts can keep keys and values: "int8", with a scale per channel."""
        return frozenset()

    def check_cache(self, options: TargetOptions, form: str) -> None:
        """Refuse a format of the KV cache that artifacts with these options cannot have.

        Raises:
            UsageError: `form` is not among `cache_formats`.
        """
        if form not in self.cache_formats(options):
            raise UsageError(
                f"--kv-cache {form}: the {self.name} target keeps keys and values in floats with these options",
                hint="leave it out; docs/quantization.md says which targets and options have such a cache",
            )

    def auto_formats(self, options: TargetOptions, tensor_class: str) -> tuple[str, ...]:  # noqa: ARG002
        """Quantized formats that `--quantize auto` may give to weights of a class: those that kernels compute with."""
        return SYMMETRIC

    def fast_activations(self, options: TargetOptions) -> Literal["float", "int8-dynamic"]:  # noqa: ARG002
        """The default of `--activations`: int8-dynamic if kernels of quantized weights are faster with it.

        With "float", a plan stays as it is: the formats of a target's own presets may name int8-dynamic themselves.
        """
        return "float"

    def kept_formats(self, options: TargetOptions, tensor_class: str, dtype: str) -> tuple[str, ...]:  # noqa: ARG002
        """Formats of a checkpoint's quantized weights that `--quantize keep` may store with their codes unchanged.

        Args:
            options: The target's options.
            tensor_class: Class of the weights.
            dtype: Precision of the Program, "fp32" or "fp16".

        Returns:
            Formats as text, those of `moec.quantize.formats.TableFormat` included. With `fp32`, float32 scales are
            stored unchanged; without, float16 scales are.
        """
        return self.auto_formats(options, tensor_class)

    @abstractmethod
    def lower(self, program: Program, options: TargetOptions, directory: Path, progress: Progress) -> Lowered:
        """Write the model files into `directory`, which exists and is empty.

        Raises:
            LoweringError: The target does not support an op, or its library fails to build the model.
        """

    def package(self, options: TargetOptions, directory: Path) -> tuple[str, ...]:  # noqa: ARG002
        """Write the files that are made from model files and tokenizer, which are in `directory` by now.

        Returns:
            Names of the files; like those of model files, their hashes go into moec.json.
        """
        return ()

    @abstractmethod
    def open(self, directory: Path, *, threads: int = 0) -> Runner:
        """Open an artifact for running; 0 threads: the runtime's default."""

    def open_reference(self, directory: Path, *, threads: int = 0) -> Runner:
        """Open what the common gates judge: the artifact, or a twin that it holds and that runs on every machine."""
        return self.open(directory, threads=threads)

    def packing(self) -> Packing | None:
        """What packed weights depend on here; None if this target does not pack weights (`pack`)."""
        return None

    def pack(self, directory: Path, output: Path) -> Runner:  # noqa: ARG002
        """Write the model files of an artifact with weights in the layout that the kernels of this machine read.

        Args:
            directory: The artifact.
            output: An empty directory; `open` then takes it in place of the artifact, with bit-identical results.

        Returns:
            A runner of the artifact's own weights, which packing opens anyway.

        Raises:
            ArtifactError: The runtime fails.
        """
        raise UsageError(f"the {self.name} target does not pack weights", hint="run the artifact as it is")

    def weight_sizes(self, directory: Path) -> WeightSizes:
        """How many bytes of an artifact, or of packed weights, every token reads, and how many one expert has.

        Raises:
            UsageError: Experts of this target, or of this artifact, cannot be left on the disk.
        """
        raise self._keeps_experts(directory)

    def open_paged(
        self,
        directory: Path,
        memory: Callable[[], int],  # noqa: ARG002
        *,
        threads: int = 0,  # noqa: ARG002
        drop_cache: bool = False,  # noqa: ARG002
    ) -> PagingRunner:
        """Open packed weights and leave experts on the disk until tokens are routed to them.

        Args:
            directory: Packed weights, for which `weight_sizes` gives an answer.
            memory: Bytes of memory that experts may take now; dense weights are not among them.
            threads: As for `open`.
            drop_cache: Whether experts that memory no longer holds leave the page cache of the system, too.

        Raises:
            ArtifactError: The runtime fails, or the weights are packed for another machine.
            UsageError: As for `weight_sizes`.
        """
        raise self._keeps_experts(directory)

    def _keeps_experts(self, directory: Path) -> UsageError:
        reason = f"{directory}: the {self.name} target does not leave experts on the disk"
        return UsageError(reason, hint="docs/run.md says which artifacts can run in less memory than their weights")

    def gates(self) -> tuple[TargetGate, ...]:
        """Gates that only this target has; they run after the integrity gate."""
        return ()

    def activation_rounding(self, directory: Path) -> ActivationRounding | None:  # noqa: ARG002
        """How the kernels of an artifact round activations before a product with a quantized weight.

        The reference of the gates rounds in the same way, so that gates see only other differences. None where
        kernels do not round, or where it is not known how: the tolerance for quantized weights then covers it.
        """
        return None

    @abstractmethod
    def stored_weights(self, directory: Path) -> Mapping[str, StoredWeight]:
        """The weights in the files of an artifact, by their names in the final Program.

        Returns:
            Every tensor of experts, every embedding, and every other weight that is stored quantized.
        """

    def open_experts(self, directory: Path, *, threads: int = 0) -> Mapping[str, ExpertsRunner]:  # noqa: ARG002
        """Runners of the artifact's experts alone, for the coverage gate.

        Returns:
            Name of a graph, for the verdict -> runner of its experts: one for each graph that computes experts, such as
            prefill and decode. Empty where experts cannot be run alone: the coverage gate is then not run.
        """
        return {}

    def open_for_browser(self, directory: Path) -> BrowserModel:
        """The artifact as a web page runs it.

        Raises:
            UsageError: It does not run in a browser.
        """
        reason = f"{directory}: the {self.name} target does not run in a browser"
        raise UsageError(reason, hint="export with --target onnx --flavor web")

    def doctor(self) -> Mapping[str, str]:
        """What this machine can do: "build", "run" and "measure" -> "yes" or "no: reason"; "install" -> a command."""
        return {"build": "yes", "run": "yes", "measure": "yes", "install": ""}
