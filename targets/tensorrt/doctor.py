"""What TensorRT can do on this machine, and why not more."""

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
    """The driver and the first GPU, as far as there are any.

    Attributes:
        driver: Version of CUDA that the driver supports, such as "13.0"; empty where there is no driver.
        name: Name of the GPU; empty where there is none.
        capability: Its compute capability, such as "8.9".
    """

    driver: str = ""
    name: str = ""
    capability: str = ""

    @property
    def reason(self) -> str:
        """Why nothing runs here; empty where a GPU is there."""
        if not self.driver:
            return "no GPU (no CUDA driver)"
        return "" if self.name else "no GPU (the driver finds none)"


def find_gpu() -> Gpu:
    """Ask the CUDA driver, which belongs to no package."""
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
    ahead = f", for {', '.join(SUPPORTED)} without a GPU" if installed(RTX) else ", for the GPU of this machine"
    return {
        "build": f"yes, by {' and '.join(libraries)}{ahead}. An RTX engine is no plan of classic TensorRT",
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
    return f"no: TensorRT for RTX does not know {gpu.name}, compute capability {gpu.capability}; classic TensorRT does"
