"""Builds an engine from `model.onnx` with the settings in `tensorrt.json` beside it. Requires only TensorRT.

    python build_engine.py                            # classic TensorRT, for the GPU of this machine
    python build_engine.py --library tensorrt_rtx     # TensorRT for RTX, for the compute capabilities in tensorrt.json

moec runs this file to build the engine of an artifact, and adds a copy to the artifact as `build_engine.py`.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Emit = Callable[[str, Mapping[str, Any]], None]
"""Reports an event: its kind and its fields."""

RTX, CLASSIC = "tensorrt_rtx", "tensorrt"
ENGINES = {RTX: "model.rtx.engine", CLASSIC: "model.engine"}
FAILED = 3
ADDR_NO_RANDOMIZE = 0x0040000
STARTED = "MOEC_BUILDER_STARTED"
KEPT = ("PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
ENGINE_LAYER = re.compile(r"^Name: .*?, LayerType: (\w+)", re.MULTILINE)
CONSTANT = re.compile(r"Name: ([^,]+), Dimensions: \[([\d,]*)\][^}]*?Datatype: (\w+)")


class Listener:
    """Collects facts about the engine from the library's messages, and passes on errors and warnings.

    Without a GPU, a finished engine cannot be inspected: the library's log is the only description of it.
    """

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.errors: list[str] = []
        self.weight_bytes = 0
        self.layers: collections.Counter[str] = collections.Counter()
        self.constants: dict[str, tuple[int, str]] = {}

    def hear(self, severity: str, message: str) -> None:
        """Handle one message."""
        if severity.endswith("ERROR"):
            self.errors.append(message)
        if severity != "VERBOSE":
            self.emit("log", {"severity": severity, "message": message})
        if found := WEIGHTS.search(message):
            self.weight_bytes += int(found.group(1))
        if message.startswith("Layers:"):
            self.layers.update(ENGINE_LAYER.findall(message))
            for name, dimensions, kind in CONSTANT.findall(message):
                count = 1
                for size in filter(None, dimensions.split(",")):
                    count *= int(size)
                self.constants[name] = (count, kind)

    def facts(self) -> dict[str, Any]:
        """Number of layers by type, and number of constant values by dtype."""
        values: collections.Counter[str] = collections.Counter()
        for count, kind in self.constants.values():
            values[kind] += count
        return {
            "engine_layers": dict(sorted(self.layers.items())),
            "constants": dict(sorted(values.items())),
            "weight_bytes": self.weight_bytes,
        }


def _logger(library: Any, listener: Listener) -> Any:
    class Log(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            listener.hear(severity.name, message)

    return Log()


def _monitor(library: Any, emit: Emit) -> Any:
    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            # There are hundreds of phases, so only top-level ones are reported.
            if parent_phase is None:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                emit("progress", {"done": step + 1, "total": self.steps[phase_name]})
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


class BuildError(Exception):
    """An error of the parser or the builder; `stage` is "parse" or "build"."""

    def __init__(self, stage: str, message: str, node: str = "", operator: str = "") -> None:
        super().__init__(message)
        self.fields = {"stage": stage, "message": message, "node": node, "operator": operator}


def parse(library: Any, logger: Any, builder: Any, model: Path) -> Any:
    """The network of an ONNX file.

    Raises:
        BuildError: The parser does not support a node, which the error names.
    """
    flags = 0
    strong = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    # TensorRT 11 and TensorRT for RTX have no such flag: all their networks are strongly typed.
    if strong is not None:
        flags = 1 << int(strong)
    network = builder.create_network(flags)
    parser = library.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        error = parser.get_error(0)
        raise BuildError("parse", error.desc(), error.node_name(), error.node_operator())
    return network


def _configure(library: Any, builder: Any, settings: Mapping[str, Any], emit: Emit) -> Any:
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(library, emit)
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    if settings["workspace_mib"]:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, settings["workspace_mib"] << 20)
    if settings["weight_streaming"]:
        config.set_flag(library.BuilderFlag.WEIGHT_STREAMING)
    if library.__name__ == RTX:
        capabilities = settings["compute_capabilities"]
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            name = "SM" + capability.replace(".", "")
            config.set_compute_capability(library.ComputeCapability.__members__[name], index)
    for profile in settings["profiles"]:
        made = builder.create_optimization_profile()
        for name, shapes in profile["inputs"].items():
            made.set_shape(name, *(tuple(shapes[bound]) for bound in ("min", "opt", "max")))
        config.add_optimization_profile(made)
    return config


def _mark_decomposable(network: Any) -> None:
    """Allow the builder to decompose attention where it has no fused kernel."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name == "ATTENTION_INPUT":
            layer.attention.decomposable = True


def _tensors(network: Any) -> dict[str, dict[str, list[Any]]]:
    def rows(count: int, get: Callable[[int], Any]) -> dict[str, list[Any]]:
        tensors = [get(index) for index in range(count)]
        return {tensor.name: [tensor.dtype.name, list(tensor.shape)] for tensor in tensors}

    return {
        "inputs": rows(network.num_inputs, network.get_input),
        "outputs": rows(network.num_outputs, network.get_output),
    }


def _network_layers(network: Any) -> dict[str, int]:
    counts = collections.Counter(network.get_layer(index).type.name for index in range(network.num_layers))
    return dict(sorted(counts.items()))


def build(library: Any, settings: Mapping[str, Any], output: Path, cache: Path | None, emit: Emit) -> dict[str, Any]:
    """Build the model in the working directory, write the engine and return facts about it.

    Raises:
        BuildError: The parser or the builder failed.
    """
    listener = Listener(emit)
    logger = _logger(library, listener)
    builder = library.Builder(logger)
    if library.__name__ == RTX:
        builder.max_threads = 1  # see `restart_reproducibly`
    network = parse(library, logger, builder, Path(settings["onnx"]))
    _mark_decomposable(network)
    config = _configure(library, builder, settings, emit)
    # TensorRT for RTX chooses kernels on the user's GPU, so it has no timings to cache.
    timed = library.__name__ == CLASSIC and cache is not None
    if timed and cache is not None:
        config.set_timing_cache(config.create_timing_cache(cache.read_bytes() if cache.is_file() else b""), True)
    found = {**_tensors(network), "network_layers": _network_layers(network)}
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError("build", listener.errors[-1] if listener.errors else "the builder gave no reason")
    if timed and cache is not None:
        cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    with output.open("wb") as file:
        file.write(memoryview(engine))
    return {**found, **listener.facts(), "engine_bytes": output.stat().st_size}


def restart_reproducibly() -> None:
    """Restart this script so that it builds the same engine each time, if the system allows it.

    The builder writes some tables in the order of their memory addresses. The restart therefore turns off address-space
    randomization, reduces the environment (which is on the stack) to what the builder needs, and makes its threads take
    turns on one CPU, since concurrent or preempted threads allocate memory in a different order each time.
    """
    if not sys.platform.startswith("linux") or os.environ.get(STARTED):
        return
    libc = ctypes.CDLL(None)
    if libc.personality(libc.personality(0xFFFFFFFF) | ADDR_NO_RANDOMIZE) == -1:
        return
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[os.getpid() % len(cpus)]})
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:  # with SCHED_BATCH, a thread that wakes up does not preempt the running one
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    os.execve(sys.executable, sys.orig_argv, environment | {STARTED: "1", "PYTHONHASHSEED": "0"})


def main(arguments: list[str] | None = None) -> int:
    """The command line of this script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=Path, default=Path(__file__).parent / "tensorrt.json")
    parser.add_argument("--library", choices=(CLASSIC, RTX), default=CLASSIC)
    parser.add_argument("--output", type=Path, help="engine to write")
    parser.add_argument("--timing-cache", type=Path, help="file to read and to update (classic TensorRT)")
    parser.add_argument("--events", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    stream = given.events.open("w", buffering=1) if given.events is not None else sys.stderr

    def emit(kind: str, fields: Mapping[str, Any]) -> None:
        if given.events is not None:
            stream.write(json.dumps({"kind": kind, **fields}) + "\n")
        elif kind == "log":
            stream.write(f"[{fields['severity']}] {fields['message']}\n")

    settings = json.loads(given.settings.read_text())
    folder = given.settings.parent
    output = (given.output or folder / ENGINES[given.library]).resolve()
    cache = None if given.timing_cache is None else given.timing_cache.resolve()
    # The engine stores the path of the model, so it must not depend on the directory.
    os.chdir(folder)
    start = time.perf_counter()
    try:
        library = importlib.import_module(given.library)
        found = build(library, settings, output, cache, emit)
    except BuildError as error:
        emit("failed", error.fields)
        print(f"{error.fields['stage']} failed: {error} {error.fields['node']}", file=sys.stderr)
        return FAILED
    emit("done", {"found": found, "version": library.__version__, "seconds": time.perf_counter() - start})
    print(f"{output}: {output.stat().st_size} bytes, {library.__name__} {library.__version__}")
    return 0


if __name__ == "__main__":
    if RTX in sys.argv:  # engines of classic TensorRT always differ: it chooses kernels by their time on the GPU
        restart_reproducibly()
    sys.exit(main())
