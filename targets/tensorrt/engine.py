"""Runs an engine on a GPU, with TensorRT for RTX or classic TensorRT and the CUDA runtime."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.common.artifact import read_manifest
from moec.compiler.common.errors import ArtifactError, MissingExtraError
from moec.targets.tensorrt.builder import ENGINES
from moec.targets.tensorrt.doctor import find_gpu
from moec.targets.tensorrt.generator import EngineRunner, Rows
from moec.targets.tensorrt.library import INSTALL, RTX, installed, load
from moec.targets.tensorrt.settings import EngineSettings


def why_engine_cannot_run(settings: EngineSettings) -> str:
    """Why the engine of an artifact cannot run here; empty if it can."""
    if settings.engine is None:
        return "no engine was built"
    gpu = find_gpu()
    if gpu.reason:
        return gpu.reason
    if settings.library == RTX and gpu.capability not in settings.compute_capabilities:
        return f"{gpu.name} has compute capability {gpu.capability}"
    return "" if installed(settings.library) else f"{settings.library} is not installed"


def check_version(settings: EngineSettings, found: str) -> None:
    """Check the library's version: only the version that built an engine can load it.

    Raises:
        ArtifactError: The installed version `found` is another one.
    """
    wrote = settings.library_version
    if wrote != found:
        older = "older" if _numbers(wrote) < _numbers(found) else "newer"
        raise ArtifactError(
            f"{settings.engine} was built by {settings.library} {wrote}, {older} than the {found} installed here",
            hint=f"rebuild it from model.onnx with `python build_engine.py --library {settings.library}`, or install "
            f"{settings.library.replace('_', '-')}=={wrote}",
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def open_engine(directory: Path) -> EngineRunner:
    """Load the engine of an artifact on the first GPU.

    Raises:
        ArtifactError: Another version of the library built the engine, or it cannot be loaded.
        MissingExtraError: The library or the CUDA runtime is not installed.
    """
    settings = EngineSettings.read(directory)
    library = load(settings.library)
    check_version(settings, library.__version__)
    names = [profile.name for profile in settings.profiles]
    session = GpuSession(directory / ENGINES[settings.library], names, library, _cuda())
    return EngineRunner(session, settings, read_manifest(directory)["signature"])


def _cuda() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MissingExtraError("running an engine needs cuda-bindings", hint=INSTALL) from error


class GpuSession:
    """A Session on the first GPU; see `moec.targets.tensorrt.generator.Session`.

    Args:
        path: The engine.
        profiles: Names of its optimisation profiles, in order.
        library: The TensorRT module.
        cuda: The module `cuda.bindings.runtime`.

    Raises:
        ArtifactError: The engine cannot be loaded.
    """

    def __init__(self, path: Path, profiles: Sequence[str], library: Any, cuda: Any) -> None:
        self._library, self._cuda = library, cuda
        self._stream = self._checked(cuda.cudaStreamCreate())
        self._logger = library.Logger(library.Logger.ERROR)
        runtime = library.Runtime(self._logger)
        self._engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ArtifactError(f"{path}: {library.__name__} cannot load it", hint="rebuild it with build_engine.py")
        self._contexts = {name: self._context(index) for index, name in enumerate(profiles)}

    def _context(self, profile: int) -> Any:
        arguments = []
        if hasattr(self._library, "CudaGraphStrategy"):
            # With this setting, TensorRT for RTX captures CUDA graphs by itself.
            config = self._engine.create_runtime_config()
            config.cuda_graph_strategy = self._library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            arguments.append(config)
        context = self._engine.create_execution_context(*arguments)
        context.set_optimization_profile_async(profile, int(self._stream))
        return context

    def _checked(self, result: Any) -> Any:
        """The value that a CUDA call returned after its error code.

        Raises:
            RuntimeError: The call failed.
        """
        code, *values = result
        if int(code):
            raise RuntimeError(f"CUDA: {code}")
        return values[0] if values else None

    def allocate(self, nbytes: int) -> int:
        """Allocate zeroed memory on the GPU; returns its address."""
        address = int(self._checked(self._cuda.cudaMalloc(nbytes)))
        self._checked(self._cuda.cudaMemsetAsync(address, 0, nbytes, self._stream))
        return address

    def write(self, address: int, array: np.ndarray) -> None:
        """Copy `array` to the GPU."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._checked(self._cuda.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self._stream))

    def read(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Copy an array from the GPU after all earlier work has finished."""
        array = np.empty(shape, dtype)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._checked(self._cuda.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, self._stream))
        self._checked(self._cuda.cudaStreamSynchronize(self._stream))
        return array

    def copy_rows(self, source: Rows, destination: Rows, width: int, count: int) -> None:
        """Copy `count` rows of `width` bytes within the GPU's memory."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._checked(
            self._cuda.cudaMemcpy2DAsync(
                destination.address, destination.pitch, source.address, source.pitch, width, count, kind, self._stream
            )
        )

    def execute(self, profile: str, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        """Run the engine; see `moec.targets.tensorrt.generator.Session`.

        Raises:
            RuntimeError: TensorRT reports a failure.
        """
        context = self._contexts[profile]
        for name, shape in shapes.items():
            context.set_input_shape(name, shape)
        for name, address in addresses.items():
            context.set_tensor_address(name, address)
        if not context.execute_async_v3(int(self._stream)):
            raise RuntimeError(f"{self._library.__name__} could not run the profile {profile}")

    def facts(self) -> Mapping[str, Any]:
        """Library, GPU and driver."""
        gpu = find_gpu()
        return {
            "runtime": f"{self._library.__name__} {self._library.__version__}",
            "gpu": f"{gpu.name}, compute capability {gpu.capability}, driver for CUDA {gpu.driver}",
        }
