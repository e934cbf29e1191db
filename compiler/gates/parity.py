"""Parity in two steps: the captured Program against the model in transformers, the artifact against the final Program.

In both steps the candidate is fed the cases of `moec.compiler.gates.cases` step by step, the reference gets each
sequence as a whole, and every position is compared. Greedy generation is checked in one pass: the artifact generates,
and the reference, given these tokens, must choose each of them; by induction both generate the same text.

Where kernels round activations before they multiply them with a quantized weight, and the target says how
(`Target.activation_rounding`), the reference rounds in the same way. What is left is an error, or a value that float
rounding moves across the border of a quantization step. The cost of the rounding itself is part of the quality gate.

A position that is out of tolerance is judged by the model itself: how much noise of the size of rounding moves it
(`moec.compiler.gates.noise`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from moec.compiler.common.progress import Progress
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.cases import Case, Prompts, base_cases, bounds
from moec.compiler.gates.compare import CaseResult
from moec.compiler.gates.noise import noise_of
from moec.compiler.gates.reference import Oracle, in_parts
from moec.compiler.gates.source import LOADED, open_source
from moec.compiler.gates.tolerance import TOLERANCES, Precision, Tolerance, precision_of
from moec.compiler.gates.trials import Trial
from moec.compiler.gates.usage import Usage
from moec.compiler.ir.interpreter import ActivationRounding, WeightObserver
from moec.compiler.ir.lockstep import Guests
from moec.compiler.ir.program import Program
from moec.compiler.ir.widen import widened
from moec.targets.runners import Runner, RunnerLimits, limits_of

CAPTURE_GATE = "parity: capture"
ARTIFACT_GATE = "parity: artifact"
EXIT_CODE = 5
SHORTER_PROMPT = 130


@dataclass(frozen=True)
class ParityOptions:
    """Settings of the parity and coverage gates.

    Attributes:
        seed: Seed of the inputs.
        greedy_tokens: Number of tokens that are generated greedily.
        long_prompt: Tokens of the longest prompt, which gives work to every thread of the artifact's runtime.
        max_tokens: Longest sequence in tokens; cases of longer attention windows are left out and named.
        coverage_min: Share of the live experts of each layer that the coverage gate runs.
        capture: Whether the captured Program is compared with the model in transformers.
        loaded: Bytes of float32 weights up to which that model is loaded; a larger one reads its weights while it runs.
        max_excused: Largest share of the positions that ties may excuse.
        min_proven: Smallest share of the positions that must be within the limit.
        retries: How often a case is repeated with other tokens because ties excuse too many of its positions.
    """

    seed: int = 0
    greedy_tokens: int = 64
    long_prompt: int = 513
    max_tokens: int = 2560
    coverage_min: float = 1.0
    capture: bool = True
    loaded: int = LOADED
    max_excused: float = 0.2
    min_proven: float = 0.25
    retries: int = 3


@dataclass
class Evidence:
    """The results of a parity step, and what later gates need of it.

    Attributes:
        precision: Precision whose tolerance applies.
        usage: The experts that the compared positions used.
        source: Source of the input ids: "calibration text" or "random ids".
        left_out: Cases that could not be run, each with its reason.
        results: One per case.
        hidden: MoE layer -> a sample of the hidden states that its experts got, [n, H].
        own_tolerance: Limits in place of those of the precision, or None.
    """

    precision: Precision
    usage: Usage
    source: str
    left_out: tuple[str, ...] = ()
    results: list[CaseResult] = field(default_factory=list)
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    own_tolerance: Tolerance | None = None

    @property
    def tolerance(self) -> Tolerance:
        """The limits that apply."""
        return self.own_tolerance or TOLERANCES[self.precision]


def gather(
    gate: str,
    program: Program,
    runner: Runner | None,
    oracle: Oracle,
    prompts: Prompts,
    precision: Precision,
    options: ParityOptions,
    progress: Progress,
    tolerance: Tolerance | None = None,
) -> Evidence:
    """Run the cases of `program` on `runner` and compare each with `oracle`.

    As many cases as `reference.LOGITS` allows go through the reference together, which then reads each weight once.

    Args:
        gate: Name of the gate, for `progress`.
        program: The Program that `runner` should compute.
        runner: The candidate; None: `program` itself, which the interpreter runs beside the reference.
        oracle: The reference.
        prompts: Source of the token ids.
        precision: Precision whose tolerance applies.
        options: Settings.
        progress: Called for every case, and for every part of the reference's graph.
        tolerance: Limits in place of those of `precision`, or None.

    Raises:
        ArtifactError: The runner fails, or its logits have another shape than the reference's.
    """
    limits = RunnerLimits() if runner is None else limits_of(runner)
    bound = bounds(program, limits, options.max_tokens)
    cases, left_out = base_cases(program, prompts, bound, options.long_prompt, options.greedy_tokens)
    evidence = Evidence(
        precision,
        Usage(program.layers),
        prompts.source,
        tuple(dict.fromkeys(left_out)),
        own_tolerance=tolerance,
    )
    trial = Trial(
        runner, oracle, prompts, evidence.tolerance, noise_of(program, precision), options.max_excused, options.retries
    )

    def size(case: Case) -> int:
        batch, length = case.input_ids.shape
        return int(batch * (length + case.new_tokens) * program.vocab_size * 4)

    parts = in_parts(cases, size)
    for index, part in enumerate(parts):
        for found in trial.run(part, partial(_told, progress, gate, index, len(parts))):
            evidence.results.append(found.result)
            evidence.usage.add(found.trace, found.proven)
    progress(gate, 1, 1)
    evidence.hidden = oracle.hidden.rows
    return evidence


def _told(progress: Progress, gate: str, part: int, parts: int, done: int, total: int) -> None:
    """Report that `done` of `total` steps of a part are finished, in percent of the gate."""
    progress(gate, min(99, 100 * (part * total + done) // (parts * total)), 100)


def judge_parity(gate: str, evidence: Evidence, options: ParityOptions) -> Verdict:
    """Pass if every position is within what its limit, ties and rounding allow, enough are proven, and texts agree."""
    limit, results = evidence.tolerance.limit, evidence.results
    positions = sum(result.positions for result in results)
    excused = sum(result.excused for result in results)
    sensitive = sum(result.sensitive for result in results)
    worst = max(results, key=lambda result: result.error)
    wrong = [result for result in results if not result.error <= limit]
    demands = _distribution_demands(evidence)
    different = [result for result in results if result.mismatch is not None and evidence.tolerance.identical_tokens]
    parts = [f"max |difference| {worst.error:.1e} of max |logit| (limit {limit:.0e}, {evidence.precision})"]
    if wrong:
        parts.append(f"{len(wrong)} of {len(results)} cases out of tolerance, the worst is '{worst.name}'")
    else:
        parts.append(f"{positions} positions in {len(results)} cases")
    parts += [text for _, text in demands]
    parts += [_token_summary(result) for result in results if result.tokens]
    if sensitive:
        most = max(result.sensitive_error for result in results)
        parts.append(f"{sensitive} positions differ by up to {most:.1e}, which rounding explains in this model")
    if excused:
        parts.append(f"{excused} positions excused by router ties")
    too_many = excused > options.max_excused * positions
    if too_many:
        parts.append(f"more than {options.max_excused:.0%} of the positions are excused, which proves nothing")
    too_few = positions - excused - sensitive < options.min_proven * positions
    if too_few:
        parts.append(f"fewer than {options.min_proven:.0%} of the positions are within the limit, which proves nothing")
    if evidence.left_out:
        parts.append(f"left out: {', '.join(evidence.left_out)}")
    unlike = any(not met for met, _ in demands)
    status = Status.FAIL if wrong or different or too_many or too_few or unlike else Status.PASS
    return Verdict(gate, status, "; ".join(parts), EXIT_CODE, _figures(evidence, positions, excused))


def _distribution_demands(evidence: Evidence) -> list[tuple[bool, str]]:
    """Whether each demand on the distributions of the next token is met, and a text with figure and limit."""
    tolerance, results, found = evidence.tolerance, evidence.results, list[tuple[bool, str]]()
    if tolerance.divergence is not None:
        most = max(result.divergence for result in results)
        text = f"mean KL at most {most:.1e} (limit {tolerance.divergence:.0e})"
        found.append((most <= tolerance.divergence, text))
    if tolerance.agreement is not None:
        share = _agreement(evidence)
        text = f"the same most likely token at {share:.1%} of the positions (limit {tolerance.agreement:.0%})"
        found.append((share >= tolerance.agreement, text))
    return found


def _agreement(evidence: Evidence) -> float:
    """Share of the proven positions at which both have the same most likely token."""
    judged = sum(result.positions - result.excused - result.sensitive for result in evidence.results)
    return sum(result.agreed for result in evidence.results) / judged if judged else 1.0


def _token_summary(result: CaseResult) -> str:
    if result.mismatch is None:
        return f"{result.tokens} greedy tokens identical"
    return f"greedy token {result.mismatch + 1} of {result.tokens} differs"


def _figures(evidence: Evidence, positions: int, excused: int) -> dict[str, Any]:
    worst = max((result.error for result in evidence.results), default=0.0)
    return {
        "precision": str(evidence.precision),
        "limit": evidence.tolerance.limit,
        "tie_margin": evidence.tolerance.tie_margin,
        "reason": evidence.tolerance.reason,
        "max_error": worst,
        "divergence": max((result.divergence for result in evidence.results), default=0.0),
        "divergence_limit": evidence.tolerance.divergence,
        "agreement": _agreement(evidence),
        "agreement_limit": evidence.tolerance.agreement,
        "positions": positions,
        "excused": excused,
        "sensitive": sum(result.sensitive for result in evidence.results),
        "inputs": evidence.source,
        "left_out": list(evidence.left_out),
        "cases": [dataclasses.asdict(result) for result in evidence.results],
    }


def gather_artifact(
    program: Program,
    runner: Runner,
    prompts: Prompts,
    options: ParityOptions,
    progress: Progress,
    rounding: ActivationRounding | None = None,
    guests: Guests | None = None,
    watch: WeightObserver | None = None,
) -> Evidence:
    """Compare the artifact with the final Program.

    Args:
        program: The final Program.
        runner: The artifact.
        prompts: Source of the token ids.
        options: Settings.
        progress: See `gather`.
        rounding: How the kernels of the artifact round activations.
        guests: Calls of experts that the reference runs beside the cases, for the coverage gate.
        watch: Called with the values of the experts that the reference reads, for the integrity gate.

    Raises:
        ArtifactError: The artifact fails at run time, or its logits have another shape than the reference's.
    """
    precision = precision_of(program)
    oracle = Oracle(program, TOLERANCES[precision].tie_margin, rounding=rounding, guests=guests, weight_observer=watch)
    return gather(ARTIFACT_GATE, program, runner, oracle, prompts, precision, options, progress)


def gather_capture(
    checkpoint: Checkpoint, program: Program, prompts: Prompts, options: ParityOptions, progress: Progress
) -> Evidence:
    """Compare the captured Program with the model in transformers.

    Both run in float32, even if the Program was captured in float16, whose rounding would hide errors of the capture.
    A large model is never in memory as a whole, on neither side.
    """
    program = widened(program)
    precision = precision_of(program)
    oracle = Oracle(program, TOLERANCES[precision].tie_margin, open_source(checkpoint, options.loaded))
    # Both sides run in torch, so a prompt long enough for the threads of another runtime is not needed.
    options = dataclasses.replace(options, greedy_tokens=0, long_prompt=min(options.long_prompt, SHORTER_PROMPT))
    return gather(CAPTURE_GATE, program, None, oracle, prompts, precision, options, progress)


def check_capture(
    checkpoint: Checkpoint,
    program: Program,
    prompts: Prompts,
    options: ParityOptions | None = None,
    progress: Progress = lambda *_: None,
) -> Verdict:
    """The verdict on the captured `program`, run by the interpreter, against the model in transformers in float32."""
    options = options or ParityOptions()
    if not options.capture:
        return Verdict(CAPTURE_GATE, Status.NOT_RUN, "it is not asked for", EXIT_CODE)
    return judge_parity(CAPTURE_GATE, gather_capture(checkpoint, program, prompts, options, progress), options)
