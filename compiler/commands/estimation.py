"""`moec estimate`: size, work, latency and cost of an artifact before it is built."""

from __future__ import annotations

from typing import Annotated

import typer

from moec.compiler.commands.options import OutputConsole, Revision, Trust


def estimate(
    console: OutputConsole,
    checkpoint: Annotated[str, typer.Argument(help="Directory or hub id.")],
    target: Annotated[str, typer.Option("--target", "-t", help="Name of the target.")],
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
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> int:
    """Estimate size, work, latency and cost without building the artifact or reading a weight.

    The first estimate for a target and a format on a machine builds and measures a few small models.
    """
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
