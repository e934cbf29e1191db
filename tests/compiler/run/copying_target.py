"""A target whose packed weights are a copy of the file, and that says when it packs and waits if it is told to.

As a program it packs an artifact into a cache: `python copying_target.py ARTIFACT CACHE`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from moec.compiler.common.artifact import write_manifest
from moec.compiler.common.errors import ArtifactError
from moec.compiler.run.packed_cache import PackedCache
from moec.targets.base import Capabilities, Packing, Phase, Target, TargetOptions
from moec.targets.runners import Runner

MODEL = "model.bin"
PACKING = Packing("copier 1", "A processor", ("x86_64", "avx2"))


class CopyingTarget(Target):
    """See the module.

    Attributes:
        packed_for: What `packing` returns.
        wrong: Whether packed weights compute something else.
    """

    name: ClassVar[str] = "copying"
    packed_for: Packing = PACKING
    wrong = False

    def capabilities(self, options: TargetOptions, phase: Phase) -> Capabilities:  # noqa: ARG002
        return Capabilities(skips_experts=True)

    def lower(self, *_: Any) -> Any:
        raise NotImplementedError

    def stored_weights(self, directory: Path) -> Mapping[str, Any]:
        raise NotImplementedError

    def packing(self) -> Packing:
        return self.packed_for

    def pack(self, directory: Path, output: Path) -> Runner:
        """Note in `packs` beside the artifact that it packs, and go on once there is no file `wait`."""
        data = (directory / MODEL).read_bytes()
        (output / MODEL).write_bytes(data[: len(data) // 2])
        with (directory / "packs").open("a") as log:
            log.write("packed\n")
        while (directory / "wait").exists():
            time.sleep(0.01)
        (output / MODEL).write_bytes(data)
        return CopyingRunner(len(data) + self.wrong)

    def open(self, directory: Path, *, threads: int = 0) -> Runner:  # noqa: ARG002
        if not (directory / MODEL).is_file():
            raise ArtifactError(f"{directory}: no model")
        return CopyingRunner((directory / MODEL).stat().st_size)


class CopyingRunner(Runner):
    """Its logits are the size of the file."""

    def __init__(self, size: int) -> None:
        self.size = size

    def reset(self) -> None:
        pass

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:  # noqa: ARG002
        return np.full((*input_ids.shape, 5), self.size, np.float32)

    def facts(self) -> Mapping[str, Any]:
        return {}


def make_artifact(directory: Path, size: int = 1000) -> Path:
    """An artifact whose model file has `size` bytes."""
    directory.mkdir(parents=True)
    (directory / MODEL).write_bytes(b"w" * size)
    write_manifest(
        directory, {"recipe": {"target": "copying"}, "model": {"vocab_size": 5}, "model_files": [MODEL], "n": size}
    )
    return directory


if __name__ == "__main__":
    PackedCache(Path(sys.argv[2])).pack(Path(sys.argv[1]), CopyingTarget(), PACKING, lambda *_: None)
