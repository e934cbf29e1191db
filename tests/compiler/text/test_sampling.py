"""Choosing tokens: the distribution, the penalties, and the model's own settings with flags over them."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moec.compiler.common.errors import ArtifactError, UsageError
from moec.compiler.text.sampling import DEFAULT_TOP_K, Sampling, sampling_of


def test_greedy_is_the_default_and_ties_go_to_the_lower_id() -> None:
    random = np.random.default_rng(0)
    assert Sampling().choose(np.array([1.0, 3.0, 3.0, 2.0]), random) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.0, "top_k": 2},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "top_p": 0.3},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "min_p": 0.4},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3},
    ],
)
def test_draws_follow_the_distribution_of_transformers(options: dict[str, float]) -> None:
    logits = np.array([0.3, 2.0, -0.4, 1.1, 0.9, -3.0])
    seen = [1, 2, 2]
    warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0))])
    warpers.append(TemperatureLogitsWarper(options["temperature"]))
    warpers.append(TopKLogitsWarper(int(options.get("top_k", 6))))
    warpers.append(TopPLogitsWarper(options.get("top_p", 1.0)))
    warpers.append(MinPLogitsWarper(options.get("min_p", 0.0)))
    expected = warpers(torch.tensor([seen]), torch.from_numpy(logits)[None]).softmax(-1)[0].numpy()
    sampling, random = Sampling(**options), np.random.default_rng(1)
    draws = np.bincount([sampling.choose(logits, random, seen) for _ in range(4000)], minlength=6) / 4000
    assert np.abs(draws - expected).max() < 0.03
    assert not draws[expected == 0].any()


def test_a_penalty_changes_the_greedy_choice() -> None:
    logits = np.array([2.0, 1.9, -1.0])
    assert Sampling(repetition_penalty=1.2).choose(logits, np.random.default_rng(0), [0]) == 1


GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.05}


@pytest.mark.parametrize(
    ("generation", "given", "expected"),
    [
        ({}, {}, {}),
        ({"temperature": 0.6, "top_k": 20}, {}, {}),  # without do_sample transformers is greedy
        (GENERATION, {}, {"temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.05, "top_k": DEFAULT_TOP_K}),
        (GENERATION, {"temperature": 0}, {"repetition_penalty": 1.05}),
        (GENERATION, {"temperature": 1.5, "top_k": 0}, {"temperature": 1.5, "top_p": 0.95, "repetition_penalty": 1.05}),
        ({}, {"temperature": 0.7}, {"temperature": 0.7}),
        (
            GENERATION,
            {"repetition_penalty": 1.0, "temperature": None},
            {**GENERATION, "repetition_penalty": 1.0, "top_k": 50},
        ),
    ],
)
def test_flags_go_over_the_models_settings(
    generation: dict[str, Any], given: dict[str, Any], expected: dict[str, Any]
) -> None:
    expected = {name: value for name, value in expected.items() if name != "do_sample"}
    assert sampling_of(generation, given, where="file") == Sampling(**expected)


@pytest.mark.parametrize(
    "given", [{"temperature": -1.0}, {"top_k": 3}, {"temperature": 1.0, "top_p": 0.0}, {"min_p": 2.0}]
)
def test_what_the_user_gave_wrongly(given: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="sampling"):
        sampling_of({}, given, where="file")


def test_what_the_model_says_wrongly() -> None:
    with pytest.raises(ArtifactError, match="file: temperature is 'hot'"):
        sampling_of({"do_sample": True, "temperature": "hot"}, {}, where="file")
