"""`moec estimate`: size, work, latency and cost of an artifact before it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moec.compiler.commands.console import Console
from moec.compiler.commands.options import OutputConsole, Revision, Trust
from moec.compiler.common.errors import UsageError
from moec.compiler.common.sizes import byte_count


def estimate(
    console: OutputConsole,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT|ARTIFACT", help="Directory or hub id; or an artifact, with --memory.")
    ],
    target: Annotated[str | None, typer.Option("--target", "-t", help="Name of the target.")] = None,
    quantize: Annotated[str, typer.Option(metavar="FORMAT", help="Format of the weights.")] = "none",
    dtype: Annotated[str, typer.Option(metavar="fp32|fp16", help="Precision of what is not quantized.")] = "fp32",
    routing: Annotated[
        str | None, typer.Option(metavar="POLICY", help="Policy that drops experts, with --expert-budget.")
    ] = None,
    expert_budget: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the pretrained top-k that routing keeps.")
    ] = 1.0,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the KV cache at the decode step.")] = 128,
    device: Annotated[str | None, typer.Option(help="A device profile. (default: this machine)")] = None,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Price of the device, in any currency.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE,...",
            help="For an artifact: what a token reads from disk if its weights may take so much memory, such as 2GB.",
        ),
    ] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> int:
    """Estimate size, work, latency and cost without building the artifact or reading a weight.

    The first estimate for a target and a format on a machine builds and measures a few small models. Of an artifact, it
    estimates what a token reads from disk where memory holds only a part of the experts.
    """
    from moec.compiler.common.artifact import MANIFEST

    if (Path(checkpoint) / MANIFEST).is_file():
        return _paging(Path(checkpoint), memory, target, console)
    if memory is not None:
        raise UsageError(f"--memory is for artifacts, and {checkpoint} is none", hint="export it first")
    if target is None:
        raise UsageError("no target is given", hint=f"moec estimate {checkpoint} --target onnx")
    with console.progress() as progress:
        from moec.compiler.build.estimate import EstimateRequest, describe
        from moec.compiler.build.estimate import estimate as compute

        wanted = EstimateRequest(
            checkpoint,
            target,
            quantize,
            dtype,
            routing,
            expert_budget,
            context,
            device,
            price_per_hour,
            trust_remote_code,
            revision,
        )
        found = compute(wanted, progress)
    console.result(found, lambda: console.rows(describe(found)))
    return 0


def _paging(artifact: Path, memory: str | None, target: str | None, console: Console) -> int:
    """The estimate of an artifact."""
    from moec.compiler.measure.estimate.paging import describe_paging, estimate_paging
    from moec.compiler.run.packing import packed_of

    if target is not None:
        raise UsageError("--target is for checkpoints: an artifact has its target", hint="leave it out")
    limits = [] if memory is None else [byte_count(item, "--memory") for item in memory.split(",")]
    packed = packed_of(artifact)
    found = estimate_paging(artifact, limits, None if packed is None else Path(packed["directory"]))
    console.result(found, lambda: console.rows(describe_paging(found)))
    return 0
