"""Parity passes what is right and nothing else."""

# ruff: noqa: ARG001, ARG002 - the arguments are those of the protocols

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.frontend import streamed, turns
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates import noise, parity, reference
from moec.compiler.gates.cases import Case, Prompts
from moec.compiler.gates.compare import CaseResult, Output, compare
from moec.compiler.gates.parity import (
    Evidence,
    ParityOptions,
    check_capture,
    gather_artifact,
    judge_parity,
)
from moec.compiler.gates.reference import Trace
from moec.compiler.gates.tolerance import TOLERANCES, Precision, precision_of
from moec.compiler.gates.usage import Usage
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.lockstep import Lockstep
from moec.compiler.ir.program import ATTENTION, Program
from moec.passes.quantize import Quantize
from moec.quantize.formats import Activations
from moec.quantize.plan import requested, with_activations
from moec.targets.runners import Runner, RunnerLimits

from .conftest import OPTIONS, Wrapped, changed, prompts, zero_4kb  # noqa: TID252 - tests are no package with a name of its own

Captured = tuple[Checkpoint, Program]


def check_artifact(program: Program, runner: Runner, given: Prompts, options: ParityOptions) -> Verdict:
    evidence = gather_artifact(program, runner, given, options, lambda *_: None)
    return judge_parity(parity.ARTIFACT_GATE, evidence, options)


def test_capture_equals_transformers(gpt_oss: Captured) -> None:
    checkpoint, program = gpt_oss
    verdict = check_capture(checkpoint, program, prompts(program), OPTIONS)
    assert verdict.status is Status.PASS, verdict.summary
    assert verdict.figures["max_error"] < 1e-5
    names = [case["name"] for case in verdict.figures["cases"]]
    assert {"batch 1, sequence 1, past 9", "batch 2, sequence 5, past 0", "batch 2, sequence 5, past 7"} <= set(names)
    assert {"batch 1, sequence 130, past 0", "left-padded batch of 2"} <= set(names)
    assert any(name.startswith("decode past the sliding window") for name in names)


def test_a_wrong_capture_fails(mixtral: Captured) -> None:
    checkpoint, program = mixtral
    wrong = zero_4kb(program, 0, 2)
    verdict = check_capture(checkpoint, wrong, prompts(program), OPTIONS)
    assert verdict.status is Status.FAIL
    assert verdict.exit_code == 5


def test_a_large_model_gets_the_same_verdict_with_its_weights_read_while_it_runs(
    mixtral: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, program = mixtral
    monkeypatch.setattr(streamed, "SMALLEST", 4096)
    read: list[tuple[int, ...]] = []

    def noted(request: turns.Request) -> torch.Tensor:
        read.append(request.key)
        return turns.ask(request)

    monkeypatch.setattr(streamed, "ask", noted)
    little = dataclasses.replace(OPTIONS, loaded=0)
    verdict = check_capture(checkpoint, program, prompts(program), little)
    assert any(row >= 0 for _, row, _ in read), "no expert was read by itself"
    assert verdict == check_capture(checkpoint, program, prompts(program), OPTIONS)

    wrong = zero_4kb(program, 0, 2)
    assert check_capture(checkpoint, wrong, prompts(program), little).status is Status.FAIL


def test_cases_are_compared_in_parts_of_limited_memory(mixtral: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    program = mixtral[1]
    together = gather_artifact(program, ProgramRunner(program), prompts(program), OPTIONS, lambda *_: None)
    monkeypatch.setattr(reference, "LOGITS", 1)
    seen: list[tuple[int, int]] = []
    runs: list[int] = []
    real = Lockstep.run_together
    monkeypatch.setattr(
        Lockstep, "run_together", lambda own, steps, told: runs.append(len(steps)) or real(own, steps, told)
    )

    def told(_: str, done: int, total: int) -> None:
        seen.append((done, total))

    one_by_one = gather_artifact(program, ProgramRunner(program), prompts(program), OPTIONS, told)
    assert len(runs) == len(together.results)
    assert one_by_one.results == together.results
    assert one_by_one.usage.figures() == together.usage.figures()
    assert [done / total for done, total in seen] == sorted(done / total for done, total in seen)
    assert seen[-1] == (1, 1)


def test_the_capture_may_be_left_out_and_is_no_pass_then(mixtral: Captured) -> None:
    checkpoint, program = mixtral
    verdict = check_capture(checkpoint, program, prompts(program), dataclasses.replace(OPTIONS, capture=False))
    assert verdict.status is Status.NOT_RUN


def test_a_right_artifact_passes(gpt_oss: Captured) -> None:
    program = gpt_oss[1]
    verdict = check_artifact(program, ProgramRunner(program), prompts(program), OPTIONS)
    assert verdict.status is Status.PASS, verdict.summary
    assert "12 greedy tokens identical" in verdict.summary
    assert verdict.figures["excused"] == 0


@pytest.mark.parametrize("expert", range(8))
def test_4_kb_of_any_expert_are_missed_by_no_input_set(mixtral: Captured, expert: int) -> None:
    program = mixtral[1]
    verdict = check_artifact(program, ProgramRunner(zero_4kb(program, 1, expert)), prompts(program), OPTIONS)
    assert verdict.status is Status.FAIL


def test_a_wrong_window_fails(gpt_oss: Captured) -> None:
    program = gpt_oss[1]
    graph = program.copy_graph()
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        if node.args[9] == "sliding":
            node.args = (*node.args[:10], int(node.args[10]) + 1, *node.args[11:])
    verdict = check_artifact(program, ProgramRunner(program.replace(graph=graph)), prompts(program), OPTIONS)
    assert verdict.status is Status.FAIL
    # Short sequences cannot tell: the verdict stands on the cases beyond the window.
    wrong = {case["name"] for case in verdict.figures["cases"] if case["error"] > 1e-4}
    assert "batch 2, sequence 5, past 0" not in wrong
    assert any(name.startswith("prefill past the sliding window") for name in wrong)


def test_an_ignored_padding_mask_fails(mixtral: Captured) -> None:
    program = mixtral[1]

    class Ignores(ProgramRunner):
        def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
            return super().decode(input_ids, None)

    verdict = check_artifact(program, Ignores(program), prompts(program), OPTIONS)
    assert verdict.status is Status.FAIL
    assert [case["name"] for case in verdict.figures["cases"] if case["error"] > 1e-4] == ["left-padded batch of 2"]


def test_one_nan_fails(mixtral: Captured) -> None:
    program = mixtral[1]

    def spoil(logits: np.ndarray, step: int) -> np.ndarray:
        if step == 3:
            logits[0, -1, 5] = np.nan
        return logits

    verdict = check_artifact(program, Wrapped(program, spoil), prompts(program), OPTIONS)
    assert verdict.status is Status.FAIL
    assert verdict.figures["max_error"] == float("inf")


def test_a_wrong_greedy_token_fails(mixtral: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    program = mixtral[1]
    loose = dataclasses.replace(TOLERANCES[Precision.FP32], limit=10.0)
    monkeypatch.setattr(parity, "TOLERANCES", {Precision.FP32: loose})
    cases = len(check_artifact(program, ProgramRunner(program), prompts(program), OPTIONS).figures["cases"])
    assert cases > 1

    def spoil(logits: np.ndarray, step: int) -> np.ndarray:
        if logits.shape[:2] == (1, 1):  # one decoded token: the runner prefers the worst one
            logits[0, 0] = -logits[0, 0]
        return logits

    verdict = check_artifact(program, Wrapped(program, spoil), prompts(program), OPTIONS)
    assert verdict.status is Status.FAIL
    assert "greedy token 2 of 12 differs" in verdict.summary


def test_logits_of_another_shape_are_an_error(mixtral: Captured) -> None:
    program = mixtral[1]
    with pytest.raises(ArtifactError, match="shape"):
        check_artifact(program, Wrapped(program, lambda logits, _: logits[:, -1:]), prompts(program), OPTIONS)
    with pytest.raises(ArtifactError, match="vocabulary"):
        check_artifact(program, Wrapped(program, lambda logits, _: logits[..., :-1]), prompts(program), OPTIONS)


def test_a_runtime_that_fails_is_a_named_error(mixtral: Captured) -> None:
    class KernelError(Exception):
        """As ONNX Runtime's: derives from Exception alone."""

    def spoil(logits: np.ndarray, step: int) -> np.ndarray:
        raise KernelError("no kernel")

    with pytest.raises(ArtifactError, match="KernelError: no kernel"):
        check_artifact(mixtral[1], Wrapped(mixtral[1], spoil), prompts(mixtral[1]), OPTIONS)


def _tie(program: Program) -> tuple[Program, Program]:
    """A router that scores two experts alike, and the same with one of them a hair ahead."""
    name = "model.layers.1.mlp.gate.weight"

    def same(weight: torch.Tensor) -> None:
        weight[3] = weight[5]

    def nudge(weight: torch.Tensor) -> None:
        weight[3] = weight[5] * (1 + 1e-6)

    return changed(program, name, same), changed(program, name, nudge)


def test_ties_are_excused_by_rule_and_not_without_limit(mixtral: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    program, flipped = _tie(mixtral[1])
    lenient = dataclasses.replace(OPTIONS, max_excused=1.0)
    verdict = check_artifact(program, ProgramRunner(flipped), prompts(program), lenient)
    assert verdict.status is Status.PASS, verdict.summary
    assert verdict.figures["excused"] > 0
    assert "excused by router ties" in verdict.summary

    strict = dataclasses.replace(lenient, max_excused=0.0)
    verdict = check_artifact(program, ProgramRunner(flipped), prompts(program), strict)
    assert verdict.status is Status.PASS, verdict.summary
    assert verdict.figures["sensitive"] > 0
    assert "which rounding explains in this model" in verdict.summary

    monkeypatch.setattr(noise, "RUNS", ())
    verdict = check_artifact(program, ProgramRunner(flipped), prompts(program), strict)
    assert verdict.status is Status.FAIL
    assert "proves nothing" in verdict.summary

    blind = dataclasses.replace(TOLERANCES[Precision.FP32], tie_margin=0.0)
    monkeypatch.setattr(parity, "TOLERANCES", {Precision.FP32: blind})
    assert check_artifact(program, ProgramRunner(flipped), prompts(program), lenient).status is Status.FAIL


def test_excused_positions_prove_no_expert(mixtral: Captured) -> None:
    program, flipped = _tie(mixtral[1])
    options = dataclasses.replace(OPTIONS, max_excused=1.0)
    clean = gather_artifact(program, ProgramRunner(program), prompts(program), options, lambda *_: None)
    tied = gather_artifact(program, ProgramRunner(flipped), prompts(program), options, lambda *_: None)

    def tokens(evidence: parity.Evidence) -> int:
        return sum(sum(layer["tokens"]) for layer in evidence.usage.figures()["layers"])

    excused = sum(result.excused for result in tied.results)
    generated = OPTIONS.greedy_tokens  # the generated tokens may differ: compare what does not
    assert tokens(tied) <= tokens(clean) - 4 * (excused - generated)


class LastAlone(ProgramRunner):
    """Computes the logits of one token alone on request: that of slot `place`, which should be the last."""

    place = -1

    def decode_last(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        row: np.ndarray = self.decode(input_ids, attention_mask)[:, self.place]
        return row


@pytest.mark.parametrize(("place", "status"), [(-1, Status.PASS), (0, Status.FAIL)])
def test_logits_of_the_last_token_alone_are_judged(place: int, status: Status, mixtral: Captured) -> None:
    """Sessions feed prompts in this way, so a runner that is right otherwise fails."""
    program = mixtral[1]
    runner = LastAlone(program)
    runner.place = place
    assert check_artifact(program, runner, prompts(program), OPTIONS).status is status


class Limited(ProgramRunner):
    """A phone: one sequence, no padding, 20 tokens, one decoded token at a time."""

    limits = RunnerLimits(max_batch=1, padding=False, max_sequence=20, prefill_lengths=(8,), max_decode=1)

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        assert attention_mask is None
        assert input_ids.shape[0] == 1
        self.length = 0
        return super().prefill(input_ids, attention_mask)

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        assert self.length == 0 or input_ids.shape[1] == 1
        self.length += input_ids.shape[1]
        assert self.length <= 20
        return super().decode(input_ids, attention_mask)


def test_limits_of_a_runner_are_kept_and_reported(mixtral: Captured) -> None:
    program = mixtral[1]
    verdict = check_artifact(program, Limited(program), prompts(program), parity.ParityOptions())
    assert verdict.status is Status.PASS, verdict.summary
    for left_out in ("batch 2", "left padding", "513 tokens", "greedy tokens"):
        assert left_out in verdict.summary
    names = [case["name"] for case in verdict.figures["cases"]]
    assert "batch 1, sequence 8, past 0" in names
    assert "batch 1, sequence 9, past 0" in names


def test_verdicts_repeat(mixtral: Captured) -> None:
    program = mixtral[1]
    first, second = (check_artifact(program, ProgramRunner(program), prompts(program), OPTIONS) for _ in range(2))
    assert first == second


def test_prompts_are_text_where_there_is_a_tokenizer(golden_model: Path, tmp_path: Path) -> None:
    golden = Prompts.of(golden_model, 4096)
    assert golden.source == "calibration text"
    assert Prompts.of(tmp_path, 4096).source == "random ids"
    ids = golden.text(2, 50)
    assert ids.shape == (2, 50)
    assert ids.max() < 4096
    assert (ids == Prompts.of(golden_model, 4096).text(2, 50)).all()


def test_precision_is_that_of_the_coarsest_part(mixtral: Captured) -> None:
    program = mixtral[1]
    assert precision_of(program) is Precision.FP32
    assert precision_of(program.replace(dtype=torch.float16)) is Precision.FP16


RIGHT = CaseResult("right", 2e-2, 0.0, positions=100, excused=5, tied=5, top1=0.94, divergence=1e-3, agreed=92)


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({}, Status.PASS, "mean KL at most 1.0e-03 (limit 5e-03)"),
        ({"divergence": 6e-3}, Status.FAIL, "mean KL at most 6.0e-03"),
        ({"divergence": float("inf")}, Status.FAIL, "mean KL at most inf"),
        ({"agreed": 0}, Status.FAIL, "the same most likely token at 64.6% of the positions (limit 90%)"),
        ({"error": 6e-2}, Status.FAIL, "2 of 3 cases out of tolerance"),
        (
            {"sensitive": 30, "sensitive_error": 0.3, "agreed": 64},
            Status.PASS,
            "30 positions differ by up to 3.0e-01, which rounding explains in this model",
        ),
    ],
)
def test_rounded_activations_are_judged_by_the_distributions_too(
    changes: dict[str, float], status: Status, text: str, mixtral: Captured
) -> None:
    """One bad case fails it; excused positions count for neither side."""
    other = dataclasses.replace(RIGHT, name="other", **changes)  # type: ignore[arg-type]
    results = [RIGHT, other, RIGHT] if "agreed" in changes else [RIGHT, other, other]
    evidence = Evidence(Precision.INT8_DYNAMIC, Usage(mixtral[1].layers), "random ids", results=results)
    verdict = judge_parity(parity.ARTIFACT_GATE, evidence, ParityOptions())
    assert verdict.status is status
    assert text in verdict.summary


@pytest.mark.parametrize(("sensitive", "status"), [(70, Status.PASS), (71, Status.FAIL)])
def test_a_quarter_of_the_positions_must_be_proven(sensitive: int, status: Status, mixtral: Captured) -> None:
    """Of 100 positions, ties excuse 5."""
    result = dataclasses.replace(RIGHT, sensitive=sensitive, agreed=95 - sensitive)
    verdict = judge_parity(
        parity.ARTIFACT_GATE,
        Evidence(Precision.INT8_DYNAMIC, Usage(mixtral[1].layers), "random ids", results=[result]),
        ParityOptions(),
    )
    assert verdict.status is status
    assert ("fewer than 25% of the positions" in verdict.summary) == (status is Status.FAIL)
    assert verdict.figures["sensitive"] == sensitive


@pytest.mark.parametrize("precision", [Precision.INT8_DYNAMIC, Precision.INT4])
def test_the_divergence_of_a_case_is_measured_where_it_is_judged(precision: Precision) -> None:
    """Logits 2 and 0 against 0 and 2 at one of two positions: KL = 2 tanh(1), and 0 at the other."""
    want = np.array([[[2.0, 0.0], [2.0, 0.0]]], np.float32)
    got = np.array([[[0.0, 2.0], [2.0, 0.0]]], np.float32)
    ids = np.zeros((1, 2), np.int64)
    trace = Trace(want, np.zeros((1, 2), bool), {})
    result, _ = compare(Case("case", ids, None, (2,)), Output(ids, got), trace, TOLERANCES[precision])
    expected = np.tanh(1) if precision is Precision.INT8_DYNAMIC else 0.0
    assert result.divergence == pytest.approx(expected, abs=1e-6)
    assert result.agreed == 1


def test_rounded_activations_are_the_coarsest_precision(mixtral: Captured) -> None:
    program = mixtral[1]
    plans = [requested("int8:channel"), with_activations(requested("int8:channel"), Activations.INT8_DYNAMIC)]
    found = [precision_of(Quantize(plan).run(program).program) for plan in plans]
    assert found == [Precision.INT8, Precision.INT8_DYNAMIC]
