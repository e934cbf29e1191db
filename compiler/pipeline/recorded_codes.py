"""Calibrated codes of an artifact, on the grid that the plan gives them and with the digests that moec.json records."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moec.compiler.common.errors import ArtifactError
from moec.quantize.formats import IntegerFormat
from moec.quantize.methods.tensors import QuantizedTensor
from moec.quantize.recorded import RecordedCodes
from moec.targets.base import Target
from moec.targets.stored_weights import Codes, StoredWeight

HINT = "export it again"


def recorded_codes(target: Target, directory: Path, manifest: Mapping[str, Any]) -> Mapping[str, RecordedCodes]:
    """The codes that calibration chose for an artifact, by name of the weight. Nothing is read before it is asked for.

    Args:
        target: Its target.
        directory: The artifact.
        manifest: Its moec.json.

    Raises:
        ArtifactError: It was rounded on calibration text, and moec.json records no codes, or a weight is not there.
    """
    facts = manifest.get("quantization", {})
    if "calibration" not in facts:
        return {}
    digests, stored = facts.get("codes"), target.stored_weights(directory)
    if not isinstance(digests, Mapping):
        raise ArtifactError(f"{directory}: its moec.json does not record the codes that calibration chose", hint=HINT)
    if missing := sorted(digests.keys() - stored.keys()):
        raise ArtifactError(f"{directory}: it holds no codes of {', '.join(missing[:4])}", hint=HINT)
    return {name: RecordedCodes(partial(on_grid, name, stored[name]), str(digest)) for name, digest in digests.items()}


def on_grid(name: str, stored: StoredWeight, start: int, stop: int, fmt: IntegerFormat) -> QuantizedTensor:
    """Some rows of a weight as the plan has them.

    Args:
        name: Name of the weight, for messages.
        stored: The weight in the artifact.
        start: First of the rows along axis 0, which for stacked experts are experts.
        stop: Behind the last of them.
        fmt: The format that the plan gives to it, with the block size resolved.

    Raises:
        ArtifactError: They are not on the grid of the plan.
    """
    found = stored.rows(start, stop)
    reason = "holds floats" if not isinstance(found, Codes) else _misfit(found, fmt)
    if reason or not isinstance(found, Codes):
        raise ArtifactError(f"{name}: the artifact {reason}, the plan says {fmt}", hint=HINT)
    blocks = found.codes.shape[-1] // fmt.block_length(found.codes.shape[-1], name)
    scales, points = (None if part is None else _by_block(part, blocks) for part in (found.scales, found.zero_points))
    if scales is None or (points is None) != (found.zero_points is None):
        raise ArtifactError(f"{name}: the artifact has several scales in a block of {fmt}", hint=HINT)
    exact = torch.tensor(scales)
    kept = exact.to(fmt.scale_type.dtype)
    if not bool(((kept == exact) & (kept > 0) & kept.isfinite()).all()):
        raise ArtifactError(f"{name}: the artifact has scales that {fmt} has not", hint=HINT)
    zeros = None if points is None else torch.tensor(points)
    return QuantizedTensor(fmt, torch.tensor(found.codes), kept, zeros)


def _misfit(found: Codes, fmt: IntegerFormat) -> str:
    """Why codes are not those of a format; empty where they are."""
    low, high = fmt.code_range
    if found.table is not None or found.scales is None:
        return "looks its values up in a table"
    if (found.zero_points is None) != fmt.symmetric:
        return "has zero points" if fmt.symmetric else "has no zero points"
    if found.codes.min(initial=0) < low or found.codes.max(initial=0) > high:
        return f"has codes outside of {low} .. {high}"
    return ""


def _by_block(parts: np.ndarray, blocks: int) -> np.ndarray | None:
    """[..., G] -> [..., blocks], where a target repeats a number for smaller blocks; None where they differ."""
    if parts.shape[-1] % blocks:
        return None
    groups = parts.reshape(*parts.shape[:-1], blocks, -1)
    return groups[..., 0] if (groups == groups[..., :1]).all() else None
