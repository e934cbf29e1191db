"""Parity in two steps: the captured Program against the model in transformers, the artifact against the final Program.

Both run the same way. The cases of `moec.compiler.gates.cases` are fed step by step to what is checked, the reference
sees each sequence whole, and every position is compared. Then more prompts follow until they have reached every live
expert of every layer or the budget is spent: what no input reaches is not proven (`moec.compiler.gates.coverage`).
Greedy generation is checked in one pass: the artifact generates, and by induction its tokens are those of the
reference if the reference, given them, would have chosen each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.cases import Bounds, Case, Prompts, base_cases, bounds, split_steps
from moec.compiler.gates.compare import CaseResult, compare, run_case
from moec.compiler.gates.coverage import Coverage
from moec.compiler.gates.reference import Oracle, Trace, available_bytes, load_source, source_bytes
from moec.compiler.gates.search import ExpertSearch
from moec.compiler.gates.tolerance import TOLERANCES, Precision, Tolerance, precision_of
from moec.compiler.gates.verdict import Status, Verdict
from moec.compiler.interpreter import ProgramRunner
from moec.compiler.program import Program
from moec.targets.base import Progress, Runner, limits_of

CAPTURE_GATE = "parity: capture"
ARTIFACT_GATE = "parity: artifact"
EXIT_CODE = 5


@dataclass(frozen=True)
class ParityOptions:
    """Settings of the parity and coverage gates.

    Attributes:
        seed: Seed of the inputs.
        greedy_tokens: How many tokens are generated greedily.
        max_tokens: Longest sequence that is tried; windows beyond it are left out and named.
        coverage_tokens: Tokens that may be tried to reach experts that the cases did not reach: half of them as
            prompts, the rest in a search for what is still missing.
        coverage_prompt: Tokens of one such prompt.
        coverage_min: Share of the live experts that must be reached.
        memory_share: Share of the free memory that the model in transformers may take.
        max_excused: Share of the positions that ties may excuse.
    """

    seed: int = 0
    greedy_tokens: int = 64
    max_tokens: int = 2560
    coverage_tokens: int = 16384
    coverage_prompt: int = 128
    coverage_min: float = 1.0
    memory_share: float = 0.7
    max_excused: float = 0.2


@dataclass
class Evidence:
    """What a parity step saw.

    Attributes:
        precision: Precision whose tolerance holds.
        coverage: The experts that the compared positions reached.
        source: Where the inputs come from.
        left_out: Cases that could not be run, each with its reason.
        results: One per case.
        tokens: Tokens of all inputs, those tried for coverage included.
    """

    precision: Precision
    coverage: Coverage
    source: str
    left_out: tuple[str, ...] = ()
    results: list[CaseResult] = field(default_factory=list)
    tokens: int = 0

    @property
    def tolerance(self) -> Tolerance:
        """The limits that hold."""
        return TOLERANCES[self.precision]


def gather(
    gate: str,
    program: Program,
    runner: Runner,
    oracle: Oracle,
    prompts: Prompts,
    precision: Precision,
    options: ParityOptions,
    progress: Progress,
) -> Evidence:
    """Run the cases on `runner`, compare each with `oracle`, and extend them until every expert is reached."""
    bound = bounds(program, limits_of(runner), options.max_tokens)
    cases, left_out = base_cases(program, prompts, bound, options.greedy_tokens)
    evidence = Evidence(precision, Coverage(program.layers), prompts.source, tuple(dict.fromkeys(left_out)))
    for index, case in enumerate(cases):
        progress(gate, index, len(cases))
        _run(evidence, runner, oracle, case)
    progress(gate, len(cases), len(cases))
    extension = _Extension(gate, evidence, runner, oracle, prompts, bound, options, progress)
    extension.by_prompts(options.coverage_tokens // 2)
    extension.by_search(program, options.coverage_tokens - options.coverage_tokens // 2)
    return evidence


def _run(evidence: Evidence, runner: Runner, oracle: Oracle, case: Case, trace: Trace | None = None) -> None:
    output = run_case(runner, case)
    if trace is None:
        trace = oracle.trace(output.input_ids[:, : output.logits.shape[1]], case.attention_mask, case.steps)
        evidence.tokens += int(trace.tied.size)
    result, proven = compare(case, output, trace, evidence.tolerance)
    evidence.results.append(result)
    evidence.coverage.add(trace, proven)


@dataclass(frozen=True)
class _Extension:
    """Further inputs for the experts that the cases did not reach. Tried on the reference; what reaches one is kept."""

    gate: str
    evidence: Evidence
    runner: Runner
    oracle: Oracle
    prompts: Prompts
    bound: Bounds
    options: ParityOptions
    progress: Progress

    def by_prompts(self, budget: int) -> None:
        """Try prompts, text and random ids in turn."""
        length = min(self.options.coverage_prompt, self.bound.max_tokens)
        attempts = budget // length
        for attempt in range(attempts):
            if not self.evidence.coverage.unreached():
                return
            self.progress(f"{self.gate}: reaching every expert", attempt, attempts)
            ids = self.prompts.random(1, length) if attempt % 2 else self.prompts.text(1, length)
            self._try(ids)

    def by_search(self, program: Program, budget: int) -> None:
        """Look for each expert that is still missing; the budget is shared among them, and what is left goes round."""
        coverage = self.evidence.coverage
        search = ExpertSearch(program, self.prompts, self.bound.max_tokens)
        before = -1
        while (missing := coverage.missing()) and before < search.tokens < budget:
            before = search.tokens
            for index, (layer, expert) in enumerate(missing):
                self.progress(f"{self.gate}: looking for experts", index, len(missing))
                share = (budget - search.tokens) // (len(missing) - index)
                if (layer, expert) in coverage.missing():
                    search.find(layer, expert, share, self._try)
        self.evidence.tokens += search.tokens

    def _try(self, ids: np.ndarray) -> bool:
        """Keep `ids` [1, T] as a case if the reference reaches a new expert with them; whether one is proven by it."""
        length = ids.shape[1]
        first = max(length // 2, 1)
        steps = split_steps((first, length - first) if length > 1 else (1,), self.bound.runner)
        trace = self.oracle.trace(ids, None, steps)
        self.evidence.tokens += length
        if not self.evidence.coverage.would_reach(trace):
            return False
        name = f"coverage prompt {len(self.evidence.results)}"
        missing = len(self.evidence.coverage.missing())
        _run(self.evidence, self.runner, self.oracle, Case(name, ids, None, steps), trace)
        return len(self.evidence.coverage.missing()) < missing


def judge_parity(gate: str, evidence: Evidence, options: ParityOptions) -> Verdict:
    """Pass when every compared position is within tolerance, ties excuse few, and the generated tokens agree."""
    limit, results = evidence.tolerance.limit, evidence.results
    positions = sum(result.positions for result in results)
    excused = sum(result.excused for result in results)
    worst = max(results, key=lambda result: result.error)
    wrong = [result for result in results if not result.error <= limit]
    different = [result for result in results if result.mismatch is not None and evidence.tolerance.identical_tokens]
    parts = [f"max |difference| {worst.error:.1e} of max |logit| (limit {limit:.0e}, {evidence.precision})"]
    if wrong:
        parts.append(f"{len(wrong)} of {len(results)} cases out of tolerance, the worst is '{worst.name}'")
    else:
        parts.append(f"{positions} positions in {len(results)} cases")
    parts += [_token_summary(result) for result in results if result.tokens]
    if excused:
        parts.append(f"{excused} positions excused by router ties")
    too_many = excused > options.max_excused * positions
    if too_many:
        parts.append(f"more than {options.max_excused:.0%} excused proves nothing")
    if evidence.left_out:
        parts.append(f"left out: {', '.join(evidence.left_out)}")
    status = Status.FAIL if wrong or different or too_many else Status.PASS
    return Verdict(gate, status, "; ".join(parts), EXIT_CODE, _figures(evidence, positions, excused))


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
        "positions": positions,
        "excused": excused,
        "inputs": evidence.source,
        "left_out": list(evidence.left_out),
        "cases": [dataclasses.asdict(result) for result in evidence.results],
    }


def gather_artifact(
    program: Program, runner: Runner, prompts: Prompts, options: ParityOptions, progress: Progress
) -> Evidence:
    """Evidence of step (b): the artifact against the final Program."""
    precision = precision_of(program)
    oracle = Oracle(program, TOLERANCES[precision].tie_margin)
    return gather(ARTIFACT_GATE, program, runner, oracle, prompts, precision, options, progress)


def check_artifact(
    program: Program,
    runner: Runner,
    prompts: Prompts,
    options: ParityOptions | None = None,
    progress: Progress = lambda *_: None,
) -> Verdict:
    """Step (b) by itself: the artifact's `runner` against the final `program` by the interpreter."""
    options = options or ParityOptions()
    return judge_parity(ARTIFACT_GATE, gather_artifact(program, runner, prompts, options, progress), options)


def gather_capture(
    checkpoint: Checkpoint,
    program: Program,
    prompts: Prompts,
    options: ParityOptions,
    progress: Progress,
    free_memory: Callable[[], int] = available_bytes,
) -> Evidence | Verdict:
    """Evidence of step (a): the captured Program against transformers; a verdict where it cannot be run."""
    needed, allowed = source_bytes(checkpoint), int(free_memory() * options.memory_share)
    if needed > allowed:
        reason = (
            f"the model in transformers would take {needed / 2**30:.1f} GiB in float32 "
            f"and {allowed / 2**30:.1f} GiB may be used here"
        )
        return Verdict(CAPTURE_GATE, Status.NOT_RUN, reason, EXIT_CODE, {"needed": needed, "allowed": allowed})
    precision = precision_of(program)
    oracle = Oracle(program, TOLERANCES[precision].tie_margin, load_source(checkpoint))
    options = dataclasses.replace(options, greedy_tokens=0)
    return gather(CAPTURE_GATE, program, ProgramRunner(program), oracle, prompts, precision, options, progress)


def check_capture(
    checkpoint: Checkpoint,
    program: Program,
    prompts: Prompts,
    options: ParityOptions | None = None,
    progress: Progress = lambda *_: None,
) -> Verdict:
    """Step (a) by itself: the captured `program` by the interpreter against the model in transformers, in float32."""
    options = options or ParityOptions()
    evidence = gather_capture(checkpoint, program, prompts, options, progress)
    return evidence if isinstance(evidence, Verdict) else judge_parity(CAPTURE_GATE, evidence, options)
