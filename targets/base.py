"""The contract between the compiler and a deployment target. Imports no torch: `moec run` goes through here."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import BaseModel, ConfigDict

from moec.compiler.common.errors import MissingExtraError, UsageError
from moec.compiler.common.progress import Progress
from moec.compiler.common.rejections import Rejection

if TYPE_CHECKING:
    from moec.compiler.common.verdict import Verdict
    from moec.compiler.ir.interpreter import ActivationRounding
    from moec.compiler.ir.program import Program
    from moec.passes.base import Pass
    from moec.targets.stored_weights import StoredWeight


SYMMETRIC = ("int4:128", "int4:64", "int4:32", "int8:128", "int8:64", "int8:32")
ASYMMETRIC = ("int4:128:asym", "int4:64:asym", "int4:32:asym")
"""Text forms of formats with blocks, without and with zero points."""
BY_ROW = ("int8:channel", "int4:channel")
"""Text forms of formats with one scale for a row."""


def with_scales(dtype: str, forms: Iterable[str]) -> tuple[str, ...]:
    """Text forms that hold scales of the precision `dtype`."""
    return tuple(f"{form}:fp32" if dtype == "fp32" else form for form in forms)


class Phase(StrEnum):
    """The two ways in which a decoder runs."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a target does in one phase.

    `skips_experts`: a slot whose weight is 0 costs nothing. Where it is False the report calls a saving by dynamic
    routing "logical only", with `reason`.
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
        model_files: Names of the files in the directory that are hashed into moec.json.
        signature: Inputs, outputs and states with shapes and dtypes, JSON-able.
        rejections: Where the target took another form than it would like to.
        facts: JSON-able and the same on every rebuild: kernels chosen, bytes per tensor class.
    """

    model_files: tuple[str, ...]
    signature: Mapping[str, Any]
    rejections: tuple[Rejection, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """What a runner does not take. The defaults are a runner that takes everything.

    Attributes:
        max_batch: Most sequences at once; None where any number will do.
        padding: Whether `attention_mask` may hold zeros (left padding).
        max_sequence: Most tokens of a sequence, past and new together; None where the model alone sets the limit.
        prefill_lengths: Lengths that the artifact was specialised to; the runner itself cuts or pads to them.
        max_decode: Most tokens of one decode step; None where any number will do.
        repeats_bits: Whether equal inputs give equal bits, as they do on a CPU; a GPU may add in any order.
        stands_in: What runs here in place of the runtime that users have, if it does: "moec's executor for Core ML".
            How fast that is, or whether it repeats itself, is not known then.
    """

    max_batch: int | None = None
    padding: bool = True
    max_sequence: int | None = None
    prefill_lengths: tuple[int, ...] = ()
    max_decode: int | None = None
    repeats_bits: bool = True
    stands_in: str = ""

    def check(self, target: str, input_ids: np.ndarray, attention_mask: np.ndarray | None, past: int) -> None:
        """Check a step of new tokens [B, S] after `past` others of each sequence.

        Raises:
            UsageError: There are several sequences, padding, or more tokens than this allows.
        """
        batch, new = input_ids.shape
        if self.max_batch is not None and batch > self.max_batch:
            raise UsageError(
                f"{batch} sequences at once: the {target} target runs {self.max_batch}", hint="run them in turn"
            )
        if not self.padding and attention_mask is not None and not np.all(attention_mask):
            raise UsageError(f"the {target} target takes no padding", hint="give the tokens alone")
        if self.max_sequence is not None and past + new > self.max_sequence:
            raise UsageError(
                f"{past + new} tokens are more than the {self.max_sequence} that the cache holds",
                hint="export with a larger --context, or shorten the text",
            )


class Runner(Protocol):
    """Runs an artifact. Gates, `moec run`, perplexity and benchmarks use nothing else. Arrays are numpy.

    A runner may be more than this: a `LimitedRunner`, an `AdjustableRunner`, a `ForkableRunner`.
    """

    def reset(self) -> None:
        """Forget the sequences."""

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Start new sequences: input_ids [B, S] int64, attention_mask [B, S] -> logits [B, S, V] float32."""
        self.reset()
        return self.decode(input_ids, attention_mask)

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Continue them: input_ids [B, S], attention_mask [B, past + S] or None -> logits [B, S, V] float32."""

    def facts(self) -> Mapping[str, Any]:
        """Runtime, version, threads and kernels, for the report."""


@runtime_checkable
class LimitedRunner(Protocol):
    """A runner that does not take every shape: ask `limits_of`."""

    limits: RunnerLimits


@runtime_checkable
class AdjustableRunner(Protocol):
    """A runner whose artifact has inputs with defaults.

    Attributes:
        overrides: Name of such an input -> float32 array that is fed in place of its default. Of an input with a row
            for each token, such as `inputs_embeds`, it holds the rows of the tokens of the next call.
    """

    overrides: dict[str, np.ndarray]


@runtime_checkable
class ForkableRunner(Protocol):
    """A runner that can run several sequences side by side: ask `fork`."""

    def fork(self) -> Runner:
        """A runner of the same artifact with sequences of its own; it shares the weights."""


def limits_of(runner: Runner) -> RunnerLimits:
    """Limits that `runner` states, or none."""
    return runner.limits if isinstance(runner, LimitedRunner) else RunnerLimits()


def fork(runner: Runner) -> Runner:
    """A runner of the same artifact with sequences of its own; it shares the weights.

    Raises:
        UsageError: `runner` is not forkable: its runtime keeps the states of one sequence.
    """
    if not isinstance(runner, ForkableRunner):
        raise UsageError(
            "another text is being generated, and the runner of this target keeps one sequence at a time",
            hint="finish or close the other generation first, or open the artifact again with moec.load",
        )
    return runner.fork()


def cannot_measure(target: Target) -> str:
    """Why nothing can be measured here, or an empty text: `doctor()["measure"]` says "yes", or "no" and the reason."""
    answer, _, reason = target.doctor().get("measure", "yes").partition(":")
    return "" if answer.strip().lower().startswith("yes") else reason.strip() or "this machine cannot"


ExpertsRunner = Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Index of a MoE layer, hidden states [T, H], and indices and weights of the routing [T, k] -> [T, H].

What runs are the nodes and weights of the artifact, entered at the operands of the layer's experts. Layers are asked
for one after the other, so that one of them need be open at a time.
"""


@dataclass(frozen=True)
class GateSubject:
    """What a target's own gate looks at.

    Attributes:
        program: The final Program.
        directory: The artifact.
        facts: `Lowered.facts` of it.
        parity: Name of a gate and a Runner -> verdict of that Runner on the cases of the parity gate.
    """

    program: Program
    directory: Path
    facts: Mapping[str, Any]
    parity: Callable[[str, Runner], Verdict]


@dataclass(frozen=True)
class TargetGate:
    """A gate that a target adds to the common ones: its name, the exit code if it fails, and how it is judged."""

    name: str
    exit_code: int
    judge: Callable[[GateSubject], Verdict]


class Target(ABC):
    """A deployment format.

    `name` is what `--target` takes; `Options` is a TargetOptions subclass; `extra` is the pip extra that it needs, if
    any; `tools` are the distributions, beyond torch, whose versions decide what it writes and so stand in moec.json.
    `modules` are the top-level modules of the extra, without which nothing can be built.
    `takes_embeddings`: an artifact may have the input `inputs_embeds` (`moec.passes.inputs_embeds`).
    `default_dtype` is the precision where a recipe names none: "fp32" or "fp16".
    `presets` are the names that `--quantize` takes for this target alone, or means something else by: name -> format
    by tensor class, as in a recipe.
    `weight_formats` are the kinds of codes that its weights may have: first words of the text forms of formats.
    `scale_types` are the dtypes that the scales of its weights may have: "fp16", "bf16", "fp32".
    `state_kinds` are the kinds of state that it carries from step to step, see `moec.compiler.ir.program.StateSpec`.
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

    @abstractmethod
    def capabilities(self, options: TargetOptions, phase: Phase) -> Capabilities:
        """Say what this target does in `phase`."""

    def check(self, options: TargetOptions, config: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Refuse, before anything is captured, what cannot be built for a model.

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
        """Passes that only this target wants, run after the common ones."""
        return ()

    def lint(self, program: Program, options: TargetOptions) -> tuple[Rejection, ...]:  # noqa: ARG002
        """Everything in `program` that `lower` would refuse. Empty means that lowering should succeed."""
        return ()

    def refusals(self, program: Program, options: TargetOptions) -> tuple[Rejection, ...]:
        """States and formats of weights of kinds that this target does not know, else what `lint` finds.

        What is unknown stands alone: `lint` need not know it.
        """
        return (*self._unknown_states(program), *self._unknown_formats(program)) or self.lint(program, options)

    def _unknown_formats(self, program: Program) -> Iterator[Rejection]:
        from moec.quantize.lazy import Coded

        users: dict[str, list[str]] = {}
        for name in program.weight_names():
            tensor = program.weights[name]
            if not isinstance(tensor, Coded):
                continue
            kind = str(tensor.format).partition(":")[0]
            if kind not in self.weight_formats or tensor.format.scale_type not in self.scale_types:
                users.setdefault(str(tensor.format), []).append(name)
        known = f"{', '.join(sorted(self.weight_formats))} with scales of {' or '.join(sorted(self.scale_types))}"
        for form, names in users.items():
            reason = f"{form} ({len(names)} weights) is not supported here; weights may be {known}"
            yield Rejection(self.name, names[0], reason)

    def _unknown_states(self, program: Program) -> Iterator[Rejection]:
        carried = ", ".join(sorted(self.state_kinds))
        for kind in sorted({state.kind for state in program.states} - self.state_kinds):
            layers = [state.layer for state in program.states if state.kind == kind]
            more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            reason = f"a state of kind {kind} is not supported here; layers may keep states of the kinds {carried}"
            yield Rejection(self.name, f"layer {layers[0]}{more}", reason)

    def auto_formats(self, options: TargetOptions, tensor_class: str) -> tuple[str, ...]:  # noqa: ARG002
        """Formats with codes that `--quantize auto` may give to weights of a class: those that kernels compute with."""
        return SYMMETRIC

    def kept_formats(self, options: TargetOptions, tensor_class: str, dtype: str) -> tuple[str, ...]:  # noqa: ARG002
        """Formats whose codes `--quantize keep` may pass on bit for bit.

        Args:
            options: The target's options.
            tensor_class: Class of the weights.
            dtype: Precision of the Program, "fp32" or "fp16".

        Returns:
            Text forms, those of `moec.quantize.formats.TableFormat` too. One with `fp32` says that scales of single
            precision are stored as they are, one without that those of half precision are.
        """
        return self.auto_formats(options, tensor_class)

    @abstractmethod
    def lower(self, program: Program, options: TargetOptions, directory: Path, progress: Progress) -> Lowered:
        """Write the model files into `directory`, which exists and is empty.

        Raises:
            LoweringError: An op is not supported here, or the builder refuses.
        """

    def package(self, options: TargetOptions, directory: Path) -> tuple[str, ...]:  # noqa: ARG002
        """Write what needs the model files and the tokenizer, which lie in `directory` now.

        Returns:
            Names of the files, which are hashed into moec.json as the model files are.
        """
        return ()

    @abstractmethod
    def open(self, directory: Path, *, threads: int = 0) -> Runner:
        """Open an artifact for running; 0 threads means the runtime's default."""

    def open_reference(self, directory: Path, *, threads: int = 0) -> Runner:
        """Open what the common gates judge: the same, unless the artifact holds a twin that runs on every machine."""
        return self.open(directory, threads=threads)

    def gates(self) -> tuple[TargetGate, ...]:
        """Gates that only this target has, run after integrity."""
        return ()

    def activation_rounding(self, directory: Path) -> ActivationRounding | None:  # noqa: ARG002
        """How the kernels of an artifact round activations before they multiply them with a quantized weight.

        The reference of the gates does the same, so that what they see is the rest. None where nothing is rounded, or
        where nobody knows how: the tolerance for codes then covers it.
        """
        return None

    @abstractmethod
    def stored_weights(self, directory: Path) -> Mapping[str, StoredWeight]:
        """Weights of an artifact as its files hold them, by their names in the final Program.

        Returns:
            Every tensor of experts, and every other weight that is stored as codes.
        """

    def open_experts(self, directory: Path, *, threads: int = 0) -> Mapping[str, ExpertsRunner]:  # noqa: ARG002
        """The experts of the artifact by themselves, for the coverage gate.

        Returns:
            What is run, as the verdict shall call it -> its experts; one for each graph that computes them, such as
            those of prefill and decode. Empty where the format does not let anybody in there: coverage is not run then.
        """
        return {}

    def doctor(self) -> Mapping[str, str]:
        """What can be built, run and measured here: keys "build", "run", "measure", "install"."""
        return {"build": "yes", "run": "yes", "measure": "yes", "install": ""}
