"""The verdict of the judge: a runtime's logits against the model of transformers, position by position.

A position is wrong if its largest difference, relative to the largest logit, exceeds `base + SPREAD * spread`. `base`
covers what rounding adds where nothing is decided: 1e-3 in float32, where correct artifacts differ by less than 1e-4;
1e-2 in half precision; with quantized weights 2e-2 (and 5e-2 where activations are rounded to int8), since the codes of
a few weights on the border between two codes differ with the dtype in which they were rounded. `spread` is the largest
change of that position when noise of the size of the runtime's rounding is added inside of the reference: where two
router scores are nearly equal, noise exchanges experts as rounding does. If a position is wrong, more and larger noise
is tried before the judge says so.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuzz.reference import Noise, Reference
from fuzz.rounding import formats
from fuzz.runtimes import Runtime, RuntimeFailedError, fed, open_runtime

SINGLE = ((11, 1, 1, 1, 1), (29, 1, 1, 6, 1))
"""Steps in which single sequences are fed: prefill, then single tokens and a piece of six."""
PADDED = (9, 5)
"""Lengths of two sequences in one batch, the shorter with left padding; both are then continued by two tokens."""
SPREAD, TRIES, MORE_TRIES = 2.5, 2, 48
SHARP = 0.2
"""A position whose allowance is larger says nothing, and a quarter of all positions must say something."""


@dataclass(frozen=True)
class Judgement:
    """What the judge found.

    Attributes:
        right: Whether the artifact computes what it should; None if too few positions say anything.
        error: Largest difference, relative to the largest logit.
        excess: Largest quotient of difference and allowance; more than 1 is wrong.
        sharp: Share of the positions with an allowance below `SHARP`.
        failed: What the runtime says if it cannot run the artifact, which is wrong then.
    """

    right: bool | None
    error: float
    excess: float
    sharp: float
    failed: str = ""


@dataclass(frozen=True)
class Precision:
    """What a runtime's arithmetic allows: `base`, and the noise that stands for its rounding."""

    base: float
    noise: Noise


def precision(recipe: Mapping[str, Any], dtype: str) -> Precision:
    """The precision of an artifact.

    Args:
        recipe: Its recipe.
        dtype: Precision of its activations, "fp32" or "fp16".
    """
    everywhere, base = (5e-4, 1e-2) if dtype == "fp16" else (2e-6, 1e-3)
    quantize = recipe.get("quantize")
    forms = formats(recipe["target"], quantize["format"]).values() if quantize else ()
    if not any(form.startswith("int") for form in forms):
        return Precision(max(base, 2e-3 if quantize else 0.0), Noise(everywhere))
    if recipe["target"] in ("coreml", "tensorrt"):
        return Precision(2e-2, Noise(everywhere))
    if recipe["target"] == "onnx" and recipe.get("options", {}).get("flavor") == "portable":
        return Precision(2e-2, Noise(everywhere))
    return Precision(5e-2, Noise(everywhere, 1 / 254))


def reference_of(checkpoint: Path, recipe: Mapping[str, Any]) -> Reference:
    """The model that an artifact of this recipe should compute."""
    reference = Reference(checkpoint)
    routing = recipe.get("routing") or {}
    if removed := routing.get("removed"):
        reference.prune(removed)
    if quantize := recipe.get("quantize"):
        wanted = quantize["format"]
        overrides: Sequence[Mapping[str, Any]] = [] if isinstance(wanted, str) else wanted.get("overrides", [])
        reference.quantize(formats(recipe["target"], wanted), overrides)
    if routing.get("policy", "off") != "off":
        reference.drop(routing["policy"], routing["parameters"])
    return reference


def judge(checkpoint: Path, artifact: Path, recipe: Mapping[str, Any], dtype: str, seed: int = 0) -> Judgement:
    """Judge an artifact.

    Args:
        checkpoint: What it was built from.
        artifact: Its directory.
        recipe: Its recipe.
        dtype: Precision of its activations, "fp32" or "fp16".
        seed: Seed of the token ids.
    """
    reference = reference_of(checkpoint, recipe)
    try:
        return _judge(reference, artifact, recipe, precision(recipe, dtype), seed)
    except RuntimeFailedError as error:
        return Judgement(False, float("inf"), float("inf"), 0.0, str(error))


def _judge(reference: Reference, artifact: Path, recipe: Mapping[str, Any], allowed: Precision, seed: int) -> Judgement:
    runtime = open_runtime(recipe, artifact, padded=not reference.by_steps)
    chance = np.random.default_rng(seed)
    vocabulary = reference.decoder.config.get_text_config().vocab_size
    found = []
    for steps in SINGLE:
        ids = chance.integers(0, vocabulary, (1, sum(steps)))
        got = fed(runtime, ids, np.ones_like(ids), steps)
        found.append(_compared(reference, allowed, ids, steps, got))
    if runtime.batches:
        found += _padded(reference, allowed, runtime, chance.integers(0, vocabulary, (2, PADDED[0] + 2)))
    errors = np.concatenate([errors for errors, _ in found])
    allowances = np.concatenate([allowances for _, allowances in found])
    sharp = float((allowances < SHARP).mean())
    excess = float((errors / allowances).max())
    right = bool(excess <= 1)
    return Judgement(None if right and sharp < 0.25 else right, float(errors.max()), excess, sharp)


def _padded(
    reference: Reference, allowed: Precision, runtime: Runtime, ids: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    mask = np.ones_like(ids)
    mask[1, : PADDED[0] - PADDED[1]] = 0
    got = fed(runtime, ids * mask, mask, (PADDED[0], 1, 1))
    rows = []
    for row, length in enumerate(PADDED):
        start = PADDED[0] - length
        rows.append(
            _compared(reference, allowed, ids[row : row + 1, start:], (length, 1, 1), got[row : row + 1, start:])
        )
    return rows


def _compared(
    reference: Reference, allowed: Precision, ids: np.ndarray, steps: Sequence[int], got: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Errors and allowances of the positions of one sequence, both [T]."""
    tokens, seed = torch.from_numpy(ids.astype(np.int64)), zlib.crc32(ids.tobytes())
    want = reference.logits(tokens, steps).numpy()
    scale = float(np.abs(want).max())
    errors = np.nan_to_num(np.abs(got - want).max(-1)[0] / scale, nan=np.inf)
    spread = np.zeros_like(errors)

    def try_noise(count: int, factor: float) -> np.ndarray:
        noise = Noise(allowed.noise.everywhere * factor, allowed.noise.products * factor)
        for index in range(count):
            other = reference.logits(tokens, steps, noise, seed + index).numpy()
            np.maximum(spread, np.abs(other - want).max(-1)[0] / scale, out=spread)
        return allowed.base + SPREAD * spread

    allowances = try_noise(TRIES, 1.0)
    if (errors > allowances).any():
        allowances = try_noise(MORE_TRIES, 1.0)
    if (errors > allowances).any():
        allowances = try_noise(MORE_TRIES, 2.0)
    return errors, allowances
