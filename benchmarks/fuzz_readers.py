"""Gives the readers of files that others write damaged documents, guided by coverage, with atheris.

    python -m venv fuzzing && fuzzing/bin/pip install atheris==3.0.0 -e .
    fuzzing/bin/python benchmarks/fuzz_readers.py --runs 1000000 -o docs/fuzz.md
    fuzzing/bin/python benchmarks/fuzz_readers.py --reader recipe --runs 1000 --keep found/

atheris (https://pypi.org/project/atheris) has wheels for Python 3.11 to 3.13 and is needed by nothing else. Its bytes
choose edits of valid documents (`benchmarks/fuzz/documents.py`). A reader may return or raise a MoecError with a hint;
it is a fault if it raises anything else, has no hint, or takes more than five seconds. Each reader runs in a process of
its own. Exits with 1 if there is a fault; `--keep` is a folder for the files that show it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe
from pages import put

SECONDS = 5.0
"""A run that takes longer is a fault."""
INSTRUMENTED = (
    "moec.compiler.common",
    "moec.compiler.report",
    "moec.compiler.pipeline.recipe",
    "moec.compiler.pipeline.calibration_file",
    "moec.compiler.build.matrix",
    "moec.compiler.ir.safetensors_file",
    "moec.compiler.text",
    "moec.quantize",
    "moec.passes.routing.policies",
)
READERS = (
    "moec.json",
    "report.json",
    "calibration file",
    "recipe",
    "matrix",
    "safetensors header",
    "tokenizer.json",
)


@dataclass
class Tally:
    """What became of the runs of one reader.

    Attributes:
        reader: Its name.
        runs: Number of runs.
        seconds: Wall time.
        accepted: Runs in which the reader returned.
        refused: Runs in which it raised a MoecError.
        faults: Kind and place of a fault -> how often.
    """

    reader: str
    runs: int = 0
    seconds: float = 0.0
    accepted: int = 0
    refused: int = 0
    faults: dict[str, int] = field(default_factory=dict)


def outcome(read: Callable[[], Any], tally: Tally) -> str:
    """Run a reader once and count; the kind and place of a fault, or empty."""
    from moec.compiler.common.errors import MoecError

    started, fault = time.perf_counter(), ""
    try:
        read()
        tally.accepted += 1
    except MoecError as error:
        tally.refused += 1
        fault = "" if error.hint else f"no hint: {type(error).__name__} {place(error)}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of Rust is no Exception
        fault = f"{type(error).__name__} {place(error)}"
    if not fault and time.perf_counter() - started > SECONDS:
        fault = "too slow"
    tally.runs += 1
    if fault:
        tally.faults[fault] = tally.faults.get(fault, 0) + 1
    return fault


def place(error: BaseException) -> str:
    """File and line from which an error comes."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def fuzz(name: str, runs: int, seconds: float, valid: Path, result: Path, keep: Path | None) -> None:
    """Fuzz one reader in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        from fuzz.readers import readers
    (reader,) = [own for own in readers(valid) if own.name == name]
    words, tally, started = reader.words(), Tally(name), time.monotonic()
    folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    directory = Path(folder.name)

    def once(data: bytes) -> None:
        content = reader.content(data, words)
        (directory / reader.file).write_bytes(content)
        fault = outcome(lambda: reader.read(directory), tally)
        if fault and keep is not None and tally.faults[fault] == 1:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{name.replace(' ', '_')}-{len(tally.faults)}").write_bytes(content)
        tally.seconds = time.monotonic() - started
        over = tally.runs >= runs or tally.seconds > seconds
        if tally.runs % 1000 == 0 or over:
            result.write_text(json.dumps(asdict(tally)))
        if over:
            folder.cleanup()
            os._exit(0)

    seeds = directory / "seeds"
    seeds.mkdir()
    for number in range(64):
        (seeds / str(number)).write_bytes(bytes((number * 37 + step * 101) % 256 for step in range(24)))
    atheris.Setup([sys.argv[0], "-seed=1", "-max_len=64", "-timeout=60", "-verbosity=0", str(seeds)], once)
    atheris.Fuzz()


def table(tallies: Sequence[Tally]) -> str:
    """The results by reader, and every fault."""
    from moec.compiler.common import markdown

    rows = [
        [
            own.reader,
            f"{own.runs:,}",
            f"{own.seconds:.0f}",
            f"{own.accepted:,}",
            f"{own.refused:,}",
            str(len(own.faults)),
        ]
        for own in tallies
    ]
    parts = [markdown.table(["reader", "runs", "seconds", "accepted", "refused", "faults"], rows)]
    parts += [
        f"- {own.reader}: {fault}, {count:,} times" for own in tallies for fault, count in sorted(own.faults.items())
    ]
    return "\n\n".join(parts)


def prepare(directory: Path) -> None:
    """Write an artifact, whose files are documents to start from."""
    import moec
    from moec.compiler.families.tiny_models import write_tiny_checkpoint

    checkpoint = write_tiny_checkpoint("olmoe", directory / "checkpoint", tokenizer=True)
    moec.export(checkpoint, target="onnx", output=directory / "artifact", quantize="int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", default=",".join(READERS), help="names of readers, separated by commas")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="longest time of a reader")
    parser.add_argument("--keep", type=Path, help="folder for files that show a fault")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.child:
        valid, result = options.child
        fuzz(options.reader, options.runs, options.seconds, valid, result, options.keep)
        return
    machine, tallies = describe(), list[Tally]()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for name in options.reader.split(","):
            result = Path(folder) / f"{name}.json"
            command = [sys.executable, __file__, "--reader", name, "--runs", str(options.runs)]
            command += ["--seconds", str(options.seconds)]
            command += ["--child", str(Path(folder) / "artifact"), str(result)]
            command += ["--keep", str(options.keep)] if options.keep else []
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            own = Tally(**json.loads(result.read_text())) if result.is_file() else Tally(name)
            if own.runs < options.runs and own.seconds < options.seconds:
                own.faults[f"the process ended with {done.returncode}: {done.stderr[-300:]}"] = 1
            tallies.append(own)
            print(f"{name}: {own.runs} runs in {own.seconds:.0f} s: {own.faults or 'no fault'}", flush=True)
    if options.output is not None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        text = f"Made on commit {commit.stdout.strip()}, {machine}.\n\n{table(tallies)}"
        put(text, options.output, name="readers")
    sys.exit(any(own.faults for own in tallies))


if __name__ == "__main__":
    main()
