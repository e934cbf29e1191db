"""Opening an artifact with packed weights, and packing one: `moec pack`, and the first `moec run`.

Nothing here may fail a run: what cannot be packed is opened as it is, and a note says why. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock

from moec.compiler.common.artifact import read_manifest, write_manifest
from moec.compiler.common.errors import ArtifactError, MoecError, OutputError, UsageError, first_line
from moec.compiler.common.progress import Progress
from moec.compiler.common.staging import staged
from moec.compiler.run.memory_limit import MemoryLimit
from moec.compiler.run.packed_cache import (
    DESCRIPTION,
    Packed,
    PackedCache,
    description,
    model_bytes,
    write_packed,
)
from moec.targets import get_target
from moec.targets.base import Packing, Target
from moec.targets.runners import Runner

WORTHWHILE = 64 << 20
"""Bytes of model files from which an artifact is packed without being asked.

Smaller weights stay in the caches of the processor, and opening them takes as long as looking for an entry.
"""
FAILURES = (MoecError, OSError, MemoryError, filelock.Timeout)
"""Why packing may fail without failing the run."""


def open_packed(
    artifact: Path,
    manifest: Mapping[str, Any],
    target: Target,
    *,
    threads: int,
    memory: int | None = None,
    cache: PackedCache | None = None,
    progress: Progress = lambda *_: None,
) -> tuple[Runner, str]:
    """Open an artifact with packed weights if that can be had, else as it is; and a note on what could not be done.

    Args:
        artifact: The artifact.
        manifest: Its moec.json.
        target: Its target.
        threads: Threads of the runtime.
        memory: Bytes of memory for weights (`moec.compiler.run.memory_limit`); None: what the container allows.
        cache: The cache; None is that of the user.
        progress: Called while weights are packed.

    Raises:
        ArtifactError: The artifact itself cannot be opened.
        UsageError: `memory` is too small, or the experts cannot be left on the disk.
    """
    packing, limit = target.packing(), MemoryLimit.of(memory)
    if memory is not None:
        target.weight_sizes(artifact)  # raises for experts that cannot be left on the disk, before they are packed

    def opened(directory: Path) -> tuple[Runner, str]:
        if limit is None:
            return target.open(directory, threads=threads), ""
        return limit.open(directory, manifest, target, threads)

    if "packed" in manifest:
        return _with_note(opened(artifact), _stale(manifest["packed"], packing))
    if packing is None:
        return target.open(artifact, threads=threads), ""
    cache = PackedCache() if cache is None else cache
    found, note = cache.find(str(manifest["digest"]), packing), ""
    if found is None and (memory is not None or model_bytes(artifact, manifest) >= WORTHWHILE):
        found, note = _packed_now(artifact, target, packing, cache, progress)
    if found is not None:
        with contextlib.suppress(OSError):  # a cache that cannot be written forgets what was used last
            os.utime(found.directory / DESCRIPTION, (time.time(), time.time()))
        try:
            return _with_note(opened(found.directory), note)
        except ArtifactError as error:  # another process has removed it
            note = f"packed weights are not used: {first_line(error)}"
    if memory is not None:
        raise UsageError(f"{artifact}: a limit on memory needs packed weights; {note}", hint="moec pack says more")
    return target.open(artifact, threads=threads), note


def _packed_now(
    artifact: Path, target: Target, packing: Packing, cache: PackedCache, progress: Progress
) -> tuple[Packed | None, str]:
    """Pack an artifact into the cache; None with a note if that fails."""
    try:
        return cache.pack(artifact, target, packing, progress), ""
    except FAILURES as error:
        return None, f"weights are not packed: {first_line(error)}"


def _with_note(opened: tuple[Runner, str], note: str) -> tuple[Runner, str]:
    """What was opened, with one more note."""
    return opened[0], "; ".join(filter(None, (note, opened[1])))


def _stale(recorded: Mapping[str, Any], packing: Packing | None) -> str:
    """A note if the weights of an artifact were packed for another runtime or processor than those of this machine."""
    if packing is None or (recorded["runtime"], tuple(recorded["instruction_set"])) == (
        packing.runtime,
        packing.instruction_set,
    ):
        return ""
    return (
        f"weights are packed for {recorded['runtime']} on {recorded['cpu']}, and this is {packing.runtime} on "
        f"{packing.cpu}: they are packed again in memory"
    )


def packing_of(manifest: Mapping[str, Any], artifact: Path) -> tuple[Target, Packing]:
    """The target of an artifact and how it packs.

    Raises:
        UsageError: The target does not pack weights, or those of the artifact are packed.
    """
    target = get_target(str(manifest.get("recipe", {}).get("target")))
    packing = target.packing()
    if packing is None:
        raise UsageError(f"{artifact}: the {target.name} target does not pack weights", hint="run it as it is")
    if "packed" in manifest:
        raise UsageError(f"{artifact}: its weights are packed", hint="give the artifact that moec export made")
    return target, packing


def pack(artifact: Path, progress: Progress, cache: PackedCache | None = None) -> Packed:
    """Pack the weights of an artifact into the cache, where `moec run` finds them.

    Raises:
        UsageError: The target does not pack weights.
        ArtifactError: The directory is not an artifact, the runtime fails, or the results differ.
        OutputError: The cache cannot be written, or there is too little space.
    """
    manifest = read_manifest(artifact)
    target, packing = packing_of(manifest, artifact)
    cache = PackedCache() if cache is None else cache
    try:
        return cache.pack(artifact, target, packing, progress)
    except OSError as error:
        hint = "free some space, or choose another place with -o"
        raise OutputError(f"{cache.directory}: cannot be written: {error.strerror or error}", hint=hint) from error


def pack_into(artifact: Path, output: Path, progress: Progress, *, overwrite: bool = False) -> Packed:
    """Write a copy of an artifact whose weights are packed for this machine: an artifact with `packed` in moec.json.

    Raises:
        UsageError: The target does not pack weights.
        ArtifactError: The directory is not an artifact, the runtime fails, or the results differ.
        OutputError: `output` exists or cannot be written.
    """
    manifest = read_manifest(artifact)
    target, packing = packing_of(manifest, artifact)
    source = str(manifest["digest"])
    with staged(output, overwrite=overwrite) as directory:
        write_packed(artifact, manifest, target, directory, progress)
        written = {path.name for path in directory.iterdir()}
        size = sum((directory / name).stat().st_size for name in written)
        for name in manifest["files"]:
            if name not in written:
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(artifact / name, directory / name)
        kept = {key: value for key, value in manifest.items() if key not in {"files", "digest", "schema_version"}}
        model_files = sorted(written.union(manifest.get("model_files", ())))
        kept |= {"model_files": model_files, "packed": description(size, packing, source)}
        write_manifest(directory, kept)
    return Packed(output, size, packing, source)


def packed_of(artifact: Path, cache: PackedCache | None = None) -> dict[str, Any] | None:
    """What is packed of an artifact, for `moec inspect`: in its own files, or in the cache of this machine.

    Raises:
        ArtifactError: The directory is not an artifact.
    """
    manifest = read_manifest(artifact)
    if "packed" in manifest:
        return {"directory": str(artifact), **manifest["packed"]}
    try:
        _, packing = packing_of(manifest, artifact)
    except MoecError:
        return None
    found = (PackedCache() if cache is None else cache).find(str(manifest["digest"]), packing)
    return None if found is None else found.record()
