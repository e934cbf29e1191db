"""The windows on which variants are measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moec.compiler.search import evaluation
from moec.compiler.search.evaluation import Evaluator, Subject
from moec.compiler.text.corpus import tokenize, windows


def rows(found: np.ndarray) -> set[bytes]:
    return {row.tobytes() for row in found}


def test_they_are_not_those_on_which_codes_are_fitted(evaluator: Evaluator) -> None:
    assert len(evaluator.windows) == 8
    assert rows(evaluator._codes_windows)
    assert not rows(evaluator.windows) & rows(evaluator._codes_windows)


def test_a_text_too_short_for_both_is_used_for_both(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} and {number * number}\n" for number in range(40)))
    found = Evaluator(Subject(str(checkpoint), str(tmp_path), str(path), windows=8, window=16))
    every = windows(tokenize(found.checkpoint.directory, path.read_text()), 16)
    assert len(every) < 96 + 8
    assert len(found.windows) == 8
    assert rows(found.windows) <= rows(found._codes_windows)


def test_other_windows_of_a_text_are_another_context(evaluator: Evaluator) -> None:
    fewer = evaluator.on(evaluator.text, 4)
    assert fewer.context != evaluator.context
    assert fewer.folder != evaluator.folder


def test_a_worker_uses_the_stored_codes_whatever_is_in_its_path(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = evaluator.shared_subject
    monkeypatch.setattr(evaluation, "tools", lambda: {"installed": ["another-1.0.dist-info"]})
    worker = Evaluator(subject)
    assert worker.context != evaluator.context
    assert worker.folder == evaluator.folder.resolve()
    assert worker.on(evaluator.text * 2, 8).folder != worker.folder
