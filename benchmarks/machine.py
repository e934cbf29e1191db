"""One line about the machine and the software versions of a benchmark."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import psutil

PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "onnx-ir", "tensorrt-rtx", "moec")


def describe() -> str:
    """CPU, cores, memory, load, and versions of the measured packages."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    memory = psutil.virtual_memory().total / 1e9
    load = psutil.getloadavg()[0]
    return (
        f"{cpu}, {psutil.cpu_count()} cores, {memory:.0f} GB, load {load:.1f} at the start, "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )
