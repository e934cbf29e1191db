"""Runs a case on a runner and compares it with the reference, position by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from moec.compiler.common.errors import ArtifactError, MoecError, first_line
from moec.compiler.gates.cases import Case
from moec.compiler.gates.reference import Trace
from moec.compiler.gates.tolerance import TOKEN_TIE, Tolerance
from moec.compiler.text.perplexity import kl_divergence, log_softmax
from moec.targets.runners import LastLogitsRunner, Runner

Step = Callable[[np.ndarray, np.ndarray | None], np.ndarray]
"""`Runner.prefill` or `Runner.decode`."""


@dataclass(frozen=True)
class CaseResult:
    """The result of one case.

    Attributes:
        name: Name of the case.
        error: Largest difference of a position that is neither excused nor sensitive, relative to the largest logit.
        excused_error: Largest difference of an excused position, 0 if there is none.
        positions: Number of positions without padding.
        excused: Number of these positions that are out of tolerance because of a tie.
        tied: Number of these positions whose router decision is a tie.
        top1: Share of these positions at which both have the same most likely token.
        tokens: Number of tokens generated greedily.
        mismatch: Index of the first generated token that the reference would not have chosen, or None.
        divergence: Mean KL(reference || artifact) over the positions that are not excused, in nats; 0 if not judged.
        agreed: Number of the proven positions at which both have the same most likely token.
        sensitive: Number of positions that differ by more than the limit, and by no more than the noise of rounding
            explains (`moec.compiler.gates.noise`).
        sensitive_error: Largest difference of these positions, 0 if there is none.
    """

    name: str
    error: float
    excused_error: float
    positions: int
    excused: int
    tied: int
    top1: float
    tokens: int = 0
    mismatch: int | None = None
    divergence: float = 0.0
    agreed: int = 0
    sensitive: int = 0
    sensitive_error: float = 0.0


@dataclass(frozen=True, eq=False)
class Output:
    """The output of a runner for a case: the ids [B, T], generated ones included, and the logits [B, T, V]."""

    input_ids: np.ndarray
    logits: np.ndarray

    @property
    def fed(self) -> np.ndarray:
        """The ids that were fed: the last generated one was not."""
        return self.input_ids[:, : self.logits.shape[1]]


def run_case(runner: Runner, case: Case) -> Output:
    """Feed a case step by step, then generate. The last generated token is not fed, since its logits are not needed.

    Before it generates, a runner that can compute the logits of the last token alone is fed once more in this way, as
    sessions feed a prompt, and what it says then counts.

    Raises:
        ArtifactError: The runtime fails, or the logits do not have the shape [B, S, V].
    """
    runner.reset()
    ids, pieces = case.input_ids, list(_fed(case, runner.prefill, runner.decode))
    if case.new_tokens and isinstance(runner, LastLogitsRunner):
        runner.reset()
        step = _at_last_row(runner.decode_last)
        *_, last = _fed(case, step, step)
        pieces[-1] = np.concatenate([pieces[-1][:, :-1], last[:, -1:]], axis=1)
    for index in range(case.new_tokens):
        token = pieces[-1][:, -1].argmax(-1)[:, None].astype(np.int64)
        ids = np.concatenate([ids, token], axis=1)
        if index + 1 < case.new_tokens:
            pieces.append(_call(runner.decode, token, None, case.name))
    runner.reset()
    return Output(ids, np.concatenate(pieces, axis=1))


def _fed(case: Case, first: Step, following: Step) -> Iterator[np.ndarray]:
    """The logits of each step of a case."""
    offset = 0
    for step in case.steps:
        stop = offset + step
        mask = None if case.attention_mask is None else case.attention_mask[:, :stop]
        yield _call(following if offset else first, case.input_ids[:, offset:stop], mask, case.name)
        offset = stop


def _at_last_row(decode_last: Step) -> Step:
    """A step with the logits [B, V] of the last token in the last row of [B, S, V], and zeros before."""

    def step(ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        last = decode_last(ids, mask)
        logits = np.zeros((*ids.shape, *last.shape[1:]), last.dtype)
        logits[:, -1] = last
        return logits

    return step


def _call(step: Step, ids: np.ndarray, mask: np.ndarray | None, name: str) -> np.ndarray:
    try:
        logits = step(ids, mask)
    except MoecError:
        raise
    except Exception as error:  # runtimes raise exceptions without a narrower common base class
        raise ArtifactError(
            f"{name}: the artifact fails at run time: {type(error).__name__}: {first_line(error)}",
            hint="the artifact was built but cannot be run; please report this with the recipe",
        ) from error
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise ArtifactError(
            f"{name}: the runner returned logits of shape {logits.shape} for input_ids of shape {ids.shape}",
            hint="a runner must return logits for every new token: [batch, sequence, vocabulary]",
        )
    return logits


def compare(
    case: Case, output: Output, trace: Trace, tolerance: Tolerance, explained: np.ndarray | None = None
) -> tuple[CaseResult, np.ndarray]:
    """Compare a runner's output with the reference.

    Args:
        case: The case.
        output: The runner's output for it.
        trace: The reference's output for `output.input_ids`, with or without the last token.
        tolerance: The limits.
        explained: Differences [B, T] that rounding explains beyond the limit, relative to the largest logit; None: 0.

    Returns:
        The result, and the positions that are proven, [B, T] bool: neither padding, nor excused, nor sensitive.

    Raises:
        ArtifactError: The vocabularies differ.
    """
    length = output.logits.shape[1]
    want = trace.logits[:, :length]
    if output.logits.shape != want.shape:
        raise ArtifactError(
            f"{case.name}: the logits have {output.logits.shape[-1]} entries, but the model's vocabulary has "
            f"{want.shape[-1]}"
        )
    valid = np.ones(want.shape[:2], dtype=bool)
    if case.attention_mask is not None:
        valid = case.attention_mask.astype(bool)
    errors = position_errors(output.logits, want, valid)
    tied = trace.tied[:, :length] & valid
    explained = np.zeros_like(errors) if explained is None else explained
    sensitive = (errors > tolerance.limit) & (errors <= tolerance.limit + explained)
    excused = excused_positions(errors, tied, tolerance.limit) & ~sensitive
    proven = valid & ~excused & ~sensitive
    same = output.logits.argmax(-1) == want.argmax(-1)
    result = CaseResult(
        case.name,
        error=float(errors[proven].max(initial=0.0)),
        excused_error=float(errors[excused].max(initial=0.0)),
        positions=int(valid.sum()),
        excused=int(excused.sum()),
        tied=int(tied.sum()),
        top1=float(same[valid].mean()),
        tokens=case.new_tokens,
        mismatch=_mismatch(output.input_ids, want, excused, explained, case.new_tokens),
        divergence=0.0 if tolerance.divergence is None else _divergence(output.logits, want, proven),
        agreed=int((same & proven).sum()),
        sensitive=int(sensitive.sum()),
        sensitive_error=float(errors[sensitive].max(initial=0.0)),
    )
    return result, proven


def _divergence(got: np.ndarray, want: np.ndarray, proven: np.ndarray) -> float:
    """Mean KL(want || got) over the positions `proven` [B, T] of logits [B, T, V], in nats; infinite for NaN."""
    total = sum(
        kl_divergence(log_softmax(want[row, index][None]), log_softmax(got[row, index][None]))
        for row, index in np.argwhere(proven)
    )
    mean = total / max(1, int(proven.sum()))
    return float(mean) if np.isfinite(mean) else float("inf")


def position_errors(got: np.ndarray, want: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Largest |got - want| of each position, divided by the largest |want| of all valid ones: [B, T]; infinite for NaN.

    Args:
        got: [B, T, V].
        want: [B, T, V].
        valid: [B, T] bool; other positions get 0.
    """
    scale = float(np.abs(want[valid]).max(initial=0.0))
    errors: np.ndarray = np.empty(want.shape[:2], dtype=np.float64)
    for row in range(want.shape[0]):  # row by row, since the difference takes as much memory as the logits
        errors[row] = np.abs(got[row] - want[row]).max(-1)
    errors /= scale if scale > 0 else 1.0
    errors[~np.isfinite(errors)] = np.inf
    errors[~valid] = 0.0
    return errors


def relative_error(got: np.ndarray, want: np.ndarray, smallest: float = 0.0) -> float:
    """Largest |got - want| over the largest |want|, or `smallest` if that is more; infinite for NaN or other shapes."""
    if got.shape != want.shape:
        return float("inf")
    if np.array_equal(got, want):
        return 0.0
    scale = max(float(np.abs(want).max(initial=0.0)), smallest, float(np.finfo(np.float32).tiny))
    error = float(np.abs(got.astype(np.float32) - want).max(initial=0.0)) / scale
    return error if np.isfinite(error) else float("inf")


def excused_positions(errors: np.ndarray, tied: np.ndarray, limit: float) -> np.ndarray:
    """Positions out of tolerance that a tie explains: [B, T] bool.

    If another expert is chosen at a tied token, the logits of that token and of later tokens change. So a position is
    excused if it or an earlier position of its sequence is tied and differs by more than a quarter of the limit. A NaN
    is never excused.
    """
    flipped: np.ndarray = np.logical_or.accumulate(tied & (errors > limit / 4), axis=1)
    excused: np.ndarray = flipped & (errors > limit) & np.isfinite(errors)
    return excused


def _mismatch(
    ids: np.ndarray, want: np.ndarray, excused: np.ndarray, explained: np.ndarray, new_tokens: int
) -> int | None:
    """Index of the first generated token that the reference would not have chosen, ties and rounding aside, or None."""
    if not new_tokens:
        return None
    first = want.shape[1] - new_tokens  # position whose logits choose the first generated token
    scale = float(np.abs(want).max(initial=0.0))
    for index in range(new_tokens):
        position = first + index
        chosen = np.take_along_axis(want[:, position], ids[:, position + 1, None], axis=-1)[:, 0]
        # Rounding may lower the largest logit and raise the chosen one.
        worse = want[:, position].max(-1) - chosen > (TOKEN_TIE + 2 * explained[:, position]) * scale
        if (worse & ~excused[:, position]).any():
            return index
    return None
