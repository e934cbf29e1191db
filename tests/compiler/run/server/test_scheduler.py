"""Turns, places, budgets and faults, with a runner that counts."""

# ruff: noqa: ARG002 - the arguments are those of the protocol

import json
import queue
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

import moec
from moec.compiler.common.artifact import write_manifest
from moec.compiler.common.errors import UsageError
from moec.compiler.run.generate import Generator
from moec.compiler.run.server.scheduler import Batching, Job, Scheduler, TooManyRequestsError
from moec.compiler.text.sampling import Sampling
from moec.targets import get_target
from moec.targets.runners import Row, RunnerLimits

BUDGET = {"name": "routing_budget", "shape": [], "dtype": "float32"}


class Counting:
    """Token t is followed by t + 1, or by t + 10 times `routing_budget`; it keeps which sequence took each step."""

    def __init__(self, steps: list[int], number: int = 0, fault: int = -1) -> None:
        self.steps, self.number, self.fault = steps, number, fault
        self.overrides: dict[str, np.ndarray] = {}
        self.forks = 0

    def reset(self) -> None:
        pass

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        if self.fault in input_ids:
            raise ValueError("a fault that nobody foresaw")
        self.steps.append(int(input_ids[0, 0]) // 1000)
        step = round(10 * float(self.overrides.get("routing_budget", 0.1)))
        return np.eye(4096, dtype=np.float32)[(input_ids + step) % 4096]

    decode = prefill

    def facts(self) -> Mapping[str, object]:
        return {}


class Forking(Counting):
    def fork(self) -> "Forking":
        self.forks += 1
        twin = Forking(self.steps, self.forks, self.fault)
        twin.overrides = self.overrides
        return twin


class Batcher(Forking):
    """It keeps the sequences of each step, and how many tokens of padding each has."""

    def __init__(self, batches: list[list[tuple[int, int]]], limits: RunnerLimits, fault: int = -1) -> None:
        super().__init__([], 0, fault)
        self.batches, self.limits, self.lengths = batches, limits, [0]

    def fork(self) -> "Batcher":
        return Batcher(self.batches, self.limits, self.fault)

    def reset(self) -> None:
        self.lengths = [0]

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        self.reset()
        return self.decode(input_ids, attention_mask)

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:  # type: ignore[override]
        count, new = input_ids.shape
        assert count == len(self.lengths)
        self.lengths = [length + new for length in self.lengths]
        if attention_mask is None:
            padding = [0] * count
        else:
            assert attention_mask.shape == (count, max(self.lengths))
            padding = [int(length) for length in attention_mask.argmax(1)]
            assert [max(self.lengths) - each for each in padding] == self.lengths
        self.batches.append([(int(row[0]) // 1000, each) for row, each in zip(input_ids, padding, strict=True)])
        return super().prefill(input_ids)

    def gather(self, rows: Sequence[Row]) -> tuple[Row, ...]:
        runners = [row.runner for row in rows]
        lengths = [runner.lengths[row.index] for runner, row in zip(runners, rows, strict=True)]  # type: ignore[attr-defined]
        self.lengths = lengths
        return tuple(Row(self, index, max(lengths) - length) for index, length in enumerate(lengths))


@pytest.fixture
def open_with(
    golden_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_target: dict[str, str]
) -> Callable[[Counting], Generator]:
    """A generator on a runner of the test's own."""
    assert fake_target
    config = {"vocab_size": 4096, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(golden_model / "tokenizer.json", tmp_path)
    write_manifest(tmp_path, {"recipe": {"target": "fake"}, "signature": {"inputs": [BUDGET]}})

    def opened(runner: Counting, **options: Any) -> Generator:
        monkeypatch.setattr(type(get_target("fake")), "open", lambda *_arguments, **_options: runner)
        return moec.load(tmp_path, **options)

    return opened


@pytest.fixture
def schedule() -> Iterator[Callable[..., Scheduler]]:
    made: list[Scheduler] = []

    def scheduler(generator: Generator, **options: Any) -> Scheduler:
        made.append(Scheduler(generator, **{"parallel": 4, "max_requests": 8, **options}))
        return made[-1]

    yield scheduler
    for item in made:
        item.stop()


class Asked:
    """A job whose events are collected."""

    def __init__(self, scheduler: Scheduler, *prompt: int, most: int = 4, **inputs: float) -> None:
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.ticket = scheduler.submit(Job(prompt, most, Sampling(), inputs=inputs), self.events.put)

    def text(self) -> str:
        parts = []
        while (event := self.events.get(timeout=20)) is not None:
            if isinstance(event, Exception):
                raise event
            parts.append(event)
        return "".join(parts)


LONG = 1030
"""Tokens of a prompt that is read in three pieces."""
ORDERS = {
    # Two places: the third comes when the first two are done.
    "answers take turns token by token": (
        (Forking, {"parallel": 2}, [((1000,), 4), ((2000,), 4), ((3000,) * LONG, 2)]),
        [1, 2, 1, 2, 1, 2, 1, 2, 3, 3, 3, 3],
    ),
    "a long prompt lets others go on": (
        (Forking, {}, [((1000,) * LONG, 1), ((2000,), 3)]),
        [1, 2, 1, 2, 1, 2],
    ),
    "a runner that cannot fork answers one after the other": (
        (Counting, {}, [((1000,), 3), ((2000,), 3)]),
        [1, 1, 1, 2, 2, 2],
    ),
}


@pytest.mark.parametrize("case", ORDERS)
def test_who_takes_each_step(
    case: str, open_with: Callable[..., Generator], schedule: Callable[..., Scheduler]
) -> None:
    (runner, options, prompts), expected = ORDERS[case]
    steps: list[int] = []
    scheduler = schedule(open_with(runner(steps)), **options)
    asked = [Asked(scheduler, *prompt, most=most) for prompt, most in prompts]
    scheduler.start()
    for one in asked:
        one.text()
    assert steps == expected
    assert {one.ticket.outcome for one in asked} == {"length"}


@pytest.fixture
def batches() -> list[list[tuple[int, int]]]:
    return []


ROUNDS = {
    "one alone stays where it is": (RunnerLimits(), [((1000,), 3)], [[(1, 0)], [(1, 0)], [(1, 0)]]),
    "shorter ones are padded, and leave": (
        RunnerLimits(),
        [((1000, 1000, 1000), 4), ((2000,), 3), ((3000, 3000), 4)],
        [
            [(1, 0)],
            [(2, 0)],
            [(3, 0)],
            [(1, 0), (2, 2), (3, 1)],
            [(1, 0), (2, 2), (3, 1)],
            [(1, 0), (3, 1)],
        ],
    ),
    "one comes while others decode": (
        RunnerLimits(),
        [((1000,), 4), ((2000,), 4), ((3000,) * LONG, 2)],
        [
            *([(1, 0)], [(2, 0)], [(3, 0)]),
            *([(1, 0), (2, 0)], [(3, 0)]),
            *([(1, 0), (2, 0)], [(3, 0)]),
            [(1, LONG - 3), (2, LONG - 3), (3, 0)],
        ],
    ),
    "the batch has a limit": (
        RunnerLimits(max_batch=2),
        [((1000,), 3), ((2000,), 3), ((3000,), 2)],
        [[(1, 0)], [(2, 0)], [(1, 0), (2, 0)], [(1, 0), (2, 0)], [(3, 0)], [(3, 0)]],
    ),
    "no padding, no batch": (
        RunnerLimits(padding=False),
        [((1000,), 2), ((2000,), 2)],
        [[(1, 0)], [(2, 0)], [(1, 0)], [(2, 0)]],
    ),
    "a long one must be alone": (
        RunnerLimits(max_shared_length=3),
        [((1000, 1000), 4), ((2000,), 4)],
        [
            *([(1, 0)], [(2, 0)]),
            [(1, 0), (2, 1)],
            *([(2, 0)], [(1, 0)]),  # the first is at its limit, the second still in the batch
            *([(1, 0)], [(2, 0)]),
        ],
    ),
}


@pytest.mark.parametrize("case", ROUNDS)
def test_what_is_decoded_together(
    case: str,
    open_with: Callable[..., Generator],
    schedule: Callable[..., Scheduler],
    batches: list[list[tuple[int, int]]],
) -> None:
    limits, prompts, expected = ROUNDS[case]
    scheduler = schedule(open_with(Batcher(batches, limits)))
    asked = [Asked(scheduler, *prompt, most=most) for prompt, most in prompts]
    scheduler.start()
    texts = [one.text() for one in asked]
    assert batches == expected
    assert [one.ticket.statistics.new_tokens for one in asked] == [most for _, most in prompts]
    decode = scheduler._generator.tokenizer.decode
    for (prompt, most), text in zip(prompts, texts, strict=True):
        ids = [prompt[-1] + place for place in range(most + 1)]
        assert text == decode(ids)[len(decode(ids[:1])) :]


@pytest.mark.parametrize(
    ("content", "batching", "together"),
    [
        ({"recipe": {"target": "fake", "dtype": "fp32"}}, Batching.AUTO, True),
        ({"recipe": {"target": "fake", "dtype": "fp16"}}, Batching.AUTO, False),
        ({"recipe": {"target": "fake", "dtype": "fp16"}}, Batching.ALWAYS, True),
        ({"quantization": {"classes": {"attention": {"formats": {"int4:32": 1}}}}}, Batching.AUTO, True),
        ({"quantization": {"classes": {"attention": {"formats": {"int4:32:int8-dynamic": 1}}}}}, Batching.AUTO, False),
        ({}, Batching.NEVER, False),
    ],
)
def test_coarse_rounding_is_not_batched_unless_told(
    content: dict[str, Any],
    batching: Batching,
    together: bool,
    open_with: Callable[..., Generator],
    schedule: Callable[..., Scheduler],
    batches: list[list[tuple[int, int]]],
) -> None:
    generator = open_with(Batcher(batches, RunnerLimits()))
    generator.manifest.update(content)
    scheduler = schedule(generator, batching=batching)
    asked = [Asked(scheduler, 1000), Asked(scheduler, 2000)]
    scheduler.start()
    for one in asked:
        one.text()
    assert ([(1, 0), (2, 0)] in batches) == together


def test_answers_with_different_budgets_are_decoded_apart(
    open_with: Callable[..., Generator], schedule: Callable[..., Scheduler], batches: list[list[tuple[int, int]]]
) -> None:
    scheduler = schedule(open_with(Batcher(batches, RunnerLimits())))
    asked = [
        Asked(scheduler, 1000, routing_budget=0.2, most=3),
        Asked(scheduler, 1000, routing_budget=0.3, most=3),
        Asked(scheduler, 3000, routing_budget=0.2, most=3),
    ]
    scheduler.start()
    texts, decode = [one.text() for one in asked], scheduler._generator.tokenizer.decode
    assert batches[3:5] == [[(1, 0), (3, 0)], [(1, 0)]]
    wanted = ([1000, 1002, 1004, 1006], [1000, 1003, 1006, 1009], [3000, 3002, 3004, 3006])
    assert texts == [decode(ids)[len(decode(ids[:1])) :] for ids in wanted]


def test_a_fault_of_a_batch_ends_its_answers_and_no_others(
    open_with: Callable[..., Generator], schedule: Callable[..., Scheduler]
) -> None:
    scheduler = schedule(open_with(Batcher([], RunnerLimits(), fault=1002)))
    asked = [Asked(scheduler, 1000), Asked(scheduler, 2000), Asked(scheduler, 3000, routing_budget=0.2)]
    scheduler.start()
    assert asked[2].text()
    for one in asked[:2]:
        with pytest.raises(ValueError, match="nobody foresaw"):
            one.text()
    assert Asked(scheduler, 2000).text()  # the runner of the batch was given back


def test_a_member_that_goes_away_leaves_the_others_their_texts(
    open_with: Callable[..., Generator], schedule: Callable[..., Scheduler], batches: list[list[tuple[int, int]]]
) -> None:
    scheduler = schedule(open_with(Batcher(batches, RunnerLimits())))
    leaving, staying = Asked(scheduler, 1000, most=3000), Asked(scheduler, 2000, most=30)
    leaving.ticket.deliver = lambda _piece: leaving.ticket.cancel()  # type: ignore[method-assign]
    scheduler.start()
    decode = scheduler._generator.tokenizer.decode
    ids = list(range(2000, 2031))
    assert staying.text() == decode(ids)[len(decode(ids[:1])) :]
    assert leaving.ticket.outcome == "cancelled"
    assert batches[-1] == [(2, 0)]


def test_each_request_has_its_own_budget(
    open_with: Callable[..., Generator], schedule: Callable[..., Scheduler]
) -> None:
    generator = open_with(Forking([]), inputs={"routing_budget": 0.2})
    scheduler = schedule(generator)
    decode = generator.tokenizer.decode
    asked = [Asked(scheduler, 1000), Asked(scheduler, 1000, routing_budget=0.3), Asked(scheduler, 1000)]
    scheduler.start()
    texts = [one.text() for one in asked]
    start = len(decode([1000]))
    assert texts[0] == texts[2] == decode([1000, 1002, 1004, 1006, 1008])[start:]
    assert texts[1] == decode([1000, 1003, 1006, 1009, 1012])[start:]
    again = [Asked(scheduler, 1000) for _ in range(3)]  # runners that were given back have the default again
    assert [one.text() for one in again] == [texts[0]] * 3


def test_a_fault_ends_one_answer_alone(open_with: Callable[..., Generator], schedule: Callable[..., Scheduler]) -> None:
    scheduler = schedule(open_with(Forking([], fault=1002)))
    asked = [Asked(scheduler, 1000), Asked(scheduler, 2000), Asked(scheduler, 5, wrong=1.0)]
    scheduler.start()
    assert asked[1].text()
    with pytest.raises(ValueError, match="nobody foresaw"):
        asked[0].text()
    with pytest.raises(UsageError, match="no scalar input 'wrong'"):
        asked[2].text()
    assert asked[0].ticket.outcome == "error"
    assert Asked(scheduler, 2000).text()


def test_who_went_away_while_he_waited_leaves_his_place_in_line(
    open_with: Callable[..., Generator], schedule: Callable[..., Scheduler]
) -> None:
    scheduler = schedule(open_with(Forking([])), parallel=1, max_requests=2)
    first, second = Asked(scheduler, 1000, most=3000), Asked(scheduler, 2000)
    with pytest.raises(TooManyRequestsError):
        Asked(scheduler, 3000)
    second.ticket.cancel()
    scheduler.start()
    assert second.events.get(timeout=20) is None
    assert (second.ticket.outcome, second.ticket.statistics.new_tokens) == ("cancelled", 0)
    third = Asked(scheduler, 3000)
    first.ticket.cancel()
    assert third.text()


def test_the_end_cancels_everything(open_with: Callable[..., Generator]) -> None:
    ended: list[str] = []
    scheduler = Scheduler(
        open_with(Forking([])), parallel=1, max_requests=4, on_end=lambda ticket: ended.append(ticket.outcome)
    )
    asked = [Asked(scheduler, 1000, most=4000), Asked(scheduler, 2000)]
    scheduler.start()
    assert asked[0].events.get(timeout=20)
    scheduler.stop()
    assert ended == ["cancelled", "cancelled"]
    assert asked[1].events.get(timeout=1) is None
    with pytest.raises(TooManyRequestsError):
        Asked(scheduler, 1000)


def test_a_budget_and_a_fault_over_http(open_with: Callable[..., Generator], serve: Callable[..., Any]) -> None:
    generator = open_with(Forking([], fault=1999))
    served = serve(generator)
    answer = served.complete([1000], max_tokens=4, extra_body={"routing_budget": 0.3})
    decode = generator.tokenizer.decode
    assert answer.choices[0].text == decode([1000, 1003, 1006, 1009, 1012])[len(decode([1000])) :]
    with pytest.raises(openai.BadRequestError, match="greater than or equal to 0"):
        served.complete([1000], extra_body={"routing_budget": -1})
    for prompt in ([1999], [1998]):
        with pytest.raises(openai.InternalServerError, match="internal: ValueError"):
            served.complete(prompt)
    with pytest.raises(openai.InternalServerError, match="internal: ValueError"):
        served.complete([1999], stream=True)
    with pytest.raises(openai.APIError, match="internal: ValueError"):
        list(served.complete([1997], stream=True))
    assert served.metrics()["moec_generations_total{error}"] == 4
