"""`moec verify`: check that an artifact is unchanged since it was built."""

from __future__ import annotations

from typing import Annotated

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
