"""Makes random builds, and judges each by a judge that shares no code with the gates.

    python benchmarks/fuzz_builds.py --seed 0 --count 2000 --resume rows.jsonl -o docs/fuzz.md
    python benchmarks/fuzz_builds.py --resume rows.jsonl --minimise 17

Architectures are drawn from the families and released models with odd sizes and other flags, recipes from targets,
formats, routing policies and pruning (`benchmarks/fuzz/`). Each build runs its gates; the judge then compares the
artifact in its runtime with the model in transformers. Exits with 1 if a build is silently wrong or ends in exit code
70, or if more than 0.5 % of the judged artifacts are false alarms.

`--resume` keeps finished rows, so that a run can be stopped and continued; `--retry` makes those again that were no
success. `--minimise` makes one build of the file as simple as its fault allows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from fuzz import build
from fuzz.campaign import Campaign, read
from fuzz.minimise import minimised
from fuzz.recipes import TARGETS
from fuzz.table import alarms_share, page
from machine import describe
from pages import put

MOST_ALARMS = 0.005
_SUCCESS = (build.RIGHT, build.REFUSED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--target", default=",".join(TARGETS), help="targets, separated by commas")
    parser.add_argument("--only", default="", help="indices of builds, separated by commas")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--retry", action="store_true")
    parser.add_argument("--minimise", type=int)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    quiet()
    machine = describe()
    with tempfile.TemporaryDirectory() as folder:
        rows = options.resume or Path(folder) / "rows.jsonl"
        if options.minimise is not None:
            row = minimised(read(rows)[options.minimise], Path(folder) / "work")
            print(json.dumps(asdict(row), indent=2))
            return
        if options.retry:
            kept = [row for row in read(rows).values() if row.outcome.outcome in _SUCCESS]
            rows.write_text("".join(row.line() for row in kept))
        load()
        indices = [int(index) for index in options.only.split(",") if index] or range(options.count)
        Campaign(options.seed, rows, Path(folder) / "work", _commit(), options.target.split(",")).run(indices)
        known = read(rows)
        found = [known[index] for index in sorted(known) if index in indices]
    if options.output is not None:
        put(page(found, machine), options.output)
    faults = [row for row in found if row.outcome.outcome in build.FAULTS]
    for row in faults:
        print(f"{row.index}: {row.outcome.outcome}: {row.architecture.base}: {row.recipe}: {row.outcome.cause}")
    print(f"{len(found)} builds, {len(faults)} faults")
    worst = [row for row in faults if row.outcome.outcome != build.ALARM]
    sys.exit(bool(worst) or alarms_share(found) > MOST_ALARMS)


def quiet() -> None:
    """One thread for small models, and no messages of libraries about random configurations."""
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load() -> None:
    """Load the libraries once, and not in every child. None of them starts a thread when it is loaded."""
    import moec.targets.coreml.lower
    import moec.targets.coreml.runner
    import moec.targets.onnx.lower
    import moec.targets.onnx.runner
    import moec.targets.tflite.lower  # noqa: F401


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


if __name__ == "__main__":
    main()
