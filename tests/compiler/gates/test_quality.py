"""The quality gate: what it measures, when it passes, and that it works through any Runner."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moec.compiler.common.errors import CheckpointError
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.gates import reference
from moec.compiler.gates.quality import EXIT_CODE, QualityOptions, judge_quality, not_run
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.lockstep import Lockstep
from moec.compiler.ir.program import Program
from moec.compiler.text.perplexity import compare, kl_divergence, log_softmax
from moec.targets.runners import RunnerLimits

VOCAB = 4096
PROGRAM: Any = SimpleNamespace(config={"max_position_embeddings": 512})


class Bigram:
    """A model whose logits depend on the last token alone; it takes one sequence at a time."""

    def __init__(self, noise: float = 0.0, *, longest: int | None = None) -> None:
        random = np.random.default_rng(0)
        self._table = random.standard_normal((64, VOCAB)).astype(np.float32)
        self._table += noise * np.random.default_rng(1).standard_normal((64, VOCAB)).astype(np.float32)
        self.limits = RunnerLimits(max_batch=1, max_sequence=longest)
        self.shapes: set[tuple[int, ...]] = set()

    def reset(self) -> None: ...

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:  # noqa: ARG002
        assert input_ids.shape[0] == 1
        self.shapes.add(input_ids.shape)
        return self._table[input_ids % 64]

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:  # noqa: ARG002
        raise AssertionError("teacher forcing needs no decode step")

    def facts(self) -> Mapping[str, Any]:
        return {}


def judge(golden_model: Path, candidate: Bigram, limit: float, **changes: Any) -> Verdict:
    options = QualityOptions(limit, **{"windows": 12, "window": 64, **changes})
    return judge_quality(PROGRAM, lambda _: Bigram(), candidate, golden_model, options, lambda *_: None)


def test_an_equal_model_passes_even_without_any_tolerance(golden_model: Path) -> None:
    verdict = judge(golden_model, Bigram(), 0.0)
    assert verdict.status is Status.PASS
    assert verdict.figures["increase"] == 0
    assert verdict.figures["divergence"] == 0
    assert verdict.figures["top1_agreement"] == 1


def test_the_divergence_of_each_window_is_known_for_paired_comparisons() -> None:
    ids = np.random.default_rng(2).integers(0, VOCAB, (3, 16))
    found = compare(Bigram(), Bigram(0.5), ids)
    alone = [compare(Bigram(), Bigram(0.5), window[None]).divergence for window in ids]
    assert found.divergences == pytest.approx(alone)
    assert found.divergence == pytest.approx(np.mean(alone))
    assert len(set(alone)) == 3
    first, second = (log_softmax(model.prefill(ids[:1])[0, :-1]).astype(float) for model in (Bigram(), Bigram(0.5)))
    assert alone[0] == pytest.approx((np.exp(first) * (first - second)).sum(-1).mean(), rel=1e-4)


def test_the_reference_runs_windows_together(
    capture_of: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, told = capture_of("mixtral"), list[int]()
    windows = np.random.default_rng(0).integers(0, program.vocab_size, (5, 12))
    monkeypatch.setattr(reference, "AHEAD", 3 * 12 * program.vocab_size * 4)
    real = Lockstep.run_together
    monkeypatch.setattr(Lockstep, "run_together", lambda own, steps: told.append(len(steps)) or real(own, steps))
    model, alone = reference.Ahead(program, windows), ProgramRunner(program)
    for window in windows:
        np.testing.assert_array_equal(model.prefill(window[None]), alone.prefill(window[None]))
    assert told == [3, 2]


def test_a_worse_model_fails_with_the_exit_code_of_quality(golden_model: Path) -> None:
    verdict = judge(golden_model, Bigram(0.5), 0.01)
    assert verdict.status is Status.FAIL
    assert verdict.exit_code == EXIT_CODE == 7
    low, high = verdict.figures["interval"]
    assert 0.01 < low < verdict.figures["increase"] < high
    # The mean of exp(noise) over a softmax is exp(variance / 2): that is the expected rise of perplexity.
    assert verdict.figures["increase"] == pytest.approx(np.expm1(0.125), abs=0.05)
    assert judge(golden_model, Bigram(0.5), 0.5).status is Status.PASS


def test_an_interval_that_reaches_beyond_the_limit_is_no_proof(golden_model: Path) -> None:
    first = judge(golden_model, Bigram(0.5), 0.5).figures
    between = (first["increase"] + first["interval"][1]) / 2
    verdict = judge(golden_model, Bigram(0.5), between)
    assert verdict.status is Status.FAIL
    assert "more windows" in verdict.summary


def test_windows_are_as_long_as_model_and_runner_allow(golden_model: Path) -> None:
    candidate = Bigram(longest=48)
    verdict = judge(golden_model, candidate, 1.0)
    assert candidate.shapes == {(1, 48)}
    assert verdict.figures["text"]["tokens"] == 12 * 47


def test_nan_never_passes(golden_model: Path) -> None:
    assert judge(golden_model, Bigram(float("nan")), 1.0).status is Status.FAIL


def test_it_tells_how_far_it_is(golden_model: Path) -> None:
    told: list[tuple[str, int, int]] = []
    options = QualityOptions(1.0, windows=3, window=32)
    judge_quality(PROGRAM, lambda _: Bigram(), Bigram(), golden_model, options, lambda *step: told.append(step))
    assert told == [("quality", 1, 3), ("quality", 2, 3), ("quality", 3, 3)]


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "empty"), (b"\0\1\2\xff", "not UTF-8"), (b"too short", "fewer than one window")]
)
def test_text_that_does_not_serve_is_an_error(golden_model: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        judge(golden_model, Bigram(), 1.0, text=str(tmp_path / "text.txt"))
    assert error.value.exit_code == 10


def test_no_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer"):
        judge(tmp_path, Bigram(), 1.0)


def test_without_a_limit_it_does_not_run_and_does_not_pass() -> None:
    assert not_run().status is Status.NOT_RUN


def test_the_divergence_is_that_of_its_formula() -> None:
    same = [0.1, 0.8, 0.1]
    first, second = (np.log(np.array([row, same], np.float32)) for row in ([0.5, 0.25, 0.25], [0.125, 0.75, 0.125]))
    # 0.5 log 4 + 0.25 log(1 / 3) + 0.25 log 2, and nothing where both are the same
    assert kl_divergence(first, second) == pytest.approx(1.25 * np.log(2) - 0.25 * np.log(3), rel=1e-6)
