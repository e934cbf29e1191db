"""Gives moec damaged and hostile files, one at a time, and checks how each command ends.

    python benchmarks/hostile_inputs.py [--file recipe,matrix] [--seed 0] [-o docs/hostile.md]

Every file that moec reads (`benchmarks/hostile/files.py`) is damaged as a whole, and value by value. A command may
succeed or refuse, but it must not end in exit code 70, a signal or a traceback, take more than 10 s of CPU time or more
than 1 GB beyond a command that does nothing, say nothing, or leave a partial output. Exits with 1 if one does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from hostile.files import FILES, Input, Place, headers, templates
from hostile.run import Outcome, forked, judge
from machine import describe
from pages import put

from moec import cli
from moec.compiler.common import markdown
from moec.compiler.families.tiny_models import write_tiny_checkpoint
from moec.compiler.frontend.checkpoint import Checkpoint

GOLDEN = Path(__file__).resolve().parents[1] / "golden_models" / "olmoe-tiny"


def prepare(root: Path) -> None:
    """Write the valid files: a tiny checkpoint in two shards, its artifact, a recipe, a matrix, and the others."""
    from safetensors.torch import load_file, save_file

    place = Place(root)
    write_tiny_checkpoint("olmoe", place.checkpoint, vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (place.checkpoint / name).write_bytes((GOLDEN / name).read_bytes())
    if cli.dispatch(["export", str(place.checkpoint), "-t", "onnx", "-o", str(place.artifact), "-q"]):
        raise SystemExit("the valid checkpoint cannot be exported")
    # The first estimate on a machine measures it, which is no matter of the input.
    cli.dispatch(["estimate", str(place.checkpoint), "-t", "onnx", "-q"])
    (root / "search").mkdir()
    recipe = {
        "checkpoint": "checkpoint",
        "target": "onnx",
        "quantize": {"format": "int8"},
        "routing": {"policy": "off"},
    }
    matrix = {"models": ["./checkpoint"], "targets": ["onnx"], "quantize": [{"format": "int8"}]}
    calibration = {
        "policy": "top-p",
        "checkpoint": dict(Checkpoint.open(str(place.checkpoint)).digests),
        "entries": [
            {"budget": share, "parameters": {"mass": share + 0.1}, "kept_share": share, "kept_per_layer": [share] * 2}
            for share in (0.7, 0.5)
        ],
    }
    search = {"schema_version": 1, "source": {}, "settings": {"checkpoint": str(place.checkpoint), "target": "onnx"}}
    for name, content in {
        "recipe.yaml": recipe,
        "matrix.yaml": matrix,
        "calibration.json": calibration,
        "search/search.json": search,
    }.items():
        (root / name).write_text(json.dumps(content))
    tensors = load_file(place.checkpoint / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(sorted(tensors), "model.safetensors")}
    save_file(tensors, place.checkpoint / "model.safetensors", metadata={"format": "pt"})
    (place.checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


def corpus(root: Path, seed: int, chosen: Sequence[str]) -> Iterator[Input]:
    """All inputs, or those of the chosen files."""
    found: list[Input] = []
    for number, file in enumerate(FILES):
        found += file.inputs(file.path(Place(root)).read_bytes(), seed + number)
    found += headers((Place(root).checkpoint / "model.safetensors").read_bytes(), seed)
    found += templates()
    return (item for item in found if not chosen or item.file in chosen)


def page(outcomes: Sequence[Outcome], seed: int) -> str:
    """The table by file, and what it was made on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    rows = []
    for file in dict.fromkeys(item.file for item in outcomes):
        own = [item for item in outcomes if item.file == file]
        codes = Counter(item.code for item in own)
        rows.append(
            (
                file,
                str(len(own)),
                ", ".join(f"{code}: {count}" for code, count in sorted(codes.items())),
                f"{max(item.seconds for item in own):.1f}",
                f"{max(item.memory for item in own) / 1e6:.0f}",
                str(sum(bool(item.fault) for item in own)),
            )
        )
    header = ("file", "inputs", "exit codes", "longest, s", "most memory, MB", "faults")
    return (
        f"{len(outcomes)} inputs, seed {seed}; made on commit {commit.stdout.strip()}, {describe()}.\n\n"
        f"{markdown.table(header, rows)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default="", help="names of files, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        valid = Path(folder) / "valid"
        # In a child, since libraries start threads, which a fork does not take along.
        if os.waitstatus_to_exitcode(os.waitpid(_child(valid), 0)[1]):
            raise SystemExit("the valid files cannot be made")
        _load()
        idle = forked(["--version"], Path(folder) / "log")[2]
        outcomes = []
        for item in corpus(valid, options.seed, [name for name in options.file.split(",") if name]):
            outcome = judge(item, valid, Path(folder) / "work", idle)
            outcomes.append(outcome)
            mark = f"FAULT ({outcome.fault}) " if outcome.fault else ""
            print(
                f"{mark}{item.file}: {item.damage}: {outcome.command}: {outcome.code}: {outcome.said[:160]}", flush=True
            )
    if options.output is not None:
        put(page(outcomes, options.seed), options.output)
    faults = [item for item in outcomes if item.fault]
    print(f"{len(outcomes)} inputs, {len(faults)} faults")
    sys.exit(bool(faults))


def _load() -> None:
    """Load the libraries once, and not in every child. None of them starts a thread when it is loaded."""
    import moec.compiler.pipeline.export
    import moec.compiler.run.generate
    import moec.compiler.search.session
    import moec.targets.onnx.lower
    import moec.targets.onnx.runner  # noqa: F401

    cli.dispatch(["export", "no-such-checkpoint", "-t", "onnx", "-o", "no-such-output", "-q"])


def _child(valid: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            prepare(valid)
        except BaseException as error:  # noqa: BLE001 - told by the exit code
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child


if __name__ == "__main__":
    main()
