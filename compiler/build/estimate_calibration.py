"""Calibration of the estimate for a target and formats: builds small random models and measures decode steps."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moec.compiler.common.progress import Progress
from moec.compiler.measure.estimate.counting import Counts, count
from moec.compiler.measure.estimate.speeds import Speeds, fit, known_speeds
from moec.compiler.measure.latency import process
from moec.compiler.measure.latency.timings import BUSY, CANDIDATE, Clock, Series
from moec.compiler.pipeline.export import compile_recipe
from moec.compiler.pipeline.program import build_program
from moec.compiler.pipeline.recipe import make_recipe

CONTEXTS = (32, 256)
SECONDS = 8.0
_COMMON: Mapping[str, Any] = {"max_position_embeddings": 1024, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0}
SHAPES: tuple[Mapping[str, Any], ...] = (
    {"hidden_size": 256, "layers": 4, "heads": 4, "experts": 8, "top_k": 2, "width": 256, "vocab_size": 2000},
    {"hidden_size": 512, "layers": 4, "heads": 8, "experts": 16, "top_k": 8, "width": 512, "vocab_size": 2000},
    {"hidden_size": 1024, "layers": 2, "heads": 16, "experts": 8, "top_k": 1, "width": 256, "vocab_size": 16000},
    {"hidden_size": 256, "layers": 12, "heads": 8, "experts": 8, "top_k": 2, "width": 128, "vocab_size": 1000},
)
"""Shapes of which each is dominated by other work: none, experts, dense products, the number of operations."""


def speeds(target: str, dtype: str, formats: Mapping[str, str], progress: Progress) -> Speeds:
    """Speeds of a target and formats on this machine, from the cache or measured now.

    Args:
        target: Name of the target.
        dtype: Precision of what is not quantized.
        formats: Tensor class -> format of its quantized weights, from `counting.formats`.
        progress: Called for every shape that is measured.
    """
    found = known_speeds(target, dtype, formats, lambda: _calibrate(target, dtype, formats, progress))
    assert found is not None, "they were measured"
    return found


def _calibrate(target: str, dtype: str, formats: Mapping[str, str], progress: Progress) -> Speeds:
    measured: list[tuple[Counts, int, float]] = []
    for done, shape in enumerate(SHAPES):
        progress("calibration of this machine", done, len(SHAPES))
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = write_random(Path(folder) / "model", shape)
            chosen: Any = {"formats": dict(formats)} if formats else "none"
            measured += measure_decode(checkpoint, Path(folder) / "out", target, dtype, chosen)
    progress("calibration of this machine", len(SHAPES), len(SHAPES))
    return fit(measured)


def measure_decode(
    checkpoint: Path, output: Path, target: str, dtype: str, quantize: str | Mapping[str, Any]
) -> list[tuple[Counts, int, float]]:
    """Build a checkpoint and measure decode steps on one thread.

    Returns:
        Counts, context and seconds of a decode step, for each of `CONTEXTS` that fits.
    """
    fields = {"checkpoint": str(checkpoint), "target": target, "dtype": dtype}
    # Rounding to nearest suffices: the values of the weights do not change the speed.
    recipe = make_recipe({**fields, "quantize": {"format": quantize, "rounding": "rtn"}})
    counts = count(build_program(recipe))
    compile_recipe(recipe, output, gates=False)
    job = {"kind": "warm", "artifacts": {CANDIDATE: str(output)}, "contexts": list(CONTEXTS), "demands": []}
    found = process.measure({**job, "threads": 1, "seconds": SECONDS})["series"]
    return [
        (counts, context, undisturbed(Series.of(found[f"decode{context}"][CANDIDATE])))
        for context in CONTEXTS
        if f"decode{context}" in found
    ]


def undisturbed(series: Series) -> float:
    """Median seconds of a call: CPU time if the machine was busy, else wall-clock time."""
    return statistics.median(series.calls(Clock.CPU if series.without_core() > BUSY else Clock.WALL))


def write_random(directory: Path, shape: Mapping[str, Any]) -> Path:
    """Write an OLMoE checkpoint of random values with the sizes of `shape`; return `directory`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, OlmoeConfig

    config = OlmoeConfig(
        hidden_size=shape["hidden_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        num_experts=shape["experts"],
        num_experts_per_tok=shape["top_k"],
        intermediate_size=shape["width"],
        vocab_size=shape["vocab_size"],
        **_COMMON,
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    config.save_pretrained(directory)
    save_file(model.state_dict(), directory / "model.safetensors")
    return directory
