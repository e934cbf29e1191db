"""Programs made with coremltools' builder, converted and saved; never executed by Core ML."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.ir.program import Program
from moec.targets.coreml.executor import MilModel
from moec.targets.coreml.library import coremltools_module, quiet
from moec.targets.coreml.runner import CoremlRunner
from moec.targets.coreml.target import CoremlOptions, CoremlTarget

Build = Callable[..., Any]


class Builder:
    """Builds functions with `mb` and saves them, with no pass that would rewrite what was built."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ct = coremltools_module()
        self.mil = coremltools_module("coremltools.converters.mil.mil")
        self.mb = coremltools_module("coremltools.converters.mil").Builder
        self._count = 0

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """For conversions. Models own temporary folders and lie in reference cycles: collected in a later
        test, their ResourceWarning would fail that test."""
        with quiet():
            yield
            gc.collect()

    def dtype(self, dtype: np.dtype[Any]) -> Any:
        return self.mil.types.numpy_type_to_builtin_type(dtype)

    def placeholder(self, shape: tuple[Any, ...], dtype: Any = np.float32) -> Any:
        return self.mb.placeholder(shape, self.dtype(np.dtype(dtype)))

    def state(self, shape: tuple[int, ...], dtype: Any = np.float16) -> Any:
        return self.mb.state_tensor_placeholder(shape, self.dtype(np.dtype(dtype)))

    def function(self, inputs: Mapping[str, Any], body: Build, target: str = "iOS18") -> Any:
        """`body` is called with the input variables by name and returns one or several outputs."""
        opset = getattr(self.ct.target, target)
        with quiet(), self.mil.Function(dict(inputs), opset_version=opset) as function:
            outputs = body(**function.inputs)
            function.set_outputs(list(outputs) if isinstance(outputs, (list, tuple)) else [outputs])
        return function

    def save(
        self,
        inputs: Mapping[str, Any],
        body: Build,
        *,
        target: str = "iOS18",
        precision: str = "fp32",
        optimize: bool = False,
    ) -> Path:
        program = self.mil.Program()
        program.add_function("main", self.function(inputs, body, target))
        self._count += 1
        path = self.directory / f"model{self._count}.mlpackage"
        exact = precision == "fp32"
        with self.quiet():
            self.ct.convert(
                program,
                minimum_deployment_target=getattr(self.ct.target, target),
                compute_precision=self.ct.precision.FLOAT32 if exact else self.ct.precision.FLOAT16,
                skip_model_load=True,
                **({} if optimize or not exact else {"pass_pipeline": self.ct.PassPipeline.EMPTY}),
            ).save(str(path))
        return path


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("coreml"))


def _call(builder: Builder, build: Build, variables: dict[str, Any]) -> list[Any]:
    """Build one case; booleans, which are no inputs or outputs of a model, travel as integers."""
    result = build(builder.mb, **variables)
    return list(result) if isinstance(result, (list, tuple)) else [result]


@pytest.fixture(scope="module")
def executed(request: pytest.FixtureRequest, builder: Builder) -> dict[str, list[np.ndarray[Any, Any]]]:
    """Results of all `CASES` of the test module, run as one saved program."""
    cases = request.module.CASES
    inputs, feeds, counts = {}, {}, {}
    for name, (_, arrays, _) in cases.items():
        for key, array in arrays.items():
            fed = array.astype(np.int32) if array.dtype == np.bool_ else array
            feeds[f"{name}__{key}"] = fed
            inputs[f"{name}__{key}"] = builder.placeholder(fed.shape, fed.dtype)
    mb = builder.mb

    def body(**variables: Any) -> list[Any]:
        outputs = []
        for name, (build, arrays, _) in cases.items():
            mine = {key: variables[f"{name}__{key}"] for key in arrays}
            for key, array in arrays.items():
                if array.dtype == np.bool_:
                    mine[key] = mb.cast(x=mine[key], dtype="bool")
            results = _call(builder, build, mine)
            counts[name] = len(results)
            for index, result in enumerate(results):
                plain = result.dtype in (builder.dtype(np.dtype(kind)) for kind in ("f4", "f2", "i4"))
                label = f"{name}__out{index}"
                outputs.append(
                    mb.identity(x=result, name=label) if plain else mb.cast(x=result, dtype="int32", name=label)
                )
        return outputs

    results = MilModel.open(builder.save(inputs, body)).session().predict(feeds)
    return {name: [results[f"{name}__out{i}"] for i in range(counts[name])] for name in cases}


@pytest.fixture(scope="module")
def inferred(request: pytest.FixtureRequest, builder: Builder) -> Callable[[str], list[Any]]:
    """coremltools' own value inference of a case; None for each result that it cannot infer."""

    def infer(name: str) -> list[Any]:
        build, arrays, _ = request.module.CASES[name]
        values: list[Any] = []

        def body(unused: Any) -> Any:
            constants = {key: builder.mb.const(val=array) for key, array in arrays.items()}
            values.extend(result.val for result in _call(builder, build, constants))
            return builder.mb.identity(x=unused)

        with np.errstate(all="ignore"):
            builder.function({"unused": builder.placeholder((1,))}, body)
        return values

    return infer


@pytest.fixture
def agrees(request: pytest.FixtureRequest, executed: Any, inferred: Callable[[str], list[Any]]) -> Callable[..., None]:
    """Compares the one result of a case with torch, or with coremltools' value inference."""

    def check(name: str, *, infers: bool = False, rtol: float, atol: float = 1e-6) -> None:
        _, feeds, reference = request.module.CASES[name]
        if infers:
            (expected,) = inferred(name)
            assert expected is not None
        else:
            expected = reference(*(torch.from_numpy(array) for array in feeds.values())).numpy()
        (actual,) = executed[name]
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)

    return check


@dataclass(frozen=True)
class Lowered:
    """A Program, what lowering it said, and where the artifact is."""

    program: Program
    facts: Mapping[str, Any]
    directory: Path

    def runner(self) -> CoremlRunner:
        return CoremlRunner(self.directory)

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.directory.rglob("*") if path.is_file())


def lower_program(program: Program, directory: Path, **options: Any) -> Lowered:
    directory.mkdir()
    target = CoremlTarget()
    lowered = target.lower(program, CoremlOptions(**options), directory, lambda *_: None)
    return Lowered(program, lowered.facts, directory)


@pytest.fixture(scope="session", name="lower")
def lower_fixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Lowered]:
    """Program, options -> what lowering made of it."""

    def run(program: Program, **options: Any) -> Lowered:
        return lower_program(program, tmp_path_factory.mktemp("coreml") / "artifact", **options)

    return run


@pytest.fixture(scope="session")
def golden(program_of: Callable[..., Program], lower: Callable[..., Lowered]) -> Callable[[str], Lowered]:
    """The trained checkpoint as it is lowered to a precision, once per session."""
    dtypes = {"fp32": torch.float32, "fp16": torch.float16}

    @functools.cache
    def lowered(precision: str) -> Lowered:
        return lower(program_of("golden", dtypes[precision]), context=128, prefill_chunk=32)

    return lowered
