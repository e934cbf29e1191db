"""Signatures of artifacts, made by `minisign -Sm out/moec.json out/provenance.json`.

moec.json holds the digest of every other file, so its signature covers the whole artifact. provenance.json follows from
moec.json; its own signature is for tools that read it alone, and is checked if it is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moec.compiler.common import provenance
from moec.compiler.common.artifact import MANIFEST
from moec.compiler.common.errors import ArtifactError, MissingExtraError, UsageError

SUFFIX = ".minisig"
FILE = f"{MANIFEST}{SUFFIX}"


def is_signed(directory: Path) -> bool:
    """Whether the artifact has a signature file."""
    return (directory / FILE).is_file()


def check(directory: Path, public_key: str | None) -> str:
    """Check the signature of moec.json, and that of provenance.json if there is one.

    Args:
        directory: The artifact.
        public_key: A file that minisign wrote, or the key itself in base64.

    Returns:
        The trusted comment of moec.json's signature.

    Raises:
        UsageError: No key is given, or it is neither a key nor a key file.
        ArtifactError: moec.json has no signature, or a signature is not valid for this key and file.
        MissingExtraError: py-minisign is not installed.
    """
    path = directory / FILE
    if not path.is_file():
        raise ArtifactError(f"{directory}: not signed: it has no {FILE}", hint=f"minisign -Sm {directory / MANIFEST}")
    if public_key is None:
        raise UsageError(
            f"{directory}: it is signed, and no key is given to check the signature",
            hint="give --public-key FILE, or --ignore-signature to check only the digests",
        )
    try:
        import minisign
    except ImportError as error:
        raise MissingExtraError("py-minisign is not installed", hint="pip install 'moec[sign]'") from error
    try:
        where = Path(public_key)
        key = minisign.PublicKey.from_file(where) if where.is_file() else minisign.PublicKey.from_base64(public_key)
    except (minisign.ParseError, ValueError, OSError) as error:
        raise UsageError(
            f"--public-key: neither a key file of minisign nor a key: {public_key}", hint="give minisign.pub, say"
        ) from error
    comment = _valid(key, directory / MANIFEST)
    if (directory / f"{provenance.FILE}{SUFFIX}").is_file():
        _valid(key, directory / provenance.FILE)
    return comment


def _valid(key: Any, file: Path) -> str:
    """The trusted comment of a file's signature.

    Raises:
        ArtifactError: The signature is not valid for this key and file.
    """
    import minisign

    path = file.with_name(f"{file.name}{SUFFIX}")
    try:
        signature = minisign.Signature.from_file(path)
        key.verify(file.read_bytes(), signature)
    except (minisign.ParseError, minisign.VerifyError, ValueError, OSError) as error:
        raise ArtifactError(
            f"{path}: not a valid signature of this {file.name} by the given key: {error}",
            hint="get the artifact again from a source that you trust",
        ) from error
    return str(signature.trusted_comment)
