"""Measurement of variants on text, compared with the stored outputs of the pretrained model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moec import passes
from moec.compiler.build.cache import tools
from moec.compiler.common.digest import sha256_of_bytes, sha256_of_json, sha256_of_text
from moec.compiler.common.errors import CheckpointError
from moec.compiler.common.files import replacing
from moec.compiler.common.model_config import context_length
from moec.compiler.common.progress import Progress
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.program import Program
from moec.compiler.pipeline.calibration_data import LENGTH, CalibrationData
from moec.compiler.search.compensations import Compensations
from moec.compiler.search.incremental import Codes, IncrementalRunner
from moec.compiler.search.store import Measured
from moec.compiler.search.variant import Variant
from moec.compiler.text.corpus import read_text, spread, tokenize, windows
from moec.quantize.formats import IntegerFormat, parse_format
from moec.quantize.methods.calibrated import calibrate
from moec.quantize.methods.rounding import RoundingResult
from moec.quantize.methods.tensors import QuantizedTensor
from moec.quantize.planning.sensitivity import Part, parts_of, plan_of

BATCH = 4
"""Windows per batch."""
POSITIONS = 8
"""Positions of a batch whose logits are summed at once."""


@dataclass(frozen=True)
class Subject:
    """The model and the text of an evaluation, in a form that JSON can carry to a worker.

    Attributes:
        checkpoint: Directory or hub id.
        directory: Directory for outputs of the pretrained model and for calibrated codes.
        text: Calibration text; None: the one that moec includes.
        windows: Number of windows.
        window: Tokens per window.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Run modelling code of the checkpoint.
        folder: Where an earlier evaluator of this subject stored outputs and codes; None: in `directory`, by context.
    """

    checkpoint: str
    directory: str
    text: str | None = None
    windows: int = 32
    window: int = 256
    revision: str | None = None
    trust_remote_code: bool = False
    folder: str | None = None


@dataclass(frozen=True, eq=False)
class _Reference:
    """Predictions of the pretrained model for a batch.

    Attributes:
        probabilities: p, of the next token at all positions but the last: [B, S - 1, V] float32.
        negative_entropies: sum p log p: [B, S - 1] float32.
    """

    probabilities: Tensor
    negative_entropies: Tensor


CODES_WINDOWS = 96
"""Number of windows on which GPTQ is calibrated, as in an export."""


@dataclass
class Evaluator:
    """Measures variants of the pretrained model on one text."""

    subject: Subject
    checkpoint: Checkpoint = field(init=False)
    program: Program = field(init=False)
    parts: tuple[Part, ...] = field(init=False)
    compensations: Compensations = field(init=False)
    runner: IncrementalRunner = field(init=False)
    text: str = field(init=False)
    windows: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        given = self.subject
        text = read_text(given.text)
        self.checkpoint = Checkpoint.open(
            given.checkpoint, revision=given.revision, trust_remote_code=given.trust_remote_code
        )
        self.program, _ = passes.run_passes(capture(self.checkpoint), passes.default_passes())
        self.parts = parts_of(self.program)
        every = self._windows_of(text)
        fitted = self._calibration_windows()
        self._codes_windows = spread(every, CODES_WINDOWS)
        self._measure_on(text, _without(every, [*fitted, *self._codes_windows], given.windows), given.windows)
        self.compensations = Compensations(self.program, fitted)
        self.runner = IncrementalRunner(self.program, self.parts, None, self.compensations)

    def _windows_of(self, text: str) -> np.ndarray:
        length = min(self.subject.window, context_length(self.program.config) or self.subject.window)
        return windows(tokenize(self.checkpoint.directory, text), length)

    def _measure_on(self, text: str, every: np.ndarray, most: int) -> None:
        count = min(most, len(every))
        # Whole batches only, so that a measurement of a window does not depend on how many windows there are.
        self.text, self.windows = text, spread(every, max(count - count % BATCH, min(count, BATCH)))

    def _calibration_windows(self) -> np.ndarray:
        """The windows on which an export fits compensations: [n, length]; none if the text or context is too short."""
        try:
            material = CalibrationData.of(self.checkpoint, self.program, self.subject.text)
        except CheckpointError:
            return np.zeros((0, LENGTH), dtype=np.int64)
        fits = (context_length(self.program.config) or LENGTH) >= LENGTH
        return material.chosen[: len(material.chosen) if fits else 0]

    def on(self, text: str, most: int) -> Evaluator:
        """An evaluator of the same model and codes on another text, whose results are not stored for the search."""
        other = copy.copy(self)
        other.subject = replace(self.subject, folder=None)
        for name in ("context", "folder"):
            other.__dict__.pop(name, None)
        other._measure_on(text, self._windows_of(text), most)
        return other

    @cached_property
    def context(self) -> Mapping[str, Any]:
        """Everything but the recipe that determines a result."""
        return {
            "source": dict(sorted(self.checkpoint.digests.items())),
            "text": sha256_of_text(self.text),
            "windows": [*self.windows.shape, sha256_of_bytes(self.windows.tobytes())],
            "tools": tools(),
        }

    @cached_property
    def folder(self) -> Path:
        """Directory of stored data of this checkpoint and text."""
        if self.subject.folder is not None:
            return Path(self.subject.folder)
        return Path(self.subject.directory) / f"pretrained-{sha256_of_json(self.context)[:16]}"

    @property
    def shared_subject(self) -> Subject:
        """The subject for a worker, which uses the same stored data.

        The worker cannot find it by the context: Ray, for example, brings distributions of its own into the path.
        """
        return replace(self.subject, folder=str(self.folder.resolve()))

    def use_codes(self) -> None:
        """Use the codes that `calibrate` stored, in this process or in another."""
        self.runner = IncrementalRunner(self.program, self.parts, self._codes(), self.compensations)

    def evaluate(self, sections: Mapping[str, Any], start: int, stop: int) -> Measured:
        """Measure a variant on the windows [start, stop), which must be whole batches.

        Args:
            sections: `routing` and `quantize` of a recipe, as `Variant.sections` makes them.
            start: First window.
            stop: End of the range, exclusive.
        """
        variant = Variant.of(sections, self.program, self.parts)
        found = Measured()
        for first in range(start, stop, BATCH):
            found += self._batch(variant, first)
        return found

    def expert_use(self, sections: Mapping[str, Any], batches: int) -> list[list[int]]:
        """Tokens that each expert computes in a variant, over the first batches: [layers][experts].

        The numbering is that of the pretrained model; a pruned expert computes none.
        """
        variant = Variant.of(sections, self.program, self.parts)
        found = [np.zeros(row.num_experts, np.int64) for row in self.program.layers]
        remaining = [
            np.setdiff1d(np.arange(row.num_experts), removed)
            for row, removed in zip(self.program.layers, variant.removed, strict=True)
        ]
        for first in range(0, min(batches * BATCH, len(self.windows)), BATCH):
            ids = self.windows[first : first + BATCH]
            tokens = self.runner.evaluate(variant, (self.folder.name, first), ids).tokens
            for counts, own, experts in zip(found, tokens, remaining, strict=True):
                counts[experts] += own.numpy()
        return [counts.tolist() for counts in found]

    def _batch(self, variant: Variant, first: int) -> Measured:
        ids = self.windows[first : first + BATCH]
        output = self.runner.evaluate(variant, (self.folder.name, first), ids)
        reference = self._reference(first)
        logits = output.logits[:, :-1].float()
        # KL(p || q) = sum p log p - sum p z + log sum exp z, with logits z of q: one exponential per logit.
        # A few positions at a time stay in the processor's cache, which takes a third of the time of all at once.
        parts = torch.split(logits, POSITIONS, dim=1)
        normalizers = torch.cat([torch.logsumexp(part, dim=-1) for part in parts], dim=1)
        successors = torch.from_numpy(ids[:, 1:])
        losses = normalizers - logits.gather(-1, successors[..., None])[..., 0]
        # NumPy's einsum is one pass over both; torch's copies them first and takes eight times as long.
        means = torch.from_numpy(np.einsum("bsv,bsv->bs", reference.probabilities.numpy(), logits.numpy()))
        divergences = (reference.negative_entropies + normalizers - means).double().mean(-1).clamp(min=0.0)
        kept = (output.kept,) * len(ids)
        return Measured(tuple(losses.double().mean(-1).tolist()), tuple(divergences.tolist()), kept)

    def _reference(self, first: int) -> _Reference:
        """The predictions of the pretrained model for a batch, computed once and stored."""
        path, entropies = (self.folder / f"{what}-{first}.npy" for what in ("probabilities", "entropies"))
        if not entropies.exists():
            ids = self.windows[first : first + BATCH]
            unchanged = Variant.unchanged(self.program, self.parts)
            logits = self.runner.evaluate(unchanged, (self.folder.name, first), ids).logits
            logs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
            probabilities = logs.exp()
            for where, values in ((path, probabilities), (entropies, (probabilities * logs).sum(-1))):
                with replacing(where) as partial, partial.open("wb") as file:
                    np.save(file, values.numpy())
        return _Reference(
            torch.from_numpy(np.load(path, mmap_mode="c")), torch.from_numpy(np.load(entropies, mmap_mode="c"))
        )

    def calibrate(self, formats: Sequence[str], progress: Progress) -> None:
        """Quantize every part to each of these formats by GPTQ, once, and store the codes for all workers.

        The inputs of a tensor come from the pretrained model, so its codes do not depend on the formats of other parts.
        Formats that do not have 4 bits are rounded to nearest, as in an export.
        """
        for text in formats:
            fmt = parse_format(text)
            path = self._codes_path(text)
            if not isinstance(fmt, IntegerFormat) or fmt.bits != 4 or path.exists():
                continue
            fitting = [part for part in self.parts if self._fits(part, fmt)]
            found = calibrate(
                self.program, plan_of(dict.fromkeys(fitting, fmt)), self._codes_windows, progress=progress
            ).rounded
            with replacing(path) as partial:
                save_file({key: value for name, result in found.items() for key, value in _flat(name, result)}, partial)

    def _fits(self, part: Part, fmt: IntegerFormat) -> bool:
        widths = {self.program.weights[name].shape[-1] for name in part.names}
        return not isinstance(fmt.granularity, int) or not any(width % fmt.granularity for width in widths)

    def _codes_path(self, text: str) -> Path:
        return self.folder / f"codes-{text.replace(':', '-')}.safetensors"

    def _codes(self) -> Codes:
        found: dict[tuple[str, str], RoundingResult] = {}
        for path in sorted(self.folder.glob("codes-*.safetensors")):
            text = path.name.removeprefix("codes-").removesuffix(".safetensors").replace("-", ":")
            fmt = parse_format(text)
            assert isinstance(fmt, IntegerFormat)
            held = load_file(path)
            for key in held:
                name, _, what = key.rpartition("/")
                if what == "codes":
                    codes = held[key]
                    resolved = fmt.resolve(codes.shape[-1], name)
                    tensor = QuantizedTensor(resolved, codes, held[f"{name}/scales"], held.get(f"{name}/points"))
                    found[name, text] = RoundingResult(tensor, ())
        return found


def _without(every: np.ndarray, used: Sequence[np.ndarray], least: int) -> np.ndarray:
    """The windows [n, length] on which nothing was fitted; all of them if fewer than `least` are left."""
    seen = {row.tobytes() for row in used}
    fresh = np.array([index for index, row in enumerate(every) if row.tobytes() not in seen], dtype=np.int64)
    return every[fresh] if len(fresh) >= least else every


def _flat(name: str, result: RoundingResult) -> list[tuple[str, Tensor]]:
    tensor = result.tensor
    found = [(f"{name}/codes", tensor.codes), (f"{name}/scales", tensor.scales)]
    if tensor.zero_points is not None:
        found.append((f"{name}/points", tensor.zero_points))
    return [(key, value.clone().contiguous()) for key, value in found]


Evaluate = Callable[[Mapping[str, Any], int, int], Measured]
"""See `Evaluator.evaluate`."""
