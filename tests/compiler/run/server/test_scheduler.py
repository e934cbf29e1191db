"""Turns, places, budgets and faults, with a runner that counts."""

# ruff: noqa: ARG002 - the arguments are those of the protocol

import json
import queue
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

import moec
from moec.compiler.common.artifact import write_manifest
from moec.compiler.common.errors import UsageError
from moec.compiler.run.generate import Generator
from moec.compiler.run.server.scheduler import Job, Scheduler, TooManyRequestsError
from moec.compiler.text.sampling import Sampling
from moec.targets import get_target

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

    def scheduler(generator: Generator, **options: int) -> Scheduler:
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
