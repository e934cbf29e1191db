"""What TensorRT can do on this machine, and what prevents the rest."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

from moec.targets.tensorrt.capability import SUPPORTED
from moec.targets.tensorrt.library import CLASSIC, INSTALL, RTX, installed, version

DRIVER = "libcuda.so.1"
MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


@dataclass(frozen=True)
class Gpu:
    """The CUDA driver and the first GPU.

    Attributes:
        driver: Version of CUDA that the driver supports, such as "13.0"; empty without a driver.
        name: Name of the GPU; empty without a GPU.
        capability: Compute capability of the GPU, such as "8.9".
    """

    driver: str = ""
    name: str = ""
    capability: str = ""

    @property
    def reason(self) -> str:
        """Why no engine can run here; empty if there is a GPU."""
        if not self.driver:
            return "no GPU (no CUDA driver)"
        return "" if self.name else "no GPU (the driver finds none)"


def find_gpu() -> Gpu:
    """Ask the CUDA driver for the first GPU, without any Python package of CUDA."""
    try:
        cuda = ctypes.CDLL(DRIVER)
    except OSError:
        return Gpu()
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    driver = f"{number.value // 1000}.{number.value % 1000 // 10}"
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(number)) or not number.value:
        return Gpu(driver)
    text, parts = ctypes.create_string_buffer(128), []
    cuda.cuDeviceGetName(text, len(text), 0)
    for attribute in (MAJOR, MINOR):
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, 0)
        parts.append(str(number.value))
    return Gpu(driver, text.value.decode(), ".".join(parts))


def findings() -> Mapping[str, str]:
    """The rows of `moec doctor`."""
    gpu = find_gpu()
    libraries = [f"{name} {version(name.replace('_', '-'))}" for name in (RTX, CLASSIC) if installed(name)]
    if not libraries:
        return {
            "build": "no: neither TensorRT for RTX nor classic TensorRT is installed; --no-engine writes model.onnx",
            "run": "yes, model.onnx on CPU",
            "measure": "no",
            "install": INSTALL,
        }
    gpus = f", for {', '.join(SUPPORTED)} without a GPU" if installed(RTX) else ", for the GPU of this machine"
    return {
        "build": f"yes, by {' and '.join(libraries)}{gpus}. Classic TensorRT cannot run an RTX engine",
        "run": f"yes, model.onnx on CPU; the engine: {_runs(gpu)}",
        "measure": "yes" if _can_run(gpu) else f"no: {_runs(gpu).removeprefix('no: ')}",
        "install": "" if installed(RTX) else INSTALL,
    }


def _can_run(gpu: Gpu) -> bool:
    return not gpu.reason and (gpu.capability in SUPPORTED or installed(CLASSIC))


def _runs(gpu: Gpu) -> str:
    if gpu.reason:
        return f"no: {gpu.reason}"
    if _can_run(gpu):
        return f"yes, {gpu.name}, compute capability {gpu.capability}, driver for CUDA {gpu.driver}"
    gpu_text = f"{gpu.name}, compute capability {gpu.capability}"
    return f"no: TensorRT for RTX does not support {gpu_text}; classic TensorRT does"
