"""Gates of the engine itself; the common gates judge `model.onnx`, from which it was built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from moec.compiler.common.verdict import Status, Verdict
from moec.targets.base import GateSubject, TargetGate
from moec.targets.tensorrt.capability import sm
from moec.targets.tensorrt.settings import EngineFacts, EngineSettings

CONTENTS, EXECUTION = "engine: contents", "engine: execution"
EXIT_CODE = 5
NO_ENGINE = "no engine was built (--no-engine)"

WEIGHTS_TOLERANCE = 1.5
"""Tolerance for weights that the builder stores twice: with a transposed copy of lm_head, they took 1.24 times."""
CONSTANTS_TOLERANCE = 1 << 19
"""Tolerance for constants of the kernels: 0.33 MB in a model of 0.60 MB."""

TYPE_NAMES: Mapping[str, str] = {
    "float32": "FLOAT",
    "float16": "HALF",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
}


def judge_contents(subject: GateSubject) -> Verdict:
    """Compare inputs, outputs, and types and bytes of weights in the engine with those of the Program."""
    settings = EngineSettings.read(subject.directory)
    built = settings.built
    if settings.engine is None or built is None:
        return Verdict(CONTENTS, Status.NOT_RUN, NO_ENGINE, EXIT_CODE)
    problems = [*_interface(subject, built), *_weights(subject.facts["weights"], built)]
    problems += _file(subject.directory / settings.engine, built)
    if problems:
        return Verdict(CONTENTS, Status.FAIL, "; ".join(problems[:4]), EXIT_CODE, built.to_json())
    kinds = ", ".join(f"{count} {kind}" for kind, count in built.engine_layers.items())
    summary = (
        f"{built.engine_bytes / 1e6:.1f} MB, {built.weight_bytes / 1e6:.1f} MB of them weights; "
        f"{sum(built.engine_layers.values())} layers"
    )
    return Verdict(CONTENTS, Status.PASS, summary, EXIT_CODE, {**built.to_json(), "kinds": kinds})


def _interface(subject: GateSubject, built: EngineFacts) -> Iterator[str]:
    states = subject.program.states
    wanted = [*(state.input for state in states), *(state.output for state in states)]
    wanted += [spec for spec in subject.program.inputs if spec.name in built.inputs]
    found = {**built.inputs, **built.outputs}
    for spec in wanted:
        dtype = TYPE_NAMES[str(spec.dtype).removeprefix("torch.")]
        have = found.get(spec.name)
        if have is None:
            yield f"{spec.name} is missing"
        elif have[0] != dtype or len(have[1]) != len(spec.shape):
            yield f"{spec.name} is {have[0]} {list(have[1])}, but should be {dtype} with {len(spec.shape)} axes"
    if "logits" not in found:
        yield "logits are missing"


def _weights(planned: Mapping[str, int], built: EngineFacts) -> Iterator[str]:
    for kind in ("Int8", "Int4"):
        # The library also names constants of its kernels, and not all of the model's, so counts cannot be compared.
        if planned.get(kind, 0) and not built.constants.get(kind, 0):
            yield f"no values of type {kind}, but the plan has {planned[kind]}"
    if built.weight_bytes > WEIGHTS_TOLERANCE * planned["bytes"] + CONSTANTS_TOLERANCE:
        yield f"{built.weight_bytes} bytes of weights, but the plan has {planned['bytes']}"


def _file(path: Path, built: EngineFacts) -> Iterator[str]:
    if not path.is_file() or path.stat().st_size != built.engine_bytes:
        yield f"{path.name} is not the file that was built"


def judge_execution(subject: GateSubject) -> Verdict:
    """Parity of the engine itself; not run without a GPU that it was built for."""
    from moec.targets.tensorrt.engine import open_engine, why_engine_cannot_run

    settings = EngineSettings.read(subject.directory)
    if settings.engine is None:
        return Verdict(EXECUTION, Status.NOT_RUN, NO_ENGINE, EXIT_CODE)
    if reason := why_engine_cannot_run(settings):
        built_for = ", ".join(map(sm, settings.compute_capabilities))
        return Verdict(EXECUTION, Status.NOT_RUN, f"built for {built_for}, not executed: {reason}", EXIT_CODE)
    return subject.parity(EXECUTION, open_engine(subject.directory))


GATES = (TargetGate(CONTENTS, EXIT_CODE, judge_contents), TargetGate(EXECUTION, EXIT_CODE, judge_execution))
