"""A model that is twice as large as memory: moec with experts on the disk, and llama.cpp with a mapped file.

    python benchmarks/paging.py --work DIR [--layers 8] [--share 0.5] [--rounds 3] [--tokens 96] [-o docs/latency.md]
        [--no-llama-cpp]

A random OLMoE of the widths of OLMoE-1B-7B is exported in int4 and packed, as it is and with half of the slots dropped
(top-p), and written as GGUF: Q4_0, and Q8_0 where moec has int8 (embedding and lm_head). Each run is a new process in a
memory control group (needs root; version 1 or 2), whose limit is a part of the packed weights' bytes, or in none.
Before each run the pages of its files are dropped. It continues a prompt on one thread: greedily, which a random model
soon does in a loop of few tokens that need few experts; with the tokens of a held-out text; and with random tokens,
which repeat no token and so repeat experts least. llama.cpp maps its file and does not repack weights, except where a
row says so.

Estimated is what `moec estimate` computes from the experts that the run used, prompt included, and, where dynamic
routing recorded those of the calibration text, from the record: for a long text, and for the start of a run.

Everything is kept in DIR, results in DIR/rows.jsonl, and a run that is there is not repeated. Eight layers need 14 GB
of disk while they are built and 10 GB afterwards; 16 layers 26 and 20. llama.cpp is that of `pytest -m interop`, or of
`--llama-python`: a python with llama-cpp-python and gguf.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from paging_files import build, llama_python, run_with, write_gguf

GOLDEN = Path(__file__).resolve().parents[1] / "golden_models" / "olmoe-tiny"
PROMPT = 24
PATIENCE = 400
"""Seconds after which a run is given up."""
TEXTS = ("random tokens", "text", "greedy")
GROUP = "moec-paging"


@dataclass(frozen=True)
class Row:
    """A way to run.

    Attributes:
        kind: What generates: "moec", "kernel" (moec, with pages left to the kernel), "llama" or "repacked" (llama.cpp).
        files: What it opens, of `paging_files.build`.
        limited: Whether it is in the group.
        texts: What it continues with.
    """

    kind: str
    files: str
    limited: bool
    texts: tuple[str, ...] = TEXTS


ROWS: dict[str, Row] = {
    "moec": Row("moec", "static", False),
    "moec, in the group": Row("moec", "static", True),
    "moec, in the group, pages left to the kernel": Row("kernel", "static", True),
    "moec, half of the slots": Row("moec", "halved", False),
    "moec, half of the slots, in the group": Row("moec", "halved", True),
    "llama.cpp": Row("llama", "gguf", False),
    "llama.cpp, in the group": Row("llama", "gguf", True),
    "llama.cpp, in the group, weights repacked, its default": Row("repacked", "gguf", True, ("text",)),
}


def join_group(limit: int) -> None:
    """Move this process into a control group with so many bytes of memory."""
    root = Path("/sys/fs/cgroup")
    first = (root / "memory").is_dir()
    group = (root / "memory" if first else root) / GROUP
    group.mkdir(exist_ok=True)
    (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
    (group / "cgroup.procs").write_text(str(os.getpid()))


def drop_pages(files: list[Path]) -> None:
    """Take the pages of files out of the page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_ahead(path: Path) -> str:
    """The kB that the kernel reads ahead on the disk of `path`, at most."""
    device = path.stat().st_dev
    return Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text().strip()


def open_moec(directory: Path, paged: bool) -> tuple[Callable[[np.ndarray], np.ndarray], Any]:
    """A function of new token ids, and the runner."""
    from moec.compiler.common.artifact import read_manifest
    from moec.compiler.run.packing import open_packed
    from moec.targets import get_target

    target, runner = get_target("onnx"), None
    if paged:
        runner, note = open_packed(directory, read_manifest(directory), target, threads=1)
        assert not note, note
    else:
        runner = target.open(directory, threads=1)
    return lambda ids: runner.decode(ids[None])[0, -1], runner


def open_llama(path: Path, repacked: bool) -> Callable[[np.ndarray], np.ndarray]:
    """A function of new token ids."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.use_mmap, settings.use_extra_bufts = True, repacked
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    choices = llama_cpp.llama_context_default_params()
    choices.n_ctx = choices.n_batch = choices.n_ubatch = 512
    choices.n_threads = choices.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, choices)
    assert context, f"{path}: llama.cpp cannot load it"
    batch, length = llama_cpp.llama_batch_init(512, 0, 1), 0
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def step(ids: np.ndarray) -> np.ndarray:
        nonlocal length
        batch.n_tokens = ids.size
        for index, token in enumerate(ids.tolist()):
            batch.token[index], batch.pos[index] = token, length + index
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, index + 1 == ids.size
        length += ids.size
        assert llama_cpp.llama_decode(context, batch) == 0, quiet
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (size,))

    return step


def read_bytes() -> int:
    """Bytes that were read from disk for this process."""
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if "read_bytes" in line).split()[1])


def watch_routing(runner: Any) -> list[list[list[int]]]:
    """The experts that a paged runner uses from now on: [layer][step][], filled while it runs."""
    pager = runner.session.pager
    found: list[list[list[int]]] = [[] for _ in pager.layers]
    end = pager.end

    def ended(step: Any) -> None:
        end(step)
        for layer, used in zip(found, step.used, strict=True):
            layer.append(sorted(used))

    pager.end = ended
    return found


def generate(kind: str, path: Path, limit: int, text: str, ids: list[int], tokens: int) -> dict[str, Any]:
    """One run in this process.

    Args:
        kind: See `Row`.
        path: What it opens.
        limit: Bytes of memory; 0: as many as there are.
        text: One of `TEXTS`.
        ids: The held-out text.
        tokens: Number of tokens after the prompt.
    """
    drop_pages([file for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()])
    if limit:
        join_group(limit)
    start, runner = time.perf_counter(), None
    if kind in ("llama", "repacked"):
        step = open_llama(path, kind == "repacked")
    else:
        step, runner = open_moec(path, kind == "moec")
    opened = time.perf_counter()
    paged = hasattr(runner, "paging")
    routing = watch_routing(runner) if paged else []
    given = np.array(ids) if text == "text" else np.random.default_rng(0).integers(3, 50000, PROMPT + tokens)
    logits = step(given[:PROMPT])
    first, before = time.perf_counter(), read_bytes()
    counts = (runner.paging.uses.copy(), runner.paging.hits.copy()) if paged else None
    seconds, chosen, rooms = [], [], []
    for token in given[PROMPT : PROMPT + tokens].tolist():
        chosen.append(int(logits.argmax()))
        began = time.perf_counter()
        logits = step(np.array([chosen[-1] if text == "greedy" else token]))
        seconds.append(time.perf_counter() - began)
        rooms += [runner.session.pager._memory()] if paged else []
    found: dict[str, Any] = {
        "open": opened - start,
        "prompt": first - opened,
        "median": statistics.median(seconds),
        "mean": statistics.mean(seconds),
        "read": (read_bytes() - before) / tokens,
        "chosen": chosen,
    }
    if counts is not None:
        uses, hits = runner.paging.uses - counts[0], runner.paging.hits - counts[1]
        found |= {"hit_rate": float(hits.sum() / uses.sum()), "uses": int(uses.sum()) / tokens, "rooms": rooms}
        found |= estimates(path, routing, int(statistics.median(rooms)))
    return found


def estimates(directory: Path, routing: list[list[list[int]]], room: int) -> dict[str, Any]:
    """Estimated bytes per token: of this routing, whose first step is the prompt, and of what the artifact recorded."""
    from moec.compiler.measure.estimate.paging import estimate_paging
    from moec.compiler.measure.paging import reuse_distances
    from moec.targets import get_target

    sizes = get_target("onnx").weight_sizes(directory)
    known = reuse_distances(routing, sizes.counts, sizes.experts, warm_up=1.5 / len(routing[0]), from_start=True)
    recorded = estimate_paging(directory, [sizes.dense + room], directory)
    (limit,) = recorded["limits"]
    return {
        "estimated": known.read(room),
        "routing": recorded["routing"]["source"],
        "recorded": limit["bytes_per_token"],
        "at_start": limit["bytes_per_token_at_start"],
        "recorded_hits": limit["hit_rate"],
    }


def table(rows: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """A row for each way to run, with medians over rounds."""
    columns = ["tokens", "run", "open s", "prompt s", "ms per token, median", "mean", "MB read per token", "estimated"]
    columns += ["from the record", "found"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for (text, name), found in rows.items():

        def median(key: str, found: list[dict[str, Any]] = found) -> float:
            return statistics.median(row[key] for row in found)

        if ended := next((row["ended"] for row in found if "ended" in row), ""):
            lines.append(f"| {text} | {name} | {ended} | | | | | | | |")
            continue
        estimated, recorded, hits = "", "", ""
        if "estimated" in found[0]:
            estimated, hits = f"{median('estimated') / 1e6:.1f}", f"{median('hit_rate'):.0%}"
            if found[0]["routing"] == "recorded":
                recorded = " / ".join(f"{median(key) / 1e6:.1f}" for key in ("recorded", "at_start") if key in found[0])
        lines.append(
            f"| {text} | {name} | {median('open'):.1f} | {median('prompt'):.2f} | {median('median') * 1e3:.1f} "
            f"| {median('mean') * 1e3:.1f} | {median('read') / 1e6:.1f} | {estimated} | {recorded} | {hits} |"
        )
    return "\n".join(lines)


def are_equal(rows: dict[tuple[str, str], list[dict[str, Any]]]) -> bool:
    """Whether the most likely tokens of a model and text are the same in every run, within the group and outside."""
    found: dict[tuple[str, str, bool], set[tuple[int, ...]]] = {}
    for (text, name), runs in rows.items():
        key = (text, ROWS[name].files, ROWS[name].kind == "repacked")
        found.setdefault(key, set()).update(tuple(row["chosen"]) for row in runs if "chosen" in row)
    return all(len(chosen) <= 1 for chosen in found.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where everything is kept")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.5, help="the group's memory, relative to the weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96, help="tokens after the prompt")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=TEXTS, metavar="TEXT", help=", ".join(TEXTS))
    parser.add_argument("--no-llama-cpp", action="store_true")
    parser.add_argument("--llama-python", help="a python with llama-cpp-python and gguf")
    parser.add_argument("-o", "--output", type=Path, help="page of the documentation")
    parser.add_argument("--write-gguf", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--generate", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write_gguf:
        write_gguf(*options.write_gguf)
    elif options.generate:
        kind, path, *rest = json.loads(options.generate)
        print(json.dumps(generate(kind, Path(path), *rest)))
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Build, run all rows in turn, and print or write the table."""
    from machine import describe
    from pages import put

    from moec.compiler.text.corpus import held_out_text, tokenize
    from moec.targets import get_target

    machine = describe()
    in_moec = run_with(sys.executable)
    in_llama = None if options.no_llama_cpp else run_with(options.llama_python or llama_python())
    options.work.mkdir(parents=True, exist_ok=True)
    files = build(options.work, options.layers, in_llama)
    size = get_target("onnx").weight_sizes(files["static"]).total
    ids = tokenize(GOLDEN, held_out_text(None))[: PROMPT + options.tokens]
    limit, log = int(options.share * size), options.work / "rows.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for turn, text, (name, row) in itertools.product(range(options.rounds), options.texts, ROWS.items()):
        if row.files not in files or text not in row.texts:
            continue
        key = [text, name, turn, options.layers, limit, options.tokens]
        known = next((row["found"] for row in done if row["key"] == key), None)
        if known is None:
            request = [row.kind, str(files[row.files]), limit * row.limited, text, ids.tolist(), options.tokens]
            known = run_once(in_llama if row.files == "gguf" else in_moec, request)
            with log.open("a") as stream:
                stream.write(json.dumps({"key": key, "found": known}) + "\n")
        rows.setdefault((text, name), []).append(known)
        print(text, name, {key: value for key, value in known.items() if key not in ("chosen", "rooms")}, flush=True)
    same = "the same" if are_equal(rows) else "NOT the same"
    sizes = f"weights are {size / 1e6:.0f} MB (moec)"
    if "gguf" in files:
        sizes += f" and {files['gguf'].stat().st_size / 1e6:.0f} MB (llama.cpp)"
    page = (
        f"{table(rows)}\n\n{options.layers} layers; the group has {limit / 1e6:.0f} MB for the whole process, {sizes}. "
        f"The disk reads {read_ahead(files['static'])} kB ahead. The {options.tokens} most likely tokens are {same} in "
        f"every run of a file. {machine}."
    )
    print(page)
    if options.output:
        put(page, options.output, name="paging")


def run_once(run: Callable[..., str] | None, request: list[Any]) -> dict[str, Any]:
    """What a run found; or why it ended without."""
    assert run
    try:
        found: dict[str, Any] = json.loads(run("--generate", json.dumps(request), timeout=PATIENCE).splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"ended": f"given up after {PATIENCE} s"}
    except subprocess.CalledProcessError as error:
        if error.returncode != -signal.SIGKILL:
            raise
        return {"ended": "killed: out of memory"}
    return found


if __name__ == "__main__":
    main()
