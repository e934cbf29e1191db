"""Sampling of the next token, with defaults from the model's generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moec.compiler.common.errors import ArtifactError, UsageError

DEFAULT_TOP_K = 50
"""Default of top_k in transformers for a model that samples (`_get_default_generation_params`)."""


class Sampling(BaseModel):
    """Sampling settings: the logits processors of transformers, in the same order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(0.0, ge=0, description="Divides the logits; 0 takes the most likely token (greedy).")
    top_k: int = Field(0, ge=0, description="Draw among the k most likely tokens; 0 means all.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Draw among the most likely tokens that together reach p (arXiv 1904.09751)."
    )
    min_p: float = Field(
        0.0, ge=0, le=1, description="Leave out tokens below p times the most likely one (arXiv 2407.01082)."
    )
    repetition_penalty: float = Field(
        1.0, gt=0, description="Above 1, tokens that occurred become less likely (arXiv 1909.05858)."
    )
    seed: int = Field(0, ge=0, description="Seed of sampling.")

    @model_validator(mode="after")
    def _restricts_draws(self) -> Sampling:
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.min_p):
            raise ValueError("top-k, top-p and min-p restrict random sampling: set a temperature above 0 as well")
        return self

    def choose(self, logits: np.ndarray, random: np.random.Generator, seen: Sequence[int] = ()) -> int:
        """Choose the next token.

        Args:
            logits: [V] float.
            random: Source of random numbers.
            seen: Tokens so far, including the prompt, for the repetition penalty.

        Returns:
            The token id.
        """
        if self.repetition_penalty != 1 and len(seen):
            logits = self._penalised(logits, np.unique(np.asarray(seen)))
        if self.temperature == 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")
        scaled = logits[order].astype(np.float64) / self.temperature
        if self.top_k:
            scaled = scaled[: self.top_k]
        probabilities = np.exp(scaled - scaled[0])
        probabilities /= probabilities.sum()
        if self.top_p < 1:
            kept = int(np.searchsorted(probabilities.cumsum(), self.top_p)) + 1
            probabilities = probabilities[:kept]
        probabilities = probabilities[probabilities >= self.min_p * probabilities[0]]
        return int(order[random.choice(len(probabilities), p=probabilities / probabilities.sum())])

    def _penalised(self, logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        result = logits.astype(np.float64)
        values = result[tokens]
        result[tokens] = np.where(values < 0, values * self.repetition_penalty, values / self.repetition_penalty)
        return result


def sampling_of(generation: Mapping[str, Any], given: Mapping[str, Any], *, where: str) -> Sampling:
    """The sampling settings of a model's generation_config.json, overridden by the user's.

    Without `do_sample`, a model is greedy, whatever its other settings, as in transformers. If the user gives a
    `temperature`, it decides whether decoding is greedy.

    Args:
        generation: generation_config.json.
        given: Fields of `Sampling` from the user; None means not given.
        where: The file, for messages.

    Raises:
        UsageError: A value of the user is out of range.
        ArtifactError: A value of the file is out of range.
    """
    own = {name: value for name, value in given.items() if value is not None}
    model: dict[str, Any] = {"repetition_penalty": generation.get("repetition_penalty")}
    greedy = float(own["temperature"]) == 0 if "temperature" in own else not generation.get("do_sample")
    if not greedy:
        drawn = {"temperature": 1.0, "top_k": DEFAULT_TOP_K if generation.get("do_sample") else None}
        model |= {name: _first(generation.get(name), drawn.get(name)) for name in _DRAWN}
    model = {name: value for name, value in model.items() if value is not None}
    try:
        defaults = Sampling.model_validate(model).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise ArtifactError(f"{where}: {_said(error)}", hint="correct the file, or export again") from error
    try:
        return Sampling.model_validate({**defaults, **own})
    except ValidationError as error:
        raise UsageError(f"sampling: {_said(error)}", hint=_RANGES) from error


_DRAWN = ("temperature", "top_k", "top_p", "min_p")
_RANGES = "temperature >= 0, top-k >= 0, 0 < top-p <= 1, 0 <= min-p <= 1, repetition-penalty > 0"


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value


def _said(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    return f"{name} is {first['input']!r}: {reason}" if name else reason
