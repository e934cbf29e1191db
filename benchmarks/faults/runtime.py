"""Faults of the runtime or of the runner: states, positions of logits, and results that differ from run to run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from faults.fault import Fault
from moec.targets.runners import Runner, limits_of


class Faulty(Runner):
    """A runner that does what another one does; subclasses do one thing wrong."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.limits, self.steps = runner, limits_of(runner), 0

    def reset(self) -> None:
        self.runner.reset()

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        self.steps += 1
        return self.runner.decode(input_ids, attention_mask)

    def facts(self) -> Mapping[str, Any]:
        return self.runner.facts()


class Stale(Faulty):
    """`reset` keeps the states if the next sequences are as many as the last ones."""

    batch = 0

    def reset(self) -> None:
        pass

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        if len(input_ids) != self.batch or attention_mask is not None:
            self.runner.reset()
        self.batch = len(input_ids)
        if attention_mask is not None:
            self.batch = 0
        return self.runner.decode(input_ids, attention_mask)


class Forgetful(Faulty):
    """Every step starts from new states."""

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        self.runner.reset()
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        return self.runner.decode(input_ids, mask)


class ForgetsOneStep(Faulty):
    """The second step of decoding is computed twice, so its token is in the cache twice."""

    def reset(self) -> None:
        super().reset()
        self.steps = 0

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        logits = super().decode(input_ids, attention_mask)
        if self.steps == 2 and input_ids.shape[1] == 1 and attention_mask is None:
            self.runner.decode(input_ids)
        return logits


class PaddingIgnored(Faulty):
    """The mask of padding does not reach the artifact."""

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:  # noqa: ARG002
        return super().decode(input_ids, None)


class Late(Faulty):
    """Logits of the position before; those of the first position twice."""

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        logits = super().decode(input_ids, attention_mask)
        return np.concatenate([logits[:, :1], logits[:, :-1]], axis=1)


class LastRowForAll(Faulty):
    """Every sequence of a batch gets the logits of the last one."""

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        logits = super().decode(input_ids, attention_mask)
        return np.repeat(logits[-1:], len(logits), axis=0)


class NotANumber(Faulty):
    """One logit of a long prompt is NaN."""

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        logits = super().decode(input_ids, attention_mask).copy()
        if input_ids.shape[1] > 100:
            logits[0, 77, 5] = np.nan
        return logits


class LostUpdates(Faulty):
    """Every third long prompt loses a term at one position, as threads do that add to one location."""

    lost = 0

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        logits = super().decode(input_ids, attention_mask)
        if input_ids.shape[1] > 100:
            self.lost += 1
            if self.lost % 3 == 0:
                logits = logits.copy()
                logits[0, 50] *= 0.99
        return logits


class LastBit(Faulty):
    """The last bit of one logit differs from run to run, as if threads added in a random order."""

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        logits = super().decode(input_ids, attention_mask).copy()
        if self.steps % 2:
            logits[0, 0, 0] = np.nextafter(logits[0, 0, 0], np.float32(np.inf))
        return logits


REAL = ("onnx", "tflite")
"""Targets whose own runtime runs here."""
PADDED = ("onnx", "tensorrt")
"""Targets that take batches and padding."""

FAULTS = (
    Fault("runtime", "states of the last sequence kept", "mixtral", runner=Stale),
    Fault("runtime", "recurrent states of the last sequence kept", "qwen3_next", runner=Stale),
    Fault("runtime", "states forgotten after every step", "mixtral", runner=Forgetful),
    Fault("runtime", "one token twice in the cache", "mixtral", runner=ForgetsOneStep),
    Fault("runtime", "padding ignored", "mixtral", runner=PaddingIgnored, targets=PADDED),
    Fault("runtime", "logits of the position before", "mixtral", runner=Late),
    Fault("runtime", "logits of another sequence of the batch", "mixtral", runner=LastRowForAll, targets=PADDED),
    Fault("runtime", "one NaN in a long prompt", "mixtral", runner=NotANumber),
    Fault("runtime", "lost updates on several threads", "mixtral", runner=LostUpdates, targets=REAL),
    Fault("runtime", "the last bit differs from run to run", "mixtral", runner=LastBit, targets=REAL),
)
