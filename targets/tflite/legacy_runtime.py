"""Runs a `.tflite` file with tflite-runtime 2.14, the last release of LiteRT under its former name.

It was built for numpy 1 and crashes with numpy 2, so it is installed in a separate virtual environment and runs as a
child process.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moec.compiler.common.errors import ArtifactError, MissingExtraError
from moec.compiler.common.threads import threads_for
from moec.targets.tflite.engine import InputSpec, cannot_load
from moec.targets.tflite.legacy_runtime_worker import receive, send

_WORKER = Path(__file__).with_name("legacy_runtime_worker.py")


def environment() -> Path:
    """Directory of the virtual environment with tflite-runtime."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "moec" / "tflite-runtime"


class LegacyEngine:
    """Runs the file in a child process; see `moec.targets.tflite.engine.Engine`.

    Args:
        file: The model.
        threads: Threads of the runtime; 0: its default.

    Raises:
        ArtifactError: tflite-runtime cannot load the file.
        MissingExtraError: The virtual environment with tflite-runtime does not exist.
    """

    def __init__(self, file: Path, threads: int) -> None:
        home = environment()
        python = home / "bin" / "python"
        if not python.is_file():
            raise MissingExtraError(
                f"tflite-runtime needs a separate virtual environment with numpy 1, and {home} is not one",
                hint=f"python3.11 -m venv {home} && {home}/bin/pip install tflite-runtime==2.14.0 'numpy<2'",
            )
        command = [str(python), "-I", str(_WORKER), str(file), str(threads_for(threads))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        answer = self._answer()
        if "error" in answer:
            raise cannot_load(file, "tflite-runtime", str(answer["error"]))
        self.runtime = f"tflite-runtime {answer.pop('version')}"
        self.signatures = tuple(str(name) for name in answer.pop("signatures"))
        self.inputs: Mapping[str, InputSpec] = {
            name.removeprefix("input."): InputSpec(value.shape, value.dtype) for name, value in sorted(answer.items())
        }

    def reset(self) -> None:
        """Fill the states with zeros."""
        self._send({"signature": np.array("")})

    def run(self, signature: str, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run one signature; see `Engine`.

        Raises:
            ArtifactError: The runtime fails on the signature, or its process ended.
        """
        self._send({"signature": np.array(signature), **feeds})
        answer = self._answer()
        if "error" in answer:
            raise ArtifactError(f"tflite-runtime fails on {signature}: {answer['error']}", hint="use --runtime litert")
        return answer["logits"]

    def _send(self, arrays: dict[str, np.ndarray]) -> None:
        assert self._process.stdin is not None
        try:
            send(self._process.stdin, arrays)  # type: ignore[arg-type]
        except BrokenPipeError as error:
            raise self._crashed() from error

    def _answer(self) -> dict[str, np.ndarray]:
        assert self._process.stdout is not None
        answer = receive(self._process.stdout)  # type: ignore[arg-type]
        if answer is None:
            raise self._crashed()
        return answer

    def _crashed(self) -> ArtifactError:
        code = self._process.wait()
        return ArtifactError(
            f"the process of tflite-runtime ended with status {code}",
            hint=f"is its numpy older than 2? {environment()}/bin/pip install 'numpy<2'",
        )

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.close()
