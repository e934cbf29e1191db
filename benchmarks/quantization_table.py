"""Size, parity and loss of formats on the golden model: `python benchmarks/quantization_table.py`.

Every row is an ONNX artifact that was exported through the API with all gates and evaluated with its own runner.
Weights are calibrated on the calibration text and evaluated on the held-out texts. Results of single runs are cached,
so that an interrupted run can be resumed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moec import passes
from moec.compiler.api import export
from moec.compiler.common import markdown
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.pipeline.export import GateError
from moec.compiler.text.corpus import spread, tokenize, windows
from moec.compiler.text.perplexity import compare
from moec.targets import get_target

sys.path.insert(0, str(Path(__file__).parent))
import pages
from machine import describe

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "golden_models" / "olmoe-tiny"
LENGTH, WINDOWS = 256, 48
TEXTS = ("python", "austen", "kjv")
CLASSES = ("experts_gate_up", "experts_down", "attention", "embedding", "lm_head")
ROWS: Mapping[str, Mapping[str, Any]] = {
    "fp16": {"format": "fp16"},
    "int8": {"format": "int8"},
    "int4, nearest": {"format": "int4", "rounding": "rtn"},
    "int4": {"format": "int4", "rounding": "gptq"},
    "int4, float activations": {"format": "int4", "rounding": "gptq", "activations": "float"},
    "auto, size of int4": {"format": "auto", "max_size": "int4"},
    "int4:32, nearest": {"format": "int4:32", "rounding": "rtn"},
    "int4:32": {"format": "int4:32", "rounding": "gptq"},
    "auto, size of int4:32": {"format": "auto", "max_size": "int4:32"},
    "int4:32 in all classes": {"format": {"formats": dict.fromkeys(CLASSES, "int4:32")}},
    "auto, size of int4:32 in all classes": {"format": "auto", "max_size": "int4:32 in all classes"},
    # As in most int4 checkpoints, embedding and lm_head are not quantized.
    "int4:32, embedding and head fp16": {
        "format": {"formats": dict.fromkeys(CLASSES[:3], "int4:32") | dict.fromkeys(CLASSES[3:], "fp16")}
    },
    "auto, size of int4:32, embedding and head fp16": {
        "format": "auto",
        "max_size": "int4:32, embedding and head fp16",
    },
}
"""Name of a row -> section `quantize` of its recipe. `max_size` may be the name of a row, meaning its weights' size."""


def measure(name: str, sizes: Mapping[str, int], work: Path, source: ProgramRunner) -> dict[str, Any]:
    """Export a row and evaluate it on every text."""
    section = dict(ROWS[name])
    if section.get("max_size") in sizes:
        section["max_size"] = sizes[section["max_size"]]
    directory = work / name.replace(" ", "-").replace(":", "-")
    try:
        result = export(MODEL, target="onnx", output=directory, overwrite=True, quantize=section)
    except GateError as error:
        result = error.result
    parity = next(verdict for verdict in result.verdicts if verdict.gate == "parity: artifact")
    found: dict[str, Any] = {
        "bytes": sum(path.stat().st_size for path in directory.glob("model.onnx*")),
        "weight_bytes": result.manifest["quantization"]["weight_bytes"],
        "expert_bytes": sum(result.manifest["facts"]["expert_tensor_bytes"].values()),
        "parity": parity.figures.get("max_error"),
        "excused": parity.figures.get("excused"),
        "passed": not result.failed,
    }
    runner = get_target("onnx").open(directory, threads=1)
    for text in TEXTS:
        ids = tokenize(MODEL, (MODEL / "texts" / f"heldout_{text}.txt").read_text(encoding="utf-8"))
        judged = compare(source, runner, spread(windows(ids, LENGTH), WINDOWS))
        found[text] = {
            "differences": (judged.candidate - judged.reference).tolist(),
            "divergences": judged.divergences.tolist(),
            "agreement": judged.agreement,
        }
    return found


def results(cache: Path) -> dict[str, dict[str, Any]]:
    """Every row, measured or from the cache."""
    known: dict[str, dict[str, Any]] = json.loads(cache.read_text()) if cache.is_file() else {}
    source = ProgramRunner(passes.run_passes(capture(Checkpoint.open(str(MODEL))), passes.default_passes())[0])
    with tempfile.TemporaryDirectory() as work:
        for name in ROWS:
            if name not in known:
                sizes = {row: found["weight_bytes"] for row, found in known.items()}
                known[name] = measure(name, sizes, Path(work), source)
                cache.write_text(json.dumps(known))
                print(name, f"{known[name]['bytes']} bytes", flush=True)
    return {name: known[name] for name in ROWS}


def increase(differences: np.ndarray) -> str:
    """Relative increase of perplexity with its paired 95 % bootstrap interval over windows."""
    draws = np.random.default_rng(0).integers(0, len(differences), (2000, len(differences)))
    low, high = np.quantile(np.expm1(differences[draws].mean(axis=1)), [0.025, 0.975])
    return f"{np.expm1(differences.mean()):+.2%} [{low:+.2%}, {high:+.2%}]"


def divergences(row: Mapping[str, Any]) -> np.ndarray:
    """KL divergence of every window of every text."""
    return np.concatenate([row[text]["divergences"] for text in TEXTS])


def share(name: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """KL divergence of a row relative to that of the row of the same size, with an interval as in `increase`."""
    if ROWS[name].get("max_size") not in found:
        return ""
    own, other = divergences(found[name]), divergences(found[ROWS[name]["max_size"]])
    draws = np.random.default_rng(0).integers(0, len(own), (2000, len(own)))
    low, high = np.quantile(own[draws].mean(axis=1) / other[draws].mean(axis=1), [0.025, 0.975])
    return f"{own.mean() / other.mean():.2f} [{low:.2f}, {high:.2f}]"


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The table as Markdown."""
    header = [
        "format",
        "artifact, MB",
        "of fp16",
        "experts of fp16",
        "parity",
        *(f"perplexity, {text}" for text in TEXTS),
        "KL",
        "KL, of the row of that size",
        "top-1",
    ]
    cells = [
        [
            name,
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['bytes'] / found['fp16']['bytes']:.3f}",
            f"{row['expert_bytes'] / found['fp16']['expert_bytes']:.3f}",
            f"{row['parity']:.0e}",
            *(increase(np.array(row[text]["differences"])) for text in TEXTS),
            f"{divergences(row).mean():.1e}",
            share(name, found),
            f"{np.mean([row[text]['agreement'] for text in TEXTS]):.1%}",
        ]
        for name, row in found.items()
    ]
    return markdown.table(header, cells)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "quantization.md", help="page to update")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "benchmarks" / "quantization_table.json", help="cache of measured rows"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = f"{table(results(arguments.cache))}\n\n{describe()}."
    print(text)
    pages.put(text, arguments.output)


if __name__ == "__main__":
    main()
