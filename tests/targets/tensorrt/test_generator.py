"""The engine's runner with its fixed buffers, over a session that is memory here and model.onnx in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from moec import passes
from moec.compiler.common.errors import ArtifactError, MissingExtraError, UsageError
from moec.compiler.ir.interpreter import ProgramRunner
from moec.passes.inputs_embeds import NAME, InputsEmbeds
from moec.passes.routing.dynamic_routing import BUDGET_INPUT, DynamicRouting
from moec.passes.routing.policies.ratio import Ratio
from moec.targets.onnx.states import NUMPY
from moec.targets.tensorrt import engine
from moec.targets.tensorrt.doctor import Gpu
from moec.targets.tensorrt.generator import EngineRunner, Rows
from moec.targets.tensorrt.settings import Bounds, EngineSettings
from tests.support.compensations import compensated


class FakeSession:
    """Memory as bytes, and an engine that is model.onnx."""

    def __init__(self, model: Path, profiles: list[Mapping[str, Any]]) -> None:
        self.memory = np.zeros(1 << 24, np.uint8)
        self.end, self.calls = 64, []
        self.profiles = {profile.name: profile.inputs for profile in profiles}
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def allocate(self, nbytes: int) -> int:
        address, self.end = self.end, self.end + nbytes
        assert self.end <= self.memory.size
        # What was never written must not matter.
        return address

    def write(self, address: int, array: np.ndarray) -> None:
        self.memory[address : address + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)

    def read(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.memory[address : address + size].copy().view(dtype).reshape(shape)

    def copy_rows(self, source: Rows, destination: Rows, width: int, count: int) -> None:
        for row in range(count):
            start, to = source.address + row * source.pitch, destination.address + row * destination.pitch
            self.memory[to : to + width] = self.memory[start : start + width].copy()

    def execute(self, profile: str, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        self.calls.append((profile, dict(shapes)))
        feeds = {}
        for spec in self.session.get_inputs():
            shape = shapes.get(spec.name, ())
            for size, low, high in zip(shape, *self._bounds(profile, spec.name), strict=False):
                assert low <= size <= high, (profile, spec.name, shape)
            feeds[spec.name] = self.read(addresses[spec.name], shape, NUMPY[spec.type])
        names = [spec.name for spec in self.session.get_outputs()]
        for name, value in zip(names, self.session.run(names, feeds), strict=True):
            self.write(addresses[name], value)

    def _bounds(self, profile: str, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        shapes = self.profiles[profile].get(name, Bounds(min=(), opt=(), max=()))
        return shapes.min, shapes.max

    def facts(self) -> Mapping[str, Any]:
        return {"runtime": "fake"}


def opened(model: Any) -> tuple[EngineRunner, FakeSession]:
    settings = EngineSettings.read(model.directory)
    session = FakeSession(model.directory / "model.onnx", settings.profiles)
    return EngineRunner(session, settings, model.lowered.signature), session


@pytest.fixture(scope="module")
def sliding(tiny_checkpoint: Any, program_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with windows, sinks and biases, for two sequences of 24 tokens in pieces of 8."""
    from tests.targets.tensorrt.conftest import lower_program

    program = program_of(tiny_checkpoint("gpt_oss"))
    return lower_program(program, tmp_path_factory.mktemp("x") / "artifact", batch=2, context=24, piece=8)


def test_tokens_in_pieces_and_one_by_one(sliding: Any) -> None:
    runner, session = opened(sliding)
    ids = np.random.default_rng(1).integers(3, sliding.program.vocab_size, (2, 24))
    want = ProgramRunner(sliding.program).prefill(ids)
    for _ in range(2):
        got = [runner.prefill(ids[:, :19])] + [runner.decode(ids[:, step : step + 1]) for step in range(19, 24)]
        np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=2e-5 * np.abs(want).max())
    profiles = [profile for profile, _ in session.calls]
    assert profiles[:8] == ["prefill"] * 3 + ["decode"] * 5
    # Every decode step has the same shapes: that is what lets it be recorded.
    assert len({str(shapes) for profile, shapes in session.calls if profile == "decode"}) == 1


def test_an_input_with_a_row_for_each_token(capture_of: Any, lower: Any) -> None:
    """Embeddings of two sequences, in pieces of 8 and one by one, and zeros again where there are none."""
    program, _ = passes.run_passes(capture_of("mixtral"), (InputsEmbeds(), *passes.default_passes()))
    runner, _ = opened(lower(program, batch=2, context=24, piece=8))
    random = np.random.default_rng(5)
    ids = random.integers(3, program.vocab_size, (2, 19))
    words = ProgramRunner(program).prefill(ids)
    ids[:, [2, 9, 17, 18]] = -1
    rows = random.standard_normal((2, 19, int(program.inputs[-1].shape[-1]))).astype(np.float32)
    want = ProgramRunner(program.replace(input_defaults={NAME: torch.from_numpy(rows)})).prefill(ids)
    got = []
    runner.reset()
    for first, last in ((0, 17), (17, 18), (18, 19)):
        runner.overrides[NAME] = rows[:, first:last]
        got.append(runner.decode(ids[:, first:last]))
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=2e-5 * np.abs(want).max())
    del runner.overrides[NAME]
    ids[ids < 0] = 0
    without = ProgramRunner(program).prefill(ids)
    np.testing.assert_allclose(runner.prefill(ids), without, atol=2e-5 * np.abs(words).max())


def test_a_budget_is_fed_or_its_default(program_of: Any, lower: Any) -> None:
    program = DynamicRouting(Ratio(beta=0.9), runtime_budget=True).run(program_of("mixtral")).program
    runner, _ = opened(lower(program, context=24))
    ids = np.arange(3, 15)[None]
    for override, reference in ((None, program), (0.0, program_of("mixtral")), (None, program)):
        runner.overrides = {} if override is None else {BUDGET_INPUT: np.asarray(override, np.float32)}
        want = ProgramRunner(reference).prefill(ids)
        np.testing.assert_allclose(runner.prefill(ids), want, atol=2e-5 * np.abs(want).max())


def test_what_stands_in_for_dropped_experts_is_added(program_of: Any, lower: Any) -> None:
    program = compensated(program_of("mixtral"), Ratio(beta=0.9, renormalize=False))
    runner, _ = opened(lower(program, context=24))
    ids = np.arange(3, 15)[None]
    want = ProgramRunner(program).prefill(ids)
    np.testing.assert_allclose(runner.prefill(ids), want, atol=2e-5 * np.abs(want).max())


def test_left_padding(sliding: Any) -> None:
    runner, _ = opened(sliding)
    ids = np.random.default_rng(2).integers(3, sliding.program.vocab_size, (2, 12))
    mask = np.ones((2, 12), np.int64)
    mask[1, :5] = 0
    got = np.concatenate([runner.prefill(ids[:, :9], mask[:, :9]), runner.decode(ids[:, 9:], mask)], axis=1)
    whole, part = (ProgramRunner(sliding.program).prefill(row) for row in (ids[:1], ids[1:, 5:]))
    np.testing.assert_allclose(got[:1], whole, atol=2e-5 * np.abs(whole).max())
    np.testing.assert_allclose(got[1:, 5:], part, atol=2e-5 * np.abs(part).max())


def test_a_state_that_is_no_cache(tiny_checkpoint: Any, program_of: Any, lower: Any) -> None:
    """Short convolutions: their state has one size, starts as zeros and is kept over pieces and steps."""
    model = lower(program_of(tiny_checkpoint("lfm2_moe")), batch=2, context=24, piece=8)
    runner, session = opened(model)
    session.memory[:] = 0x3F  # what was never written must not be taken for zeros
    ids = np.random.default_rng(4).integers(3, model.program.vocab_size, (2, 20))
    mask = np.ones((2, 20), np.int64)
    mask[1, :2] = 0
    whole, part = (ProgramRunner(model.program).prefill(row) for row in (ids[:1], ids[1:, 2:]))
    for _ in range(2):
        got = [runner.prefill(ids[:, :17], mask[:, :17])]
        got += [runner.decode(ids[:, step : step + 1], mask[:, : step + 1]) for step in range(17, 20)]
        joined = np.concatenate(got, axis=1)
        np.testing.assert_allclose(joined[:1], whole, atol=2e-5 * np.abs(whole).max())
        np.testing.assert_allclose(joined[1:, 2:], part, atol=2e-5 * np.abs(part).max())
    # One sequence after two: what is left of the second must not matter.
    alone = np.concatenate([runner.prefill(ids[:1, :9]), runner.decode(ids[:1, 9:])], axis=1)
    np.testing.assert_allclose(alone, whole, atol=2e-5 * np.abs(whole).max())


def test_what_does_not_fit_is_refused(sliding: Any) -> None:
    runner, _ = opened(sliding)
    assert (runner.limits.max_batch, runner.limits.max_sequence) == (2, 24)
    runner.prefill(np.full((1, 24), 3))
    with pytest.raises(UsageError, match="the engine holds 2 of 24") as caught:
        runner.decode(np.full((1, 1), 3))
    assert "--context" in caught.value.hint
    with pytest.raises(UsageError, match="3 sequences"):
        runner.prefill(np.full((3, 1), 3))


def test_inputs_that_a_pass_added_have_their_values(
    tiny_checkpoint: Any, program_of: Callable[..., Any], lower: Callable[..., Any]
) -> None:
    program = program_of(tiny_checkpoint("mixtral"), later=(DynamicRouting(Ratio(beta=0.9), True),))
    model = lower(program, context=16)
    runner, _ = opened(model)
    ids = np.arange(3, 15)[None]
    want = ProgramRunner(program).prefill(ids)
    for other in (runner, model.runner):
        np.testing.assert_allclose(other.prefill(ids), want, atol=2e-5 * np.abs(want).max())


def test_the_gpu_session_speaks_to_library_and_driver(tmp_path: Path) -> None:
    """What it calls, in which order, without either."""
    log: list[Any] = []

    class Context:
        def __init__(self, *arguments: Any) -> None:
            log.append(("context", [item.cuda_graph_strategy for item in arguments]))

        def __getattr__(self, name: str) -> Any:
            return lambda *values: log.append((name, *values)) or True

    class Logger:
        ERROR = 1

        def __init__(self, level: int) -> None:
            assert level == self.ERROR

    holder = SimpleNamespace(create_runtime_config=SimpleNamespace, create_execution_context=Context)
    library = SimpleNamespace(
        __name__="tensorrt_rtx",
        __version__="1",
        Logger=Logger,
        Runtime=lambda _: SimpleNamespace(deserialize_cuda_engine=lambda data: holder if data == b"engine" else None),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="graph"),
    )

    class Cuda:
        cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)  # noqa: N815

        def __getattr__(self, name: str) -> Any:
            def call(*values: Any) -> tuple[int, ...]:
                log.append((name, *values))
                return (2,) if values[:1] == (1 << 60,) else (0, 4096)

            return call

    path = tmp_path / "model.rtx.engine"
    path.write_bytes(b"engine")
    profiles = ("decode", "prefill")
    session = engine.GpuSession(path, profiles, library, Cuda())
    assert [entry for entry in log if entry[0] == "context"] == [("context", ["graph"])] * 2
    assert [entry[1] for entry in log if entry[0] == "set_optimization_profile_async"] == [0, 1]
    log.clear()
    session.execute("prefill", {"input_ids": (1, 4)}, {"input_ids": 64, "logits": 128})
    assert [entry[0] for entry in log] == [
        "set_input_shape",
        "set_tensor_address",
        "set_tensor_address",
        "execute_async_v3",
    ]
    session.copy_rows(Rows(100, 20), Rows(200, 30), 10, 3)
    assert log[-1] == ("cudaMemcpy2DAsync", 200, 30, 100, 20, 10, 3, 3, 4096)
    with pytest.raises(RuntimeError, match="CUDA: 2"):
        session.allocate(1 << 60)
    path.write_bytes(b"other")
    with pytest.raises(ArtifactError, match="cannot load it"):
        engine.GpuSession(path, profiles, library, Cuda())


SETTINGS = EngineSettings(
    onnx="model.onnx",
    library="tensorrt_rtx",
    library_version="1.7.1.116",
    engine="model.rtx.engine",
    compute_capabilities=("8.6",),
    experts="gather",
    batch=1,
    context=64,
    piece=16,
    workspace_mib=0,
    weight_streaming=False,
    input_defaults={},
    profiles=(),
    trtexec="",
)


def test_an_engine_of_another_version_is_refused() -> None:
    engine.check_version(SETTINGS, "1.7.1.116")
    with pytest.raises(ArtifactError, match=r"older than the 1\.10\.0\.1 installed") as caught:
        engine.check_version(SETTINGS, "1.10.0.1")
    assert "build_engine.py" in caught.value.hint
    with pytest.raises(ArtifactError, match="newer"):
        engine.check_version(SETTINGS, "1.6.9.999")


def test_why_an_engine_does_not_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        Gpu(): "no GPU (no CUDA driver)",
        Gpu("13.0"): "no GPU (the driver finds none)",
        Gpu("13.0", "H200", "9.0"): "H200 has compute capability 9.0",
        Gpu("13.0", "A10", "8.6"): "",
    }
    for gpu, reason in answers.items():
        monkeypatch.setattr(engine, "find_gpu", lambda gpu=gpu: gpu)
        assert engine.why_engine_cannot_run(SETTINGS) == reason
    assert engine.why_engine_cannot_run(SETTINGS.model_copy(update={"engine": None})) == "no engine was built"


def test_no_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(engine.importlib, "import_module", missing)
    with pytest.raises(MissingExtraError) as caught:
        engine._cuda()
    assert caught.value.exit_code == 8
    assert "moec[tensorrt]" in caught.value.hint


@pytest.mark.gpu
def test_the_real_engine(tiny_checkpoint: Any, tmp_path: Path) -> None:
    """Export for the GPU of this machine: the gate runs the engine on the cases of the parity gate."""
    from moec.compiler.pipeline.export import compile_recipe
    from moec.compiler.pipeline.recipe import make_recipe
    from moec.targets.tensorrt.doctor import find_gpu

    fields = {"checkpoint": str(tiny_checkpoint("mixtral")), "target": "tensorrt"}
    options = {"compute_capability": [find_gpu().capability]}
    result = compile_recipe(make_recipe({**fields, "options": options}, where="test"), tmp_path / "out")
    verdicts = {verdict.gate: verdict.status for verdict in result.verdicts}
    assert verdicts["engine: execution"] == "pass"
