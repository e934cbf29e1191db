"""Options that several commands share, one by one and in groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from moec.compiler.commands.console import Console
from moec.compiler.commands.flags import Group, numbers
from moec.compiler.common.sizes import byte_count

if TYPE_CHECKING:
    from moec.compiler.run.generate import Generator

Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run modelling code of the checkpoint.")]
Revision = Annotated[str | None, typer.Option(metavar="BRANCH|TAG|COMMIT", help="Revision of a hub id.")]


def resolved(given: Path) -> Path:
    """The artifact that an argument names, which may be `REGISTRY/NAME@ALIAS` (`moec.compiler.build.registry`)."""
    if "@" not in given.name:
        return given
    from moec.compiler.build.registry import resolve

    return resolve(given)


class DefaultGroup(TyperGroup):
    """Commands of which the first needs no name: `moec publish out/` is `moec publish add out/`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the first command before arguments that begin with no other one."""
        first = args[0] if args else "--help" if self.no_args_is_help else ""
        if first not in {*self.commands, "--help"}:
            args = [next(iter(self.commands)), *args]
        return super().parse_args(ctx, args)


ArtifactDirectory = Annotated[
    Path, typer.Argument(metavar="DIRECTORY", help="The artifact, or REGISTRY/NAME@ALIAS.", callback=resolved)
]


@dataclass(frozen=True)
class DebugOutput(Group):
    """Output flags of a command without a result."""

    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False

    def value(self) -> Console:
        """The streams of the command."""
        return Console(debug=self.debug)


@dataclass(frozen=True)
class Output(DebugOutput):
    """Output flags of a command."""

    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False

    def value(self) -> Console:
        """The streams of the command."""
        return Console(self.json_output, self.quiet, self.debug)


OutputConsole = Annotated[Console, Output]
"""The console of a command, made from its output flags."""


def panel(title: str) -> Callable[[str | None, str], Any]:
    """What makes the flags that `--help` shows under `title`, of a metavar and a help text."""
    return lambda metavar, text: typer.Option(metavar=metavar, help=text, rich_help_panel=title)


_routing, _quantize, _latency = panel("Dynamic routing"), panel("Quantization"), panel("Latency")


@dataclass(frozen=True)
class Routing(Group):
    """Flags of the section `routing` of a recipe."""

    routing: Annotated[str | None, _routing("POLICY|off", "Let tokens use fewer experts.")] = None
    expert_budget: Annotated[str | None, _routing("SHARE", "Share of the pretrained top-k to keep.")] = None
    routing_text: Annotated[Path | None, _routing("PATH", "Calibration text. (default: moec's own)")] = None
    routing_input: Annotated[bool | None, _routing(None, "Make the policy's threshold an input.")] = None
    compensation: Annotated[
        int | None, _routing("RANK", "Let a linear map of this rank stand in for dropped experts.")
    ] = None
    prune_experts: Annotated[str | None, _routing("SHARE", "Share of every layer's experts to remove.")] = None

    def section(self) -> Mapping[str, Any]:
        """The section; None means not given."""
        return {
            "policy": self.routing,
            "budget": self.expert_budget,
            "text": self.routing_text,
            "runtime_input": self.routing_input,
            "compensation": self.compensation,
            "prune": self.prune_experts,
        }


@dataclass(frozen=True)
class Quantize(Group):
    """Flags of the section `quantize` of a recipe."""

    quantize: Annotated[
        str | None,
        _quantize("fp16|int8|int4|palettize4|none|auto|keep", "Format of the weights; also one such as int4:128."),
    ] = None
    kv_cache: Annotated[
        str | None, _quantize("float|int8", "Format of keys and values in the KV cache. (default: float)")
    ] = None
    rounding: Annotated[str | None, _quantize("auto|rtn|gptq", "How weights are rounded. (default: auto)")] = None
    activations: Annotated[
        str | None,
        _quantize("float|int8-dynamic", "What kernels may round activations to. (default: the target's fastest)"),
    ] = None
    max_size: Annotated[str | None, _quantize("300MB|0.3x", "For auto: largest size; 0.3x is relative to fp16.")] = None
    max_perplexity_increase: Annotated[
        str | None, _quantize("0.5%", "For auto: largest predicted increase of perplexity.")
    ] = None

    def section(self) -> Mapping[str, Any]:
        """The section; None means not given."""
        flags = dict(vars(self))
        return {"format": flags.pop("quantize"), **flags}


@dataclass(frozen=True)
class Demands(Group):
    """Flags of the sections of a recipe that gates read."""

    max_quality_loss: Annotated[
        str | None, typer.Option(metavar="1%", help="Largest increase of perplexity: for the gate, and for routing.")
    ] = None
    quality_text: Annotated[Path | None, typer.Option(metavar="PATH", help="Held-out text. (default: moec's own)")] = (
        None
    )
    coverage_min: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Share of the experts that the coverage gate runs. (default: 1)"),
    ] = None
    latency_budget: Annotated[
        str | None, _latency("KEY=VALUE,...", "Budgets: decode.p50=12ms,prefill128.p90=300ms,load=2s,size=400MB.")
    ] = None
    latency_baseline: Annotated[Path | None, _latency("DIRECTORY", "Artifact to compare with.")] = None
    max_regression: Annotated[str | None, _latency("5%", "Largest slowdown from the baseline. (default: 5%)")] = None
    latency_threads: Annotated[int | None, _latency("N", "Threads of the runtime. (default: 1)")] = None
    latency_seconds: Annotated[float | None, _latency("S", "Longest time of sampling in seconds. (default: 120)")] = (
        None
    )

    def sections(self) -> Mapping[str, Mapping[str, Any]]:
        """Section -> key -> value; None means not given."""
        latency = {
            "budget": self.latency_budget,
            "baseline": self.latency_baseline,
            "max_regression": self.max_regression,
            "threads": self.latency_threads,
            "seconds": self.latency_seconds,
        }
        quality = {"max_loss": self.max_quality_loss, "text": self.quality_text}
        return {"coverage": {"min": self.coverage_min}, "quality": quality, "latency": latency}


def _sampling(text: str) -> Any:
    """A flag that overrides the model's generation_config.json."""
    return typer.Option(help=f"{text} (default: the model's own)", rich_help_panel="Sampling")


@dataclass(frozen=True)
class Sampling(Group):
    """Flags of sampling, which are arguments of `Generator.sampling`."""

    temperature: Annotated[float | None, _sampling("Divides the logits; 0 takes the most likely token.")] = None
    top_k: Annotated[int | None, _sampling("Draw among the k most likely tokens; 0 means all.")] = None
    top_p: Annotated[float | None, _sampling("Draw among the most likely tokens that together reach p.")] = None
    min_p: Annotated[float | None, _sampling("Leave out tokens below p times the most likely one.")] = None
    repetition_penalty: Annotated[float | None, _sampling("Above 1, tokens that occurred become less likely.")] = None
    seed: Annotated[int, typer.Option(help="Seed of sampling.", rich_help_panel="Sampling")] = 0


@dataclass(frozen=True)
class Running(Group):
    """Flags for opening an artifact to generate from it."""

    threads: Annotated[int, typer.Option(help="Threads of the runtime; 0 leaves it to the runtime.")] = 0
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="NAME=VALUE", help="Set an input that has a default, such as routing_budget."),
    ] = None

    no_pack: Annotated[
        bool, typer.Option("--no-pack", help="Open the weights as they are, and not packed for this machine.")
    ] = False

    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for weights, such as 2GB: experts beyond it are read from disk. (default: the container's)",
        ),
    ] = None

    def generator(self, directory: Path, console: Console) -> Generator:
        """Open an artifact, and say what could not be packed.

        Raises:
            ArtifactError: The directory is not an artifact, or the artifact is damaged.
            UsageError: An input is not `NAME=NUMBER`, the artifact has no such input, or the limit on memory cannot be
                kept.
        """
        from moec.compiler.run.generate import Generator

        inputs, memory = numbers(self.inputs or (), "--input"), None
        if self.memory_limit is not None:
            memory = byte_count(self.memory_limit, "--memory-limit")
        with console.progress() as progress:
            opened = Generator(
                directory,
                threads=self.threads,
                inputs=inputs,
                pack=not self.no_pack,
                memory_limit=memory,
                progress=progress,
            )
        if opened.note:
            console.note(opened.note)
        return opened


@dataclass(frozen=True)
class Generation(Running):
    """Flags for generating from an artifact on the command line."""

    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; may be repeated.")
    ] = None
    stats: Annotated[bool, typer.Option("--stats", help="Print counts and tokens per second on stderr.")] = False
