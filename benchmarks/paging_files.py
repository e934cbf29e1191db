"""The files of paging.py, and the pythons that run it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

BUDGET = 0.5
ROUTED_TOKENS = 1024
"""Tokens of the calibration text whose routing the artifact with dynamic routing records."""


def write_gguf(checkpoint: Path, file: Path) -> None:
    """Write the checkpoint as GGUF, quantized by the package gguf."""
    import gguf
    import torch
    from gguf_files import is_float, write_olmoe

    kinds = gguf.GGMLQuantizationType

    def coded(name: str, values: torch.Tensor) -> tuple[Any, Any]:
        data = values.float().numpy()
        if is_float(name, values):
            return data, None
        kind = kinds.Q4_0 if name.startswith("blk.") else kinds.Q8_0
        # An expert at a time: quantizing takes several times the memory of what it is given.
        parts = [gguf.quants.quantize(part, kind) for part in (data if data.ndim == 3 else [data])]
        return np.stack(parts) if data.ndim == 3 else parts[0], kind

    write_olmoe(checkpoint, file.with_suffix(".partial"), coded)
    file.with_suffix(".partial").rename(file)


def build(work: Path, layers: int, in_llama: Callable[..., str] | None) -> dict[str, Path]:
    """The files of each kind, made once; the checkpoint is removed.

    Returns:
        "static" and "halved", packed artifacts without and with dynamic routing, and "gguf".
    """
    files = {"static": work / f"packed-{layers}", "halved": work / f"packed-{layers}-half-of-the-slots"}
    files |= {"gguf": work / f"q4_0-{layers}.gguf"} if in_llama else {}
    plain = {kind: work / f"int4-{layers}-{kind}" for kind in ("static", "halved")}
    made = {kind: path.exists() or plain.get(kind, path).exists() for kind, path in files.items()}
    if not all(made.values()):
        _from_checkpoint(work / f"checkpoint-{layers}", layers, files, plain, in_llama)
    for kind, path in plain.items():
        if not files[kind].exists():
            from moec.compiler.run.packing import pack_into

            pack_into(path, files[kind], lambda *_: None)
        shutil.rmtree(path, ignore_errors=True)
    return files


def _from_checkpoint(
    checkpoint: Path, layers: int, files: dict[str, Path], plain: dict[str, Path], in_llama: Callable[..., str] | None
) -> None:
    """Write what is not there, and remove the checkpoint."""
    from checkpoints import large_checkpoint
    from routing_latency import mass_for

    from moec.compiler.api import export
    from moec.compiler.text.corpus import read_text

    large_checkpoint(checkpoint, num_hidden_layers=layers)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(HERE.parent / "golden_models" / "olmoe-tiny" / name, checkpoint / name)
    if in_llama and not files["gguf"].is_file():
        in_llama("--write-gguf", str(checkpoint), str(files["gguf"]))
    for kind, path in plain.items():
        if path.exists() or files[kind].exists():
            continue
        chosen: dict[str, Any] = {"quantize": {"format": "int4", "rounding": "rtn"}}
        if kind == "halved":
            mass, kept = mass_for(checkpoint, BUDGET)
            print(f"top-p {mass:.3f} keeps {kept:.1%} of the slots of random tokens", flush=True)
            text = checkpoint / "text.txt"
            text.write_text(read_text()[: 5 * ROUTED_TOKENS])
            chosen["routing"] = {"policy": "top-p", "parameters": {"mass": mass}, "text": str(text)}
        export(checkpoint, target="onnx", output=path, gates=False, **chosen)
    shutil.rmtree(checkpoint)


def run_with(python: str) -> Callable[..., str]:
    """A function that runs paging.py with `python`, which also has the packages of this one, and returns stdout."""
    paths = [path for path in (os.environ.get("PYTHONPATH"), sysconfig.get_path("purelib")) if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str, timeout: float | None = None) -> str:
        command = [python, str(HERE / "paging.py"), *arguments]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=timeout)
        return done.stdout

    return run


def llama_python() -> str:
    """The python of the tests' environment with llama.cpp."""
    sys.path.insert(0, str(HERE.parent / "tests" / "support"))
    from environments import environment, lines

    return str(environment("gguf", lines(HERE.parent / "tests" / "interop" / "gguf-requirements.txt")))
