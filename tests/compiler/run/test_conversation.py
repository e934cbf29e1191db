"""Turns with the golden model: what is kept between them changes no text."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.compiler.common.errors import UsageError
from moec.compiler.run.conversation import Conversation
from moec.compiler.run.generate import Generator

QUESTIONS = ("The list of arguments is", "Return the value", "What is the name of the table?")


@pytest.fixture(scope="module")
def generator(golden_onnx: Path) -> Generator:
    return moec.load(golden_onnx)


def with_context(golden_onnx: Path, directory: Path, tokens: int) -> Generator:
    """The artifact, said to be made for so many tokens."""
    shutil.copytree(golden_onnx, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": tokens}))
    return moec.load(directory)


def talk(generator: Generator, *questions: str, **options: Any) -> tuple[list[str], list[int]]:
    """Answers, and how many tokens of each turn were kept from before."""
    with generator.session() as session:
        settings = {"sampling": generator.sampling(), "max_new_tokens": 16, **options}
        conversation = Conversation(generator, session, **settings)
        answers, kept = [], []
        for question in questions:
            answers.append("".join(conversation.ask(question)))
            kept.append(conversation.statistics.kept_tokens)
        return answers, kept


def from_scratch(generator: Generator, questions: tuple[str, ...], answers: list[str], system: str = "") -> str:
    """The answer to the last question, with nothing kept."""
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in zip(questions, [*answers, ""], strict=False):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return generator.generate(generator.encode_chat(messages[:-1]), max_new_tokens=16)


def test_turns_go_on_where_the_last_one_ended(generator: Generator) -> None:
    answers, kept = talk(generator, *QUESTIONS)
    assert kept[0] == 0
    assert 0 < kept[1] < kept[2]
    for turn in range(3):
        assert answers[turn] == from_scratch(generator, QUESTIONS[: turn + 1], answers[:turn])
    assert len(set(answers)) > 1


def test_a_stop_string_ends_an_answer_and_the_next_turn_is_right(generator: Generator) -> None:
    (whole, _), _ = talk(generator, *QUESTIONS[:2])
    stop = whole[6:9]
    answers, kept = talk(generator, *QUESTIONS[:2], stop=[stop])
    assert answers[0] == whole[: whole.index(stop)]
    assert kept[1] == 0  # the runner has seen tokens of the stop string, which are no part of the conversation
    assert answers[1] == from_scratch(generator, QUESTIONS[:2], answers[:1]).split(stop)[0]


def test_system_and_reset(generator: Generator) -> None:
    with generator.session() as session:
        conversation = Conversation(generator, session, sampling=generator.sampling(), max_new_tokens=16, system="SQL")
        first = "".join(conversation.ask(QUESTIONS[0]))
        assert first == from_scratch(generator, QUESTIONS[:1], [], system="SQL")
        assert first != talk(generator, QUESTIONS[0])[0][0]
        assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
        conversation.reset()
        assert "".join(conversation.ask(QUESTIONS[0])) == first


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(generator: Generator) -> None:
    with generator.session() as session:
        conversation = Conversation(generator, session, sampling=generator.sampling(), max_new_tokens=16)
        pieces = conversation.ask(QUESTIONS[0])
        said = next(pieces) + next(pieces)
        pieces.close()
        assert conversation.messages[-1] == {"role": "assistant", "content": said}
        answer = "".join(conversation.ask(QUESTIONS[1]))
        assert conversation.statistics.kept_tokens > 0
        assert answer == from_scratch(generator, QUESTIONS[:2], [said])
        unheard = conversation.ask(QUESTIONS[2])
        unheard.close()
        assert len(conversation.messages) == 4


def test_a_full_context(golden_onnx: Path, tmp_path: Path) -> None:
    small = with_context(golden_onnx, tmp_path / "out", 24)
    with small.session() as session:
        conversation = Conversation(small, session, sampling=small.sampling(), max_new_tokens=16)
        assert list(conversation.ask(QUESTIONS[0]))
        counts = conversation.statistics
        assert counts.prompt_tokens + counts.new_tokens == 24
        assert conversation.is_full
        with pytest.raises(UsageError, match=r"is full: the conversation has \d+ tokens .* the artifact allows 24"):
            list(conversation.ask(QUESTIONS[1]))
        conversation.reset()
        with pytest.raises(UsageError, match="the text has") as caught:
            list(conversation.ask("word " * 30))
        assert caught.value.hint == "shorten the text"
        assert not conversation.messages


@pytest.mark.parametrize(("tokens", "new"), [(1, 16), (23, 1), (24, 0)])
def test_the_last_tokens_of_a_context(golden_onnx: Path, tmp_path: Path, tokens: int, new: int) -> None:
    small = with_context(golden_onnx, tmp_path / "out", 24)
    text = "a" + " a" * (tokens - 1)
    assert len(small.encode(text)) == tokens
    with small.session() as session:
        conversation = Conversation(small, session, sampling=small.sampling(), max_new_tokens=16, raw=True)
        if not new:
            with pytest.raises(UsageError, match="the text has 24 tokens with this turn, and the artifact allows 24"):
                list(conversation.ask(text))
        else:
            list(conversation.ask(text))
            assert conversation.statistics.new_tokens == new
            assert conversation.is_full == (new == 1)


def test_raw_turns_have_no_history(generator: Generator) -> None:
    answers, _ = talk(generator, QUESTIONS[0], QUESTIONS[1], raw=True)
    assert answers == [generator.generate(question, max_new_tokens=16) for question in QUESTIONS[:2]]


def test_a_model_without_a_template_is_refused(golden_onnx: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(golden_onnx, out)
    (out / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match="no chat template") as caught:
        talk(moec.load(out), QUESTIONS[0])
    assert "--raw" in caught.value.hint
