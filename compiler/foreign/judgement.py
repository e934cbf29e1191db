"""The gates of a file that another exporter made, and what they share.

The reference is the checkpoint's own captured Program, proven against transformers first. The file is a Runner, so the
gates of moec's own artifacts judge it where they can. Where it holds codes, parity and coverage take the values of
these codes, read back from the file, for the weights of the reference: what is left is an error. How far the codes are
from the checkpoint is the matter of `integrity`, by weights, and of `divergence`, by logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from moec.compiler.common.errors import UsageError
from moec.compiler.common.model_config import context_length
from moec.compiler.common.progress import Progress
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.foreign import coverage, integrity, precision, probes, routing, speed, traps
from moec.compiler.foreign.binding import Bindings
from moec.compiler.foreign.model import Cost, ForeignModel, Unseen
from moec.compiler.foreign.tolerance import (
    CODES,
    CODES_OF_EXPERT,
    TELLING,
    TIMES,
    UNLIMITED,
    float_precision,
    quantized_tolerance,
)
from moec.compiler.foreign.weights import FileRows, locate, with_values_of
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates import latency, quality
from moec.compiler.gates.cases import Prompts
from moec.compiler.gates.coverage import GATE as COVERAGE_GATE
from moec.compiler.gates.integrity import GATE as INTEGRITY_GATE
from moec.compiler.gates.parity import (
    ARTIFACT_GATE,
    CAPTURE_GATE,
    EXIT_CODE,
    Evidence,
    ParityOptions,
    check_capture,
    gather,
    judge_parity,
)
from moec.compiler.gates.reference import Ahead, Oracle
from moec.compiler.gates.repeatability import GATE as REPEATABILITY_GATE
from moec.compiler.gates.repeatability import RepeatabilityOptions
from moec.compiler.gates.run import REPORTED, Gate, run_gate, run_repeatability
from moec.compiler.gates.tolerance import Precision, Tolerance
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import Program
from moec.compiler.measure.latency.demands import Demand, Workload, parse_budgets
from moec.compiler.pipeline.recipe import CoverageRecipe, LatencyRecipe, QualityRecipe
from moec.targets.runners import Runner, RunnerLimits, limits_of

TRAPS_GATE = "operators"
DIVERGENCE_GATE = "divergence"


@dataclass(frozen=True)
class Demands:
    """What a user asks of a foreign file beyond being right."""

    coverage: CoverageRecipe
    quality: QualityRecipe
    budgets: tuple[Demand, ...] = ()
    threads: int = 1

    @classmethod
    def of(cls, sections: Mapping[str, Any]) -> Demands:
        """The demands of recipe sections.

        Raises:
            UsageError: A demand is not valid, or needs an artifact of moec.
        """
        timing = LatencyRecipe(**sections.get("latency", {}))
        budgets = () if timing.budget is None else parse_budgets(timing.budget)
        if timing.baseline is not None or not all(isinstance(one.subject, Workload) for one in budgets):
            raise UsageError(
                "a file of another exporter has no baseline, and budgets of decode and prefill alone",
                hint="such as --latency-budget decode.p50=12ms,prefill128.p90=300ms",
            )
        return cls(
            CoverageRecipe(**sections.get("coverage", {})),
            QualityRecipe(**sections.get("quality", {})),
            budgets,
            timing.threads,
        )


class Judgement:
    """The gates of a foreign file, and what they share.

    Args:
        checkpoint: The checkpoint.
        captured: Its Program as captured, in float32.
        program: The same after the common passes: the reference.
        model: The file.
        names: Names that the user gave.
        wanted: The demands.
        progress: Called for every step of a gate.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        captured: Program,
        program: Program,
        model: ForeignModel,
        names: Bindings,
        wanted: Demands,
        progress: Progress,
    ) -> None:
        self.checkpoint, self.captured, self.program, self.model = checkpoint, captured, program, model
        self._names, self._wanted, self._progress = names, wanted, progress
        self._options = ParityOptions(coverage_min=wanted.coverage.min)
        self.runner: Runner = self._opened()
        self.tensors = model.tensors()
        self.rounded = precision.rounded_like(self.tensors, program)
        self._held = FileRows(self.tensors)
        self._located = locate(program, self._held)
        # Without codes the reference is the checkpoint; with them, the checkpoint with the values of the codes.
        self._decoded = self.rounded is not None and self._located.understood
        self._reference = with_values_of(program, self._held, self._located) if self._decoded else program
        self.precision, self.tolerance = self._judged_as()
        self._proven = {ARTIFACT_GATE: False, COVERAGE_GATE: False}

    def _opened(self, threads: int = 0) -> Runner:
        return self.model.open(self.program, self._names, threads=threads)

    def _judged_as(self) -> tuple[Precision, Tolerance]:
        """The precision and the tolerance of parity."""
        if self.rounded is None:
            return float_precision(self.tensors, self.model.float_precision)
        if self._decoded:
            return Precision.INT8_DYNAMIC, CODES
        return self._coarsest, self._rounding

    @property
    def _coarsest(self) -> Precision:
        """The coarsest precision of a file of codes."""
        fewest = min(tensor.bits for tensor in self.tensors if tensor.quantized)
        return Precision.INT4 if fewest < 5 else Precision.INT8

    def verdicts(self) -> tuple[Verdict, ...]:
        """One verdict for each gate, always in the same order."""
        gates: tuple[tuple[str, int, Gate], ...] = (
            (CAPTURE_GATE, EXIT_CODE, self._capture),
            (ARTIFACT_GATE, EXIT_CODE, self._parity),
            (COVERAGE_GATE, EXIT_CODE, self._coverage),
            (INTEGRITY_GATE, EXIT_CODE, self._integrity),
            (routing.GATE, routing.EXIT_CODE, self._routing),
            (TRAPS_GATE, EXIT_CODE, self._traps),
            (REPEATABILITY_GATE, EXIT_CODE, self._repeated),
            *(((DIVERGENCE_GATE, EXIT_CODE, self._divergence),) if self.rounded else ()),
            (quality.GATE, quality.EXIT_CODE, self._quality),
            (latency.GATE, latency.EXIT_CODE, self._latency),
        )
        return tuple(run_gate(name, code, gate) for name, code, gate in gates)

    def _prompts(self) -> Prompts:
        return Prompts.of(self.checkpoint.directory, self.program.vocab_size, seed=self._options.seed)

    def _capture(self) -> Verdict:
        return check_capture(self.checkpoint, self.captured, self._prompts(), self._options, self._progress)

    def _gathered(self, reference: Program, runner: Runner, tolerance: Tolerance, precision: Precision) -> Evidence:
        oracle = Oracle(reference, tolerance.tie_margin)
        return gather(
            ARTIFACT_GATE,
            reference,
            runner,
            oracle,
            self._prompts(),
            precision,
            self._options,
            self._progress,
            tolerance,
        )

    @cached_property
    def _rounding(self) -> Tolerance:
        """The limits that rounding the checkpoint as coarsely gives."""
        assert self.rounded is not None
        limited = _Limited(self.rounded, limits_of(self.runner))
        return quantized_tolerance(self._gathered(self.program, limited, UNLIMITED, self._coarsest))

    def _parity(self) -> Verdict:
        seen = self._gathered(self._reference, self.runner, self.tolerance, self.precision)
        verdict = judge_parity(ARTIFACT_GATE, seen, self._options)
        self._proven[ARTIFACT_GATE] = verdict.status is Status.PASS
        if self._decoded:
            verdict = replace(verdict, summary=f"against the values of its codes: {verdict.summary}")
        elif self.rounded is not None:
            verdict = self._unless_it_says_little(verdict)
        return replace(verdict, figures={**verdict.figures, "runner": dict(self.runner.facts())})

    def _divergence(self) -> Verdict:
        """How far a quantized file is from the checkpoint."""
        seen = self._gathered(self.program, self.runner, self._rounding, self._coarsest)
        return self._unless_it_says_little(judge_parity(DIVERGENCE_GATE, seen, self._options))

    def _unless_it_says_little(self, verdict: Verdict) -> Verdict:
        """`verdict`, which has limits from rounding; "not run" in place of a pass if rounding alone costs too much."""
        usual = (self._rounding.divergence or 0.0) / TIMES
        if usual <= TELLING:
            return verdict
        little = f"rounding alone costs this checkpoint {usual:.2g} nats, so that these limits prove nothing"
        status = Status.NOT_RUN if verdict.status is Status.PASS else verdict.status
        return replace(verdict, status=status, summary=f"{little}; {verdict.summary}")

    @cached_property
    def _probes(self) -> probes.Probes:
        oracle = Oracle(self._reference, self.tolerance.tie_margin)
        return probes.search(self._reference, oracle, seed=self._options.seed)

    def _coverage(self) -> Verdict:
        by_logits = self.rounded is None or self._decoded
        distance = coverage.relative if by_logits else coverage.divergence
        found = coverage.run_probes(self.runner, self._probes, distance, self._progress)
        if self.rounded is None:
            limits = coverage.float_limits(self.tolerance.limit)
        elif self._decoded:
            limits = coverage.decoded_limits(found, CODES_OF_EXPERT)
        else:
            limits = coverage.quantized_limits(ProgramRunner(self.rounded), self._probes)
        verdict = coverage.judge(self.program, self._probes, found, limits, self._options.coverage_min)
        if not by_logits:
            verdict = self._unless_it_says_little(verdict)
        self._proven[COVERAGE_GATE] = verdict.status is Status.PASS
        return verdict

    def _integrity(self) -> Verdict:
        findings = integrity.compare(self.program, self._held, self._located)
        proven = all(self._proven.values())
        return integrity.judge(findings, self._located, proven=proven, quantized=self.rounded is not None)

    def _routing(self) -> Verdict:
        return routing.judge(self.model.choices(self.program, self._names), self._probes, self._changed_by_rounding())

    def _changed_by_rounding(self) -> float | None:
        """Share of the routing decisions that rounding alone changes; None for a float file."""
        if self.rounded is None or self._decoded:
            return None if self.rounded is None else 0.0
        oracle = Oracle(self.rounded, self.tolerance.tie_margin)
        every = [oracle.trace(probe.ids).slots for probe in self._probes.probes]
        found = [{layer: slots[0] for layer, slots in own.items()} for own in every]
        decisions, different = routing.counted(self._probes.probes, found)
        return sum(different.values()) / decisions if decisions else 0.0

    def _traps(self) -> Verdict:
        operators = self.model.operators()
        if not operators:
            reason = f"a file of {self.model.format} holds no graph: the runtime builds it"
            return Verdict(TRAPS_GATE, Status.NOT_RUN, reason, EXIT_CODE)
        found = traps.caught(operators, self.model.runtime)
        if found:
            read = f"{self.model.runtime} reads otherwise than the file says: " + "; ".join(map(str, found))
            return Verdict(TRAPS_GATE, Status.FAIL, read, EXIT_CODE, {"traps": [str(one) for one in found]})
        read = f"none of {len(operators)} is known to be read otherwise by {self.model.runtime}"
        return Verdict(TRAPS_GATE, Status.PASS, read, EXIT_CODE)

    def _repeated(self) -> Verdict:
        return run_repeatability(self.program, self.precision, self.runner, self._options.seed, RepeatabilityOptions())

    def _quality(self) -> Verdict:
        asked = self._wanted.quality
        if asked.max_loss is None:
            return quality.not_run()
        options = quality.QualityOptions(asked.max_loss, asked.text, asked.windows, asked.window)
        source, place = partial(Ahead, self.captured), self.checkpoint.directory
        return quality.judge_quality(self.captured, source, self.runner, place, options, self._progress)

    def _latency(self) -> Verdict:
        return speed.measure(
            partial(self._opened, self._wanted.threads),
            self.program.vocab_size,
            context_length(self.program.config),
            self._wanted.budgets,
            self._progress,
            threads=self._wanted.threads,
        )

    @cached_property
    def cost(self) -> Cost | Unseen:
        """What one token costs in the experts."""
        return _answer(lambda: self.model.cost(self.program, self._names))


def _answer(ask: Callable[[], Cost | Unseen]) -> Cost | Unseen:
    try:
        return ask()
    except REPORTED as error:
        return Unseen(f"{type(error).__name__}: {error}")


class _Limited(ProgramRunner):
    """Runs a Program on the cases that a runner with `limits` gets."""

    def __init__(self, program: Program, limits: RunnerLimits) -> None:
        super().__init__(program)
        self.limits = limits
