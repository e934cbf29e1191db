"""What calibration chose for an artifact, checked against the formats of the plan and the digests in moec.json."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moec.compiler.common.errors import ArtifactError
from moec.quantize.formats import IntegerFormat
from moec.quantize.kv_cache import scale_name, sha256_of_scale
from moec.quantize.methods.tensors import QuantizedTensor
from moec.quantize.recorded import RecordedCalibration, RecordedCodes
from moec.targets.base import Target
from moec.targets.stored_weights import Codes, StoredWeight

HINT = "export it again"


def recorded_calibration(target: Target, directory: Path, manifest: Mapping[str, Any]) -> RecordedCalibration:
    """The codes of weights and the scales of the KV cache of an artifact; arguments as for `recorded_codes`.

    Raises:
        ArtifactError: moec.json does not record them, or the artifact lacks one or has another.
    """
    codes = recorded_codes(target, directory, manifest)
    return RecordedCalibration(codes, _cache_scales(target, directory, manifest))


def _cache_scales(target: Target, directory: Path, manifest: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    """Input name of a state -> the scales of its channels in the artifact; empty for a cache of floats."""
    facts = manifest.get("quantization", {}).get("kv_cache")
    if facts is None:
        return {}
    digests, stored = facts.get("scales"), target.stored_weights(directory)
    if not isinstance(digests, Mapping):
        raise ArtifactError(f"{directory}: its moec.json does not record the scales of the KV cache", hint=HINT)
    found = {}
    for state, digest in digests.items():
        name = scale_name(state)
        if name not in stored:
            raise ArtifactError(f"{directory}: {name} is missing", hint=HINT)
        found[state] = torch.from_numpy(stored[name].values(0, np.iinfo(np.int64).max).copy())
        if sha256_of_scale(found[state]) != digest:
            raise ArtifactError(f"{directory}: {name} is not what moec.json records", hint=HINT)
    return found


def recorded_codes(target: Target, directory: Path, manifest: Mapping[str, Any]) -> Mapping[str, RecordedCodes]:
    """Weight name -> the codes that calibration chose for an artifact, read lazily; empty without calibration.

    Args:
        target: The target of the artifact.
        directory: The artifact.
        manifest: Its moec.json.

    Raises:
        ArtifactError: moec.json does not record the codes, or the artifact lacks a weight.
    """
    facts = manifest.get("quantization", {})
    if "calibration" not in facts:
        return {}
    digests, stored = facts.get("codes"), target.stored_weights(directory)
    if not isinstance(digests, Mapping):
        raise ArtifactError(f"{directory}: its moec.json does not record the codes that calibration chose", hint=HINT)
    if missing := sorted(digests.keys() - stored.keys()):
        raise ArtifactError(f"{directory}: the codes of {', '.join(missing[:4])} are missing", hint=HINT)
    return {
        name: RecordedCodes(partial(read_in_format, name, stored[name]), str(digest))
        for name, digest in digests.items()
    }


def read_in_format(name: str, stored: StoredWeight, start: int, stop: int, fmt: IntegerFormat) -> QuantizedTensor:
    """Rows [start, stop) of a stored weight in the format of the plan.

    Args:
        name: Name of the weight, for messages.
        stored: The weight in the artifact.
        start: First row along axis 0; for stacked experts a row is an expert.
        stop: End of the rows, exclusive.
        fmt: The weight's format in the plan, with the block size resolved.

    Raises:
        ArtifactError: The codes, scales or zero points are not in this format.
    """
    found = stored.rows(start, stop)
    reason = "holds floats" if not isinstance(found, Codes) else _misfit(found, fmt)
    if reason or not isinstance(found, Codes):
        raise ArtifactError(f"{name}: the artifact {reason}, but the plan says {fmt}", hint=HINT)
    blocks = found.codes.shape[-1] // fmt.block_length(found.codes.shape[-1], name)
    scales, points = (None if part is None else _by_block(part, blocks) for part in (found.scales, found.zero_points))
    if scales is None or (points is None) != (found.zero_points is None):
        raise ArtifactError(f"{name}: the artifact has several scales in a block of {fmt}", hint=HINT)
    exact = torch.tensor(scales)
    kept = exact.to(fmt.scale_type.dtype)
    if not bool(((kept == exact) & (kept > 0) & kept.isfinite()).all()):
        raise ArtifactError(f"{name}: the artifact has scales that {fmt} cannot hold", hint=HINT)
    zeros = None if points is None else torch.tensor(points)
    return QuantizedTensor(fmt, torch.tensor(found.codes), kept, zeros)


def _misfit(found: Codes, fmt: IntegerFormat) -> str:
    """Why codes are not in a format; empty if they are."""
    low, high = fmt.code_range
    if found.table is not None or found.scales is None:
        return "looks its values up in a table"
    if (found.zero_points is None) != fmt.symmetric:
        return "has zero points" if fmt.symmetric else "has no zero points"
    if found.codes.min(initial=0) < low or found.codes.max(initial=0) > high:
        return f"has codes outside of {low} .. {high}"
    return ""


def _by_block(parts: np.ndarray, blocks: int) -> np.ndarray | None:
    """[..., G] -> [..., blocks], undoing a target's split into smaller blocks; None if values differ in a block."""
    if parts.shape[-1] % blocks:
        return None
    groups = parts.reshape(*parts.shape[:-1], blocks, -1)
    return groups[..., 0] if (groups == groups[..., :1]).all() else None
