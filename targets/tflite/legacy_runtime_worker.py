"""The child process that runs a `.tflite` file with tflite-runtime. Imports only tflite-runtime and numpy.

The Python of a separate virtual environment runs this file as a script with the arguments FILE THREADS. Each message on
standard input and output is a length of 8 bytes and an .npz file. The first answer lists signatures and inputs. Each
request names a signature in "signature", beside its inputs, and is answered with the logits; an empty name resets the
states.
"""

from __future__ import annotations

import io
import os
import struct
import sys
from typing import Any, BinaryIO

import numpy as np


def send(stream: BinaryIO, arrays: dict[str, Any]) -> None:
    """Write one message."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    data = buffer.getvalue()
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def receive(stream: BinaryIO) -> dict[str, np.ndarray] | None:
    """Read one message; None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    data = stream.read(struct.unpack("<Q", head)[0])
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return dict(archive)


def main(file: str, threads: int, answers: BinaryIO) -> None:
    """Load the file and answer requests until standard input ends."""
    import tflite_runtime.interpreter as runtime

    try:
        interpreter = runtime.Interpreter(file, num_threads=threads or None)
        runners = {name: interpreter.get_signature_runner(name) for name in interpreter.get_signature_list()}
        details = runners["decode"].get_input_details()
    except (ValueError, RuntimeError, KeyError) as error:
        send(answers, {"error": np.array(str(error))})
        return
    states = {
        name: item
        for name, item in details.items()
        if name.startswith(("kv_cache_", "conv_state_", "recurrent_state_"))
    }
    empty = {name: np.zeros(item["shape"], item["dtype"]) for name, item in states.items()}
    inputs = {f"input.{name}": np.zeros(item["shape"], item["dtype"]) for name, item in details.items()}
    version = runtime.__dict__.get("__version__") or _version()
    send(answers, {"signatures": np.array(sorted(runners)), "version": np.array(version), **inputs})
    states = empty
    while (request := receive(sys.stdin.buffer)) is not None:
        signature = str(request.pop("signature"))
        if not signature:
            states = empty
            continue
        try:
            results = runners[signature](**request, **states)
        except (ValueError, RuntimeError) as error:
            send(answers, {"error": np.array(str(error))})
            continue
        logits = results.pop("logits")
        states = results
        send(answers, {"logits": logits})


def _version() -> str:
    from importlib.metadata import version

    return version("tflite-runtime")


if __name__ == "__main__":
    # What the runtime prints on standard output must not mix with the answers.
    with os.fdopen(os.dup(1), "wb") as stream:
        os.dup2(2, 1)
        main(sys.argv[1], int(sys.argv[2]), stream)
