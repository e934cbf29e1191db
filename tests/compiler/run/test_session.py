"""What a session keeps of a sequence, and how it feeds the rest."""

# ruff: noqa: ARG002 - the arguments are those of the protocol

from collections.abc import Mapping

import numpy as np
import pytest

from moec.compiler.run.session import PIECE, Answer, Session
from moec.compiler.text.sampling import Sampling
from moec.targets.runners import RunnerLimits


class Recorder:
    """Token t is followed by t + 1; the calls are kept."""

    def __init__(self, max_decode: int | None = None) -> None:
        self.limits = RunnerLimits(max_decode=max_decode)
        self.calls: list[tuple[str, list[int]]] = []
        self.fault = False

    def reset(self) -> None:
        self.calls.append(("reset", []))

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        return self._step("prefill", input_ids)

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        return self._step("decode", input_ids)

    def _step(self, name: str, input_ids: np.ndarray) -> np.ndarray:
        if self.fault:
            raise KeyboardInterrupt
        self.calls.append((name, input_ids[0].tolist()))
        return np.eye(5000, dtype=np.float32)[input_ids + 1]

    def facts(self) -> Mapping[str, object]:
        return {}


def feed(session: Session, ids: list[int]) -> list[int]:
    return [int(logits.argmax()) for logits in session.feed(ids)]


def test_a_sequence_that_begins_with_what_was_seen_goes_on() -> None:
    session = Session(runner := Recorder())
    assert feed(session, [1, 2, 3]) == [4]
    assert session.kept([1, 2, 3, 4, 5]) == 3
    assert feed(session, [1, 2, 3, 4, 5]) == [6]
    assert runner.calls == [("reset", []), ("prefill", [1, 2, 3]), ("decode", [4, 5])]


@pytest.mark.parametrize("ids", [[1, 2, 4, 5], [1, 2], [1, 2, 3], [9]])
def test_any_other_sequence_starts_again(ids: list[int]) -> None:
    session = Session(runner := Recorder())
    feed(session, [1, 2, 3])
    assert session.kept(ids) == 0
    assert feed(session, ids) == [ids[-1] + 1]
    assert runner.calls[2:] == [("reset", []), ("prefill", ids)]
    assert session.tokens == ids


def test_a_step_that_fails_leaves_nothing_to_build_on() -> None:
    session = Session(runner := Recorder())
    feed(session, [1, 2, 3])
    runner.fault = True
    with pytest.raises(KeyboardInterrupt):
        feed(session, [1, 2, 3, 4])
    runner.fault = False
    assert session.kept([1, 2, 3, 4]) == 0
    assert feed(session, [1, 2, 3, 4]) == [5]
    assert runner.calls[-1] == ("prefill", [1, 2, 3, 4])


def test_pieces_are_as_long_as_the_runner_allows() -> None:
    session = Session(runner := Recorder())
    assert feed(session, list(range(PIECE + 3))) == [PIECE, PIECE + 3]
    assert [len(ids) for _, ids in runner.calls] == [0, PIECE, 3]
    session = Session(runner := Recorder(max_decode=1))
    assert feed(session, list(range(PIECE + 3))) == [PIECE + 3]
    assert feed(session, list(range(PIECE + 5))) == [PIECE + 4, PIECE + 5]
    assert [len(ids) for _, ids in runner.calls] == [0, PIECE + 3, 1, 1]


def test_an_answer_counts_what_was_kept() -> None:
    session = Session(Recorder())

    def answer(prompt: list[int], **options: int) -> Answer:
        return Answer(session, prompt, sampling=Sampling(), end_tokens=[9], max_new_tokens=options.get("most", 20))

    first = answer([3, 4])
    assert list(first.tokens()) == [5, 6, 7, 8]
    assert (first.statistics.kept_tokens, first.statistics.finish) == (0, "stop")
    second = answer([3, 4, 5, 6, 7, 8, 9, 20], most=2)
    assert list(second.tokens()) == [21, 22]
    assert (second.statistics.kept_tokens, second.statistics.finish) == (6, "length")
    assert second.statistics.line().startswith("prompt: 8 tokens (6 of them from the KV cache) in ")
