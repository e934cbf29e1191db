"""How often a model uses each expert on a text, window by window: what routing looked like when it was calibrated.

An artifact with dynamic routing has it in `expert_use.json`, for the text of its calibration. The file is compact JSON
without times, so it is the same on every rebuild.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from moec.compiler.common.errors import ArtifactError, first_line
from moec.compiler.common.files import read_json
from moec.compiler.measure.paging import TOKENS
from moec.compiler.text.perplexity import LanguageModel
from moec.targets.runners import CountingRunner

if TYPE_CHECKING:
    from moec.passes.routing.calibrate.traces import RoutingTrace

FILE = "expert_use.json"
Told = Callable[[int, int], None]


class Counting(CountingRunner, LanguageModel, Protocol):
    """A runner that counts which experts are used."""


class _Text(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    windows: PositiveInt
    length: PositiveInt


class _Layer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    module: str = Field(description="Name of the MoE layer.")
    top_k: PositiveInt = Field(description="Slots per token of the pretrained router.")
    tokens: list[list[NonNegativeInt]] = Field(description="[windows][experts]: tokens that each expert computes.")
    sequence: list[list[NonNegativeInt]] = Field(
        default_factory=list, description="[tokens][]: the experts that each of the first tokens uses; empty: unknown."
    )


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    text: _Text
    layers: list[_Layer]


@dataclass(frozen=True, eq=False)
class LayerUse:
    """The use of the experts of one MoE layer.

    Attributes:
        module: Name of the layer.
        top_k: Slots per token of the pretrained router.
        tokens: Tokens that each expert computes in each window, [windows, experts] int64; dropped slots do not count.
        sequence: For each of the first tokens, the experts that it uses; empty if that was not recorded.
    """

    module: str
    top_k: int
    tokens: np.ndarray
    sequence: tuple[tuple[int, ...], ...] = ()

    def dropped(self, length: int) -> float:
        """Share of the pretrained slots that were dropped, for windows of `length` tokens."""
        return 1 - float(self.tokens.sum()) / (len(self.tokens) * length * self.top_k)


@dataclass(frozen=True, eq=False)
class ExpertUse:
    """The use of all experts on windows of a text.

    Attributes:
        sha256: Digest of the text.
        length: Tokens per window.
        layers: One entry per MoE layer, in order; all have the same number of windows.
    """

    sha256: str
    length: int
    layers: tuple[LayerUse, ...]

    @property
    def shapes(self) -> dict[str, int]:
        """Name of each MoE layer -> number of its experts."""
        return {layer.module: layer.tokens.shape[1] for layer in self.layers}

    @property
    def kept(self) -> float:
        """Share of all slots of the pretrained router that are executed."""
        dropped = [layer.dropped(self.length) for layer in self.layers]
        return 1 - float(np.average(dropped, weights=[layer.top_k for layer in self.layers]))

    @classmethod
    def of_traces(
        cls,
        traces: Sequence[RoutingTrace],
        modules: Sequence[tuple[str, int, int]],
        windows: np.ndarray,
        sha256: str,
    ) -> Self:
        """The use that the interpreter recorded.

        Args:
            traces: One trace per MoE layer of the final Program, over `windows`.
            modules: Name, pretrained top-k and number of experts of each layer.
            windows: Token ids [n, length].
            sha256: Digest of the text.
        """
        layers = []
        for trace, (module, top_k, experts) in zip(traces, modules, strict=True):
            indices, live = (value.reshape(len(windows), -1).numpy() for value in (trace.indices, trace.weights != 0))
            counted = [np.bincount(row[used], minlength=experts) for row, used in zip(indices, live, strict=True)]
            layers.append(LayerUse(module, top_k, np.array(counted, dtype=np.int64), sequence_of(trace, windows.size)))
        return cls(sha256, windows.shape[1], tuple(layers))

    @classmethod
    def of_runner(
        cls, runner: Counting, modules: Sequence[tuple[str, int]], windows: np.ndarray, sha256: str, told: Told
    ) -> Self:
        """The use that an artifact reports itself.

        Args:
            runner: The opened artifact, which returns the experts of each token.
            modules: Name and pretrained top-k of each MoE layer.
            windows: Token ids [n, length].
            sha256: Digest of the text.
            told: Called with the number of finished windows and their total number.
        """
        counted: list[list[np.ndarray]] = [[] for _ in modules]
        for done, window in enumerate(windows):
            before = {layer: counts.copy() for layer, counts in runner.expert_tokens.items()}
            runner.prefill(window[None])
            for layer, rows in enumerate(counted):
                rows.append(runner.expert_tokens[layer] - before[layer])
            told(done + 1, len(windows))
        layers = (
            LayerUse(module, top_k, np.array(rows, dtype=np.int64))
            for (module, top_k), rows in zip(modules, counted, strict=True)
        )
        return cls(sha256, windows.shape[1], tuple(layers))

    def write(self, directory: Path) -> None:
        """Write `expert_use.json` into an artifact.

        Raises:
            OSError: The file system refuses.
        """
        layers = [
            _Layer(
                module=one.module, top_k=one.top_k, tokens=one.tokens.tolist(), sequence=list(map(list, one.sequence))
            )
            for one in self.layers
        ]
        windows = len(self.layers[0].tokens)
        content = _File(text=_Text(sha256=self.sha256, windows=windows, length=self.length), layers=layers)
        text = json.dumps(content.model_dump(), separators=(",", ":"), sort_keys=True)
        (directory / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """What an artifact has recorded; None if it has recorded nothing.

        Raises:
            ArtifactError: The file is damaged.
        """
        path, hint = directory / FILE, "copy the artifact again, or export it again"
        if not path.is_file():
            return None
        try:
            content = _File.model_validate(read_json(path, ArtifactError, hint=hint))
        except ValidationError as error:
            raise ArtifactError(f"{path}: damaged: {first_line(error)}", hint=hint) from error
        for layer in content.layers:
            if len(layer.tokens) != content.text.windows or len({len(row) for row in layer.tokens}) != 1:
                raise ArtifactError(f"{path}: damaged: {layer.module} has not one row per window", hint=hint)
            if any(expert >= len(layer.tokens[0]) for row in layer.sequence for expert in row):
                raise ArtifactError(f"{path}: damaged: {layer.module} has not so many experts", hint=hint)
        if len({len(layer.sequence) for layer in content.layers}) > 1:
            raise ArtifactError(f"{path}: damaged: its layers have sequences of different lengths", hint=hint)
        layers = (
            LayerUse(one.module, one.top_k, np.array(one.tokens, dtype=np.int64), tuple(map(tuple, one.sequence)))
            for one in content.layers
        )
        return cls(content.text.sha256, content.text.length, tuple(layers))


def sequence_of(trace: RoutingTrace, total: int, tokens: int = TOKENS) -> tuple[tuple[int, ...], ...]:
    """The experts that each of the first tokens of a trace uses, without those that routing dropped.

    Args:
        trace: The trace; families that pass every slot alone have a row for each slot.
        total: Number of all its tokens.
        tokens: Number of tokens at most.
    """
    rows = (value.reshape(total, -1)[:tokens].numpy() for value in (trace.indices, trace.weights != 0))
    return tuple(tuple(row[used].tolist()) for row, used in zip(*rows, strict=True))
