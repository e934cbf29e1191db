"""A model that is twice as large as memory: moec with experts on the disk, and llama.cpp with a mapped file.

    python benchmarks/paging.py --work DIR [--layers 8] [--share 0.5] [--rounds 3] [-o docs/latency.md] [--no-llama-cpp]

A random OLMoE of the widths of OLMoE-1B-7B is exported in int4 and packed, and written as GGUF: Q4_0, and Q8_0 where
moec has int8 (embedding and lm_head). Each run is a new process in a memory control group (needs root; version 1 or 2),
whose limit is a part of the packed weights' bytes, or in none. Before each run the pages of its files are dropped. It
continues a prompt of random tokens on one thread: greedily, which a random model soon does in a loop of few tokens that
need few experts, and with random tokens, whose routing is nearly uniform. A text repeats experts more than the one and
less than the other. llama.cpp maps its file and does not repack weights.

Everything is kept in DIR, results in DIR/rows.jsonl, and a run that is there is not repeated. Eight layers need 11 GB
of disk while they are built and 6 GB afterwards. llama.cpp is that of `pytest -m interop`, or of `--llama-python`: a
python with llama-cpp-python and gguf.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

WIDTHS = {"hidden_size": 2048, "num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 1024}
WIDTHS |= {"vocab_size": 50304, "num_attention_heads": 16, "num_key_value_heads": 16}
PROMPT, TOKENS = 24, 96
TEXTS = ("random tokens", "greedy")
GROUP = "moec-paging"
ROWS: dict[str, tuple[str, bool]] = {
    "moec": ("moec", False),
    "moec, in the group": ("moec", True),
    "moec, in the group, pages left to the kernel": ("kernel", True),
    "llama.cpp": ("llama", False),
    "llama.cpp, in the group": ("llama", True),
}
"""Name of a row -> what generates, and whether memory is limited."""


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


def open_llama(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A function of new token ids."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.use_mmap, settings.use_extra_bufts = True, False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    choices = llama_cpp.llama_context_default_params()
    choices.n_ctx = choices.n_batch = choices.n_ubatch = 512
    choices.n_threads = choices.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, choices)
    assert context, f"{path}: llama.cpp cannot load it"
    batch, length = llama_cpp.llama_batch_init(512, 0, 1), 0

    def step(ids: np.ndarray) -> np.ndarray:
        nonlocal length
        batch.n_tokens = ids.size
        for index, token in enumerate(ids.tolist()):
            batch.token[index], batch.pos[index] = token, length + index
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, index + 1 == ids.size
        length += ids.size
        assert llama_cpp.llama_decode(context, batch) == 0, quiet
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (WIDTHS["vocab_size"],))

    return step


def read_bytes() -> int:
    """Bytes that were read from disk for this process."""
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if "read_bytes" in line).split()[1])


def watch_routing(runner: Any) -> list[list[list[int]]]:
    """The experts that a paged runner is about to use: [layer][token][slot], filled while it runs."""
    pager = runner.session.pager
    found: list[list[list[int]]] = [[] for _ in pager.layers]
    end = pager.end

    def ended(step: Any) -> None:
        end(step)
        for layer, used in zip(found, step.used, strict=True):
            layer.append(sorted(used))

    pager.end = ended
    return found


def generate(kind: str, path: Path, limit: int, text: str) -> dict[str, Any]:
    """One run in this process."""
    random = np.random.default_rng(0)
    drop_pages([file for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()])
    if limit:
        join_group(limit)
    start, runner = time.perf_counter(), None
    if kind == "llama":
        step = open_llama(path)
    else:
        step, runner = open_moec(path, kind == "moec")
    opened = time.perf_counter()
    logits = step(random.integers(3, 50000, PROMPT))
    paged = hasattr(runner, "paging")
    first, before, routing = time.perf_counter(), read_bytes(), watch_routing(runner) if paged else []
    counts = (runner.paging.uses.copy(), runner.paging.hits.copy()) if paged else None
    seconds, chosen = [], []
    for _ in range(TOKENS):
        chosen.append(int(logits.argmax()))
        token = chosen[-1] if text == "greedy" else int(random.integers(3, 50000))
        began = time.perf_counter()
        logits = step(np.array([token]))
        seconds.append(time.perf_counter() - began)
    found: dict[str, Any] = {
        "open": opened - start,
        "prompt": first - opened,
        "median": statistics.median(seconds),
        "mean": statistics.mean(seconds),
        "read": (read_bytes() - before) / TOKENS,
        "chosen": chosen,
    }
    if counts is not None:
        uses, hits = runner.paging.uses - counts[0], runner.paging.hits - counts[1]
        room = runner.session.pager._memory()
        found |= {"hit_rate": float(hits.sum() / uses.sum()), "room": room, **estimates(path, routing, room)}
    return found


def estimates(directory: Path, routing: list[list[list[int]]], room: int) -> dict[str, float]:
    """Estimated bytes per token: of this routing, and as `moec estimate` has it without a recorded one."""
    from moec.compiler.measure.estimate.paging import estimate_paging
    from moec.compiler.measure.paging import reuse_distances
    from moec.targets import get_target

    sizes = get_target("onnx").weight_sizes(directory)
    known = reuse_distances(routing, sizes.counts, sizes.experts, warm_up=0)
    (uniform,) = estimate_paging(directory, [sizes.dense + room], directory)["limits"]
    return {"estimated": known.read(room), "uniform": uniform["bytes_per_token"]}


def write_gguf(checkpoint: Path, file: Path) -> None:
    """Write the checkpoint as GGUF, quantized by the package gguf."""
    import gguf
    import torch
    from gguf_files import is_float, write_olmoe

    kinds = gguf.GGMLQuantizationType

    def coded(name: str, values: torch.Tensor) -> tuple[Any, Any]:
        data = values.float().numpy()
        if is_float(name, values):
            return data, None
        kind = kinds.Q4_0 if name.startswith("blk.") else kinds.Q8_0
        # An expert at a time: quantizing takes several times the memory of what it is given.
        parts = [gguf.quants.quantize(part, kind) for part in (data if data.ndim == 3 else [data])]
        return np.stack(parts) if data.ndim == 3 else parts[0], kind

    write_olmoe(checkpoint, file.with_suffix(".partial"), coded)
    file.with_suffix(".partial").rename(file)


def build(work: Path, layers: int, in_llama: Callable[..., str] | None) -> tuple[Path, Path]:
    """The packed artifact and the GGUF file, made once; the checkpoint is removed."""
    packed, file, checkpoint = work / f"packed-{layers}", work / f"q4_0-{layers}.gguf", work / f"checkpoint-{layers}"
    if not packed.is_dir() or (in_llama and not file.is_file()):
        from checkpoints import random_checkpoint

        from moec.compiler.api import export
        from moec.compiler.run.packing import pack_into

        random_checkpoint(checkpoint, num_hidden_layers=layers, **WIDTHS)
        if in_llama and not file.is_file():
            in_llama("--write-gguf", str(checkpoint), str(file))
        plain = work / f"int4-{layers}"
        if not packed.is_dir():
            quantize = {"format": "int4", "rounding": "rtn"}
            export(checkpoint, target="onnx", output=plain, gates=False, quantize=quantize, overwrite=plain.exists())
        shutil.rmtree(checkpoint)
        if not packed.is_dir():
            pack_into(plain, packed, lambda *_: None)
            shutil.rmtree(plain)
    return packed, file


def run_with(python: str) -> Callable[..., str]:
    """A function that runs this file with `python`, which also has the packages of this one, and returns stdout."""
    paths = [path for path in (os.environ.get("PYTHONPATH"), sysconfig.get_path("purelib")) if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        command = [python, str(HERE / "paging.py"), *arguments]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout

    return run


def llama_python() -> str:
    """The python of the tests' environment with llama.cpp."""
    sys.path.insert(0, str(HERE.parent / "tests" / "support"))
    from environments import environment, lines

    return str(environment("gguf", lines(HERE.parent / "tests" / "interop" / "gguf-requirements.txt")))


def table(rows: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """A row for each way to run, with medians over rounds."""
    lines = [
        "| tokens | run | open s | prompt s | ms per token, median | mean | MB read per token | estimated | found |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (text, name), found in rows.items():

        def median(key: str, found: list[dict[str, Any]] = found) -> float:
            return statistics.median(row[key] for row in found)

        estimated, hits = "", ""
        if "estimated" in found[0]:
            estimated, hits = f"{median('estimated') / 1e6:.1f}", f"{median('hit_rate'):.0%}"
        lines.append(
            f"| {text} | {name} | {median('open'):.1f} | {median('prompt'):.2f} | {median('median') * 1e3:.1f} "
            f"| {median('mean') * 1e3:.1f} | {median('read') / 1e6:.1f} | {estimated} | {hits} |"
        )
    return "\n".join(lines)


def sentence(rows: dict[tuple[str, str], list[dict[str, Any]]], limit: int, sizes: tuple[int, int], ahead: str) -> str:
    """What the table cannot say."""
    same = all(
        len({tuple(row["chosen"]) for (of, name), found in rows.items() if of == text and ROWS[name][0] in kinds
             for row in found}) <= 1
        for text in TEXTS for kinds in (("moec", "kernel"), ("llama",))
    )  # fmt: skip
    uniform = [row["uniform"] for found in rows.values() for row in found if "uniform" in row]
    drawn = f" With equally likely experts it is {statistics.median(uniform) / 1e6:.1f} MB." if uniform else ""
    return (
        f"The group has {limit / 1e6:.0f} MB for the whole process; weights are {sizes[0] / 1e6:.0f} MB (moec) and "
        f"{sizes[1] / 1e6:.0f} MB (llama.cpp). The disk reads {ahead} kB ahead. The {TOKENS} most likely tokens are "
        f"{'the same' if same else 'NOT the same'} in every run of each. Estimated is what `moec estimate` computes "
        f"from the experts that the run used.{drawn}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where everything is kept")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.5, help="the group's memory, relative to the weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-llama-cpp", action="store_true")
    parser.add_argument("--llama-python", help="a python with llama-cpp-python and gguf")
    parser.add_argument("-o", "--output", type=Path, help="page of the documentation")
    parser.add_argument("--write-gguf", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--generate", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write_gguf:
        write_gguf(*options.write_gguf)
    elif options.generate:
        kind, path, limit, text = options.generate
        print(json.dumps(generate(kind, Path(path), int(limit), text)))
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Build, run all rows in turn, and print or write the table."""
    from machine import describe
    from pages import put

    from moec.targets import get_target

    machine = describe()
    in_moec = run_with(sys.executable)
    in_llama = None if options.no_llama_cpp else run_with(options.llama_python or llama_python())
    options.work.mkdir(parents=True, exist_ok=True)
    packed, file = build(options.work, options.layers, in_llama)
    size = get_target("onnx").weight_sizes(packed).total
    limit, log = int(options.share * size), options.work / "rows.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for turn, text, (name, (kind, limited)) in itertools.product(range(options.rounds), TEXTS, ROWS.items()):
        run = in_llama if kind == "llama" else in_moec
        if run is None:
            continue
        key = [text, name, turn, options.layers, limit]
        known = next((row["found"] for row in done if row["key"] == key), None)
        if known is None:
            path = file if kind == "llama" else packed
            known = json.loads(run("--generate", kind, str(path), str(limit * limited), text).splitlines()[-1])
            with log.open("a") as stream:
                stream.write(json.dumps({"key": key, "found": known}) + "\n")
        rows.setdefault((text, name), []).append(known)
        print(text, name, {key: value for key, value in known.items() if key != "chosen"}, flush=True)
    sizes = (size, file.stat().st_size if in_llama else 0)
    page = f"{table(rows)}\n\n{sentence(rows, limit, sizes, read_ahead(packed))} {machine}."
    print(page)
    if options.output:
        put(page, options.output, name="paging")


if __name__ == "__main__":
    main()
