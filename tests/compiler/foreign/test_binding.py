"""Names of inputs and states by convention, by shape and by a YAML file, and what is said where they are not found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.compiler.common.errors import CheckpointError, UsageError
from moec.compiler.foreign.binding import Binding, Bindings, bind
from moec.compiler.foreign.stepping import SteppingRunner, feeds
from moec.targets.model_files import Port

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
IDS, MASK = Port("input_ids", (None, None), I64), Port("attention_mask", (None, None), I64)
LOGITS = Port("logits", (None, None, 128), F32)


@pytest.fixture
def program(program_of: Callable[..., Any], tiny_checkpoint: Callable[[str], Path]) -> Any:
    """Two layers of two heads of width 16, and 128 tokens."""
    return program_of(tiny_checkpoint("olmoe"))


def caches(pattern: str, shape: tuple[int | None, ...] = (None, 2, None, 16), first: int = 0) -> list[Port]:
    return [Port(pattern.format(n, kind), shape, F32) for n in (first, first + 1) for kind in ("key", "value")]


def bound(program: Any, inputs: list[Port], outputs: list[Port], **given: Any) -> Binding:
    return bind([IDS, MASK, *inputs], [LOGITS, *outputs], program, Bindings(**given), "FILE")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("past_key_values.{}.{}", "present.{}.{}"),
        ("past_key_values.layers.{}.{}s", "cache.layers.{}.{}s"),
        ("in_{}_{}", "out_{}_{}"),
    ],
)
def test_states_by_convention_and_by_shape(program: Any, before: str, after: str) -> None:
    found = bound(program, caches(before), caches(after))
    pairs = [(before.format(n, kind), after.format(n, kind)) for kind in ("key", "value") for n in (0, 1)]
    assert [(state.input, state.output) for state in found.states] == pairs
    assert {state.shape for state in found.states} == {(1, 2, 0, 16)}


def test_layers_may_be_counted_otherwise(program: Any) -> None:
    found = bound(program, caches("past_key_values.{}.{}", first=3), caches("present.{}.{}", first=3))
    assert [state.input for state in found.states][:2] == ["past_key_values.3.key", "past_key_values.4.key"]


def test_other_layouts_and_buffers(program: Any) -> None:
    shape = (1, 64, 2, 16)
    found = bound(program, caches("past_key_values.{}.{}", shape), caches("present.{}.{}", shape))
    assert {(state.shape, state.buffer) for state in found.states} == {(shape, 64)}
    runner = SteppingRunner(lambda _: {}, found, {"format": "ONNX"})
    assert runner.limits.max_sequence == 64


def test_a_file_of_another_model(program: Any) -> None:
    with pytest.raises(CheckpointError, match="vocabulary 128"):
        bind([IDS], [Port("logits", (1, None, 500), F32)], program, Bindings(), "FILE")
    with pytest.raises(CheckpointError, match="of 1 layers, the checkpoint of 2"):
        bound(program, caches("past_key_values.{}.{}")[:2], caches("present.{}.{}")[:2])
    with pytest.raises(CheckpointError, match=r"past_key_values.0.key has the shape \[None, 2, None, 9"):
        bound(program, caches("past_key_values.{}.{}", (None, 2, None, 9)), caches("present.{}.{}"))


def test_states_that_are_not_found_are_named_with_the_yaml_to_write(program: Any) -> None:
    with pytest.raises(UsageError, match="no state for key of layer 0") as caught:
        bound(program, caches("a_{}_{}")[:3], caches("b_{}_{}"))
    assert "states: - {layer: 0, kind: key, input: NAME, output: NAME}" in caught.value.hint
    with pytest.raises(UsageError, match="nothing is known about the inputs temperature"):
        bound(program, [*caches("a{}{}"), Port("temperature", (1,), F32)], caches("b{}{}"))


def test_yaml(program: Any, tmp_path: Path) -> None:
    path = tmp_path / "names.yaml"
    states = "".join(
        f"  - {{layer: {n}, kind: {kind}, input: a_{n}_{kind}, output: b_{n}_{kind}}}\n"
        for n in (0, 1)
        for kind in ("key", "value")
    )
    path.write_text(f"input_ids: words\nlogits: result\nconstants: {{temperature: 2}}\nstates:\n{states}")
    inputs = [Port("words", (1, None), I64), Port("other", (1, None), I64), Port("temperature", (1,), F32)]
    found = bind(
        [*inputs[::2], *caches("a_{}_{}")],
        [Port("result", (1, None, 128), F32), *caches("b_{}_{}")],
        program,
        Bindings.read(path),
        "FILE",
    )
    given = feeds(found, np.array([[5, 6]]), 0)
    assert given["words"].tolist() == [[5, 6]]
    assert given["temperature"].tolist() == [2]
    path.write_text("input_idz: words")
    with pytest.raises(UsageError, match="input_idz"):
        Bindings.read(path)
    with pytest.raises(UsageError, match="FILE has no words"):
        bound(program, [], [], input_ids="words")


def test_feeds_of_a_step(program: Any) -> None:
    square = Port("mask", (1, 1, None, None), F32)
    found = bind(
        [Port("tokens", (None,), np.dtype(np.int32)), square, Port("input_pos", (None,), I64), *caches("a{}{}")],
        [LOGITS, *caches("b{}{}")],
        program,
        Bindings(),
        "FILE",
    )
    given = feeds(found, np.array([[5, 6]]), 3)
    assert given["tokens"].tolist() == [5, 6]
    assert given["input_pos"].tolist() == [3, 4]
    assert (given["mask"][0, 0] == 0).tolist() == [[True] * 4 + [False], [True] * 5]


def test_a_file_without_states_gets_the_whole_sequence(program: Any) -> None:
    seen: list[list[int]] = []

    def call(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append(given["input_ids"][0].tolist())
        return {"logits": np.eye(128, dtype=np.float32)[given["input_ids"]]}

    for length, filled in ((None, []), (5, [0, 0])):
        seen.clear()
        inputs = [Port("input_ids", (1, length), I64)]
        found = bind(inputs, [LOGITS], program, Bindings(), "FILE")
        runner = SteppingRunner(call, found, {"format": "ONNX"})
        assert runner.prefill(np.array([[7, 8]])).argmax(-1).tolist() == [[7, 8]]
        assert runner.decode(np.array([[9]])).argmax(-1).tolist() == [[9]]
        assert seen[-1] == [7, 8, 9, *filled]
        assert runner.limits.max_sequence == length
        assert "whole sequence" in runner.facts()["states"]


def test_logits_of_the_last_token_alone(program: Any) -> None:
    """The steps in between are run one by one from the same states, and the states are those of the whole step."""
    calls: list[tuple[int, int]] = []

    def call(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids, past = given["input_ids"], given["a0key"]
        calls.append((ids.shape[1], given["attention_mask"].shape[1]))
        grown = np.concatenate([past, np.full((1, 2, ids.shape[1], 16), ids[0, -1])], axis=2)
        logits = np.zeros((1, 1, 128), np.float32)
        logits[0, 0, :2] = ids[0, -1], grown.shape[2]
        return {"logits": logits, **{f"b{n}{kind}": grown for n in (0, 1) for kind in ("key", "value")}}

    found = bound(program, caches("a{}{}"), caches("b{}{}"))
    runner = SteppingRunner(call, found, {"format": "ONNX"})
    assert runner.prefill(np.array([[7, 8, 9]]))[0, :, :2].tolist() == [[7, 1], [8, 2], [9, 3]]
    assert runner.decode(np.array([[4]]))[0, :, :2].tolist() == [[4, 4]]
    assert runner.decode(np.array([[5]]))[0, :, :2].tolist() == [[5, 5]]
    assert calls == [(3, 3), (1, 1), (1, 2), (1, 4), (1, 5)]
    assert runner.facts()["logits"] == "of the last token alone"
