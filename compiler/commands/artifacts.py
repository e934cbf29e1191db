"""`moec verify` and `moec pack`: artifacts that are there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from moec.compiler.commands.options import ArtifactDirectory, OutputConsole


def verify(
    console: OutputConsole,
    directory: ArtifactDirectory,
    public_key: Annotated[
        str | None,
        typer.Option(metavar="FILE|KEY", envvar="MOEC_PUBLIC_KEY", help="Require a minisign signature by this key."),
    ] = None,
    ignore_signature: Annotated[bool, typer.Option("--ignore-signature", help="Check only the digests.")] = False,
) -> int:
    """Check by digests, and by the signature if there is one, that the artifact is unchanged since it was built."""
    from moec.compiler.build import signature
    from moec.compiler.common import artifact, provenance

    digests = artifact.verify(directory)
    described = provenance.check(directory)
    signed = None
    if not ignore_signature and (public_key or signature.is_signed(directory)):
        signed = signature.check(directory, public_key)

    def show() -> None:
        console.line(f"{directory}: {len(digests)} files are unchanged since they were built")
        if described:
            console.line(f"{provenance.FILE} describes this artifact")
        if signed is not None:
            console.line(f"the signature is valid: {signed}")

    console.result({"files": digests, "provenance": described, "signature": signed}, show)
    return 0


def pack(
    console: OutputConsole,
    directory: ArtifactDirectory,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a packed copy of the artifact here. (default: cache)")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact at the output.")] = False,
) -> int:
    """Store weights as the kernels of this machine read them: faster, and mapped instead of copied into memory.

    `moec run`, `chat` and `serve` do this by themselves for large artifacts. The packed files are for this processor
    and this version of the runtime; the artifact stays as it is.
    """
    with console.progress() as progress:
        from moec.compiler.run import packing

        if output is None:
            found = packing.pack(directory, progress)
        else:
            found = packing.pack_into(directory, output, progress, overwrite=overwrite)
    console.result(found.record(), lambda: console.rows(packed_rows(found.record())))
    return 0


def packed_rows(packed: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is packed, as rows for people."""
    machine, *extensions = packed["instruction_set"] or ("?",)
    return [
        ("packed", f"{packed['bytes'] / 1e6:.1f} MB in {packed['directory']}"),
        ("packed for", f"{packed['runtime']}, {packed['cpu']} ({machine}: {', '.join(extensions)})"),
        ("packed from", f"the artifact with digest {packed['source']}"),
    ]
