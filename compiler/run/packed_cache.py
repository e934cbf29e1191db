"""Weights in the layout that the kernels of this machine read: made once, and opened in place of the artifact's.

The layout belongs to the runtime's version and to the instruction set, so packed weights are made where they are used.
They lie in the user's cache, one directory for each artifact, version and instruction set:

```
~/.cache/moec/packed/KEY/ packed.json  <model files of the target>
                     KEY.lock  .KEY.partial-XXXX/
```

An entry is written under a temporary name while its lock is held, and compared bit by bit with the artifact before it
gets its name: a killed process leaves nothing that is used, and of two processes one packs and the other one waits.
Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import platformdirs

from moec.compiler.common.artifact import read_manifest
from moec.compiler.common.digest import sha256_of_json
from moec.compiler.common.errors import ArtifactError, OutputError
from moec.compiler.common.progress import Progress
from moec.compiler.common.staging import staged
from moec.targets.base import Packing, Target
from moec.targets.runners import Runner, limits_of

LAYOUT = 1
"""Version of what is in an entry; part of its key."""
LIMIT = 32 << 30
"""Bytes that the cache may take; entries that were used least recently go first."""
SPARE = 1 << 30
"""Bytes of the disk that packing leaves free."""
GROWTH = 2.2
"""Bytes of packed files per byte of the artifact, at most: the original and the packed weights."""
WAIT = 900.0
"""Seconds to wait for another process that packs the same artifact."""
DESCRIPTION = "packed.json"
PROMPT, STEPS = 24, 3
"""Tokens of the prompt, and decode steps, by which packed and original weights are compared."""


@dataclass(frozen=True)
class Packed:
    """Packed weights.

    Attributes:
        directory: What `Target.open` takes in place of the artifact.
        bytes: Their size.
        packing: The runtime and the processor that they are for.
        source: Digest of the artifact.
    """

    directory: Path
    bytes: int
    packing: Packing
    source: str

    def record(self) -> dict[str, Any]:
        """As a mapping for JSON."""
        return {"directory": str(self.directory), **description(self.bytes, self.packing, self.source)}


def description(size: int, packing: Packing, source: str) -> dict[str, Any]:
    """What packed weights are, as a mapping for JSON."""
    return {"bytes": size, **asdict(packing), "source": source}


class PackedCache:
    """The packed weights of this user.

    Args:
        directory: Where they are; None: in the user's cache.
        limit: Bytes that they may take.
    """

    def __init__(self, directory: Path | None = None, limit: int = LIMIT) -> None:
        self.directory = platformdirs.user_cache_path("moec") / "packed" if directory is None else directory
        self.limit = limit

    def find(self, source: str, packing: Packing) -> Packed | None:
        """Packed weights of the artifact with the digest `source`; None if there are none, or they are damaged."""
        entry = self.directory / _key(source, packing)
        try:
            content = json.loads((entry / DESCRIPTION).read_text(encoding="utf-8"))
            complete = all((entry / name).stat().st_size == size for name, size in content["files"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return Packed(entry, sum(content["files"].values()), packing, source) if complete else None

    def pack(self, artifact: Path, target: Target, packing: Packing, progress: Progress) -> Packed:
        """Packed weights of an artifact: those that are there, or those that this call makes.

        Raises:
            ArtifactError: The runtime fails, or the packed weights do not give the bits of the artifact.
            OutputError: The cache cannot be written, or there is too little space.
            OSError: The same.
            filelock.Timeout: Another process has been packing the artifact for too long.
        """
        manifest = read_manifest(artifact)
        source, key = str(manifest["digest"]), _key(str(manifest["digest"]), packing)
        self._make_room(int(GROWTH * model_bytes(artifact, manifest)), key)
        with filelock.FileLock(self.directory / f"{key}.lock", timeout=WAIT):
            if (found := self.find(source, packing)) is not None:
                return found
            shutil.rmtree(self.directory / key, ignore_errors=True)  # damaged, or `find` would have found it
            with staged(self.directory / key) as partial:
                write_packed(artifact, manifest, target, partial, progress)
                files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
                content = {"files": files, **description(sum(files.values()), packing, source)}
                (partial / DESCRIPTION).write_text(json.dumps(content, indent=2), encoding="utf-8")
        return Packed(self.directory / key, sum(files.values()), packing, source)

    def _make_room(self, needed: int, key: str) -> None:
        """Remove what was used least recently until `needed` more bytes fit, and what killed processes left.

        Raises:
            OutputError: They do not fit into the limit, or into the disk.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._sweep()
        hint = "give more room, or choose another disk with `moec pack -o`"
        if needed > self.limit:
            raise OutputError(f"{self.directory}: {needed} bytes are more than its limit of {self.limit}", hint=hint)
        entries = [(used, size, path) for used, size, path in self._entries() if path.name != key]
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total + needed <= self.limit and shutil.disk_usage(self.directory).free >= needed + SPARE:
                break
            _discard(path)
            total -= size
        if (free := shutil.disk_usage(self.directory).free) < needed + SPARE:
            raise OutputError(f"{self.directory}: {free} bytes are free and {needed} are needed", hint=hint)

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """When each entry was used last, its size and its path."""
        for path in self.directory.iterdir():
            with contextlib.suppress(OSError):
                if path.is_dir() and not path.name.startswith("."):
                    used = (path / DESCRIPTION).stat().st_mtime if (path / DESCRIPTION).is_file() else 0.0
                    yield used, sum(file.stat().st_size for file in path.iterdir()), path

    def _sweep(self) -> None:
        """Remove directories of processes that were killed while they packed: nobody holds their lock."""
        for path in self.directory.glob(".*.partial-*"):
            lock = filelock.FileLock(self.directory / f"{path.name[1:].partition('.')[0]}.lock", timeout=0)
            with contextlib.suppress(filelock.Timeout), lock:
                shutil.rmtree(path, ignore_errors=True)


def _key(source: str, packing: Packing) -> str:
    return sha256_of_json([LAYOUT, source, packing.runtime, list(packing.instruction_set)])[:32]


def _discard(entry: Path) -> None:
    """Remove an entry in one step; a process that has opened it keeps its pages."""
    with contextlib.suppress(OSError):
        aside = Path(tempfile.mkdtemp(prefix=f".{entry.name}.partial-", dir=entry.parent))
        entry.rename(aside / entry.name)
        shutil.rmtree(aside, ignore_errors=True)


def model_bytes(artifact: Path, manifest: Mapping[str, Any]) -> int:
    """Bytes of the model files of an artifact."""
    return sum((artifact / name).stat().st_size for name in manifest.get("model_files", ()))


def write_packed(artifact: Path, manifest: Mapping[str, Any], target: Target, output: Path, progress: Progress) -> None:
    """Write packed weights into `output`, and compare what they compute.

    Raises:
        ArtifactError: The runtime fails, or the results differ.
    """
    progress("pack", 0, 2)
    vocabulary = int(manifest["model"]["vocab_size"])
    want = _probe(target.pack(artifact, output), vocabulary)
    progress("pack", 1, 2)
    found = _probe(target.open(output, threads=1), vocabulary)
    if not np.array_equal(want, found):
        raise ArtifactError(f"{artifact}: packed weights do not give the same bits", hint="please report it")
    progress("pack", 2, 2)


def _probe(runner: Runner, vocabulary: int) -> np.ndarray:
    """Logits of a random prompt and of a few decode steps."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, PROMPT + STEPS), dtype=np.int64)
    most = limits_of(runner).max_sequence or ids.shape[1]
    ids = ids[:, : min(most, ids.shape[1])]
    first = max(1, ids.shape[1] - STEPS)
    pieces = [runner.prefill(ids[:, :first])]
    pieces += [runner.decode(ids[:, index : index + 1]) for index in range(first, ids.shape[1])]
    runner.reset()
    return np.concatenate(pieces, axis=1)
