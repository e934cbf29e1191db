"""`moec drift`: whether an artifact still sees the text that its routing was calibrated for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.compiler.commands.options import ArtifactDirectory, OutputConsole, Revision, Trust

if TYPE_CHECKING:
    from moec.compiler.measure.drift import LayerDrift


def drift(
    console: OutputConsole,
    directory: ArtifactDirectory,
    text: Annotated[Path, typer.Option(metavar="PATH", help="New text: a file or a directory.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="Its checkpoint: for artifacts that do not return their routing."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Text to compare with. (default: what the artifact recorded)")
    ] = None,
    windows: Annotated[int, typer.Option(min=4, help="Windows of the new text, spread over it.")] = 32,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> int:
    """Say in which layers a new text uses other experts than the text of calibration; exit code 7 if in any.

    With --against, also say what calibration would choose on the new text.
    """
    with console.progress() as progress:
        from moec.compiler.pipeline.drift import EXIT_CODE, find_drift

        found = find_drift(
            directory,
            str(text),
            against=against,
            calibration=None if calibration is None else str(calibration),
            count=windows,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )

    def show() -> None:
        console.line(found.sentence)
        if found.budget is not None:
            console.line(
                f"{found.budget.policy}: {found.budget.before:.1%} of the slots as it was calibrated, "
                f"{found.budget.now:.1%} if it were calibrated on this text: {_parameters(found.budget.parameters)} in "
                f"place of {_parameters(found.budget.parameters_before)}"
            )
        console.line("")
        header = ("layer", "distance", "by chance", "p", "drift", "dropped", "before", "more", "less")
        console.rows(map(_row, found.layers), header=header)

    code = EXIT_CODE if found.drifted else 0
    console.result(found.record(), show, code)
    return code


def _row(layer: LayerDrift) -> tuple[str, ...]:
    return (
        str(layer.layer),
        f"{layer.distance:.4f}",
        f"{layer.usual:.4f}",
        f"{layer.p:.4f}",
        "yes" if layer.drifted else "no",
        f"{layer.dropped:.1%}",
        f"{layer.dropped_before:.1%}",
        f"expert {layer.more}",
        f"expert {layer.less}",
    )


def _parameters(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in sorted(values.items())) or "none"


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_short, value[:4]))}{', ...' if len(value) > 4 else ''}]"
    return str(value)
