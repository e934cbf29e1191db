"""Functions that take turns share what they ask for."""

import threading

import pytest
import torch

from moec.compiler.frontend.turns import Request, ask, in_turns


def _number(made: list[int], number: int) -> int:
    def make() -> torch.Tensor:
        made.append(number)
        return torch.tensor(number)

    return int(ask(Request((number,), make)))


def test_what_several_ask_for_is_made_once_and_in_order() -> None:
    made: list[int] = []

    def sums(numbers: tuple[int, ...]) -> int:
        return sum(_number(made, number) for number in numbers)

    work = [(1, 2, 4), (0, 2, 3, 4), (3,), ()]
    assert in_turns([lambda numbers=numbers: sums(numbers) for numbers in work]) == [7, 9, 3, 0]  # type: ignore[misc]
    assert made == [0, 1, 2, 3, 4]


def test_alone_it_is_made_for_the_caller() -> None:
    made: list[int] = []
    assert _number(made, 5) == 5
    assert made == [5]


def test_an_error_ends_all_of_them() -> None:
    ended: list[str] = []

    def waits() -> None:
        try:
            ask(Request((9,), lambda: torch.zeros(1)))
        except Exception:  # noqa: BLE001 - as code of others may do
            ended.append("caught")
        finally:
            ended.append("ended")

    def fails() -> None:
        raise ValueError("here")

    before = threading.active_count()
    with pytest.raises(ValueError, match="here"):
        in_turns([waits, fails, waits])
    assert ended == ["ended"]  # the third was not started
    assert threading.active_count() == before


def test_an_error_of_what_is_asked_for_is_raised() -> None:
    def damaged() -> torch.Tensor:
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        in_turns([lambda: ask(Request((0,), damaged)), lambda: ask(Request((1,), damaged))])
