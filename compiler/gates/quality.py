"""Quality: how much the perplexity of the artifact exceeds that of the source model, on held-out text.

Both models read the same windows by teacher forcing. The gate passes if the whole 95 % confidence interval of the
increase (paired bootstrap over windows) is within the limit, so a text that is too short fails. Without a limit the
gate does not run, since it costs two passes over the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moec.compiler.common.digest import sha256_of_text
from moec.compiler.common.model_config import context_length
from moec.compiler.common.progress import Progress
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.ir.program import Program
from moec.compiler.text.corpus import held_out_text, spread, tokenize, windows
from moec.compiler.text.perplexity import LanguageModel, compare, perplexity
from moec.targets.runners import Runner, limits_of

GATE = "quality"
EXIT_CODE = 7


@dataclass(frozen=True)
class QualityOptions:
    """Settings of the gate.

    Attributes:
        max_loss: Largest relative increase of perplexity: 0.01 is 1 %.
        text: Held-out text, a file or a directory; None: the texts that come with moec.
        windows: Number of windows, spread over the text.
        window: Tokens per window; fewer if model or runner take fewer.
    """

    max_loss: float
    text: str | None = None
    windows: int = 64
    window: int = 256


def judge_quality(
    program: Program,
    reference: Callable[[np.ndarray], LanguageModel],
    candidate: Runner,
    directory: Path,
    options: QualityOptions,
    progress: Progress,
) -> Verdict:
    """Compare two models on held-out text.

    Args:
        program: The captured Program, for the context length.
        reference: Windows -> the source model, which is asked for them in order.
        candidate: Runs the artifact.
        directory: The directory with tokenizer.json.
        options: Limit and text.
        progress: Called for every window.

    Raises:
        CheckpointError: There is no tokenizer, or the text is shorter than two windows.
    """
    text = held_out_text(options.text)
    length = _length(program, candidate, options.window)
    every = windows(tokenize(directory, text), length)
    chosen = spread(every, options.windows)
    found = compare(reference(chosen), candidate, chosen, told=lambda done, total: progress(GATE, done, total))
    low, high = found.interval()
    passed = len(chosen) > 1 and high <= options.max_loss
    figures = {
        "increase": found.increase,
        "interval": [low, high],
        "level": 0.95,
        "limit": options.max_loss,
        "divergence": found.divergence,
        "top1_agreement": found.agreement,
        "perplexity": {"source": perplexity(found.reference), "artifact": perplexity(found.candidate)},
        "text": {"sha256": sha256_of_text(text), "windows": len(chosen), "length": length, "tokens": found.tokens},
    }
    summary = (
        f"perplexity {found.increase:+.2%} [{low:+.2%}, {high:+.2%}] (limit {options.max_loss:.2%}), "
        f"KL {found.divergence:.2g}, top-1 agreement {found.agreement:.1%}; {found.tokens} tokens"
    )
    if not passed and found.increase <= options.max_loss and np.isfinite(high):
        summary += "; the interval reaches beyond the limit: use more windows, or allow a larger loss"
    return Verdict(GATE, Status.PASS if passed else Status.FAIL, summary, EXIT_CODE, figures)


def not_run() -> Verdict:
    """The verdict "not run" without a limit."""
    return Verdict(GATE, Status.NOT_RUN, "no limit is given (--max-quality-loss 1%)", EXIT_CODE)


def _length(program: Program, candidate: Runner, window: int) -> int:
    most = [window, context_length(program.config) or window, limits_of(candidate).max_sequence or window]
    return min(most)
