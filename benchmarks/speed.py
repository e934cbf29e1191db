"""Decode and prefill speed of ONNX artifacts and of other runtimes, measured alternately on one thread.

    python benchmarks/speed.py NAME=DIR [NAME=DIR ...] [--genai NAME=DIR] [--hf NAME=FILE.onnx] [--rounds 7]

DIR is a moec artifact of the ONNX target; `--genai` names a directory for onnxruntime-genai; `--hf` an ONNX file that
transformers.exporters.OnnxExporter wrote. Times are CPU milliseconds of the process: the median over rounds of each
round's best, with the ratio to the first model. Token ids are random, so only random checkpoints of equal widths can be
compared. A prompt is fed for the logits of its last token, where a model can compute these alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe

PROMPT = 128
STEPS = 8


class Model(Protocol):
    """The interface of a measured model."""

    def prefill(self, ids: np.ndarray) -> None: ...

    def decode(self, ids: np.ndarray) -> None: ...


class Moec:
    """A moec artifact with its own runner."""

    def __init__(self, directory: str, threads: int = 1) -> None:
        from moec.targets import get_target

        try:
            from moec.targets.runners import last_logits
        except ImportError:  # an earlier moec, which computes all logits

            def last_logits(runner: Any, input_ids: np.ndarray, *, start: bool) -> np.ndarray:  # noqa: ARG001
                logits: np.ndarray = runner.prefill(input_ids)
                return logits

        self.runner, self.last_logits = get_target("onnx").open(Path(directory), threads=threads), last_logits

    def prefill(self, ids: np.ndarray) -> None:
        self.last_logits(self.runner, ids, start=True)

    def decode(self, ids: np.ndarray) -> None:
        self.runner.decode(ids)


class Genai:
    """A model of onnxruntime-genai."""

    def __init__(self, directory: str, threads: int = 1) -> None:
        import onnxruntime_genai as og

        config = og.Config(directory)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.og, self.model = og, og.Model(config)
        self.generator: Any = None

    def prefill(self, ids: np.ndarray) -> None:
        parameters = self.og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=1024, do_sample=False)
        self.generator = self.og.Generator(self.model, parameters)
        self.generator.append_tokens(ids[0].tolist())
        self.generator.get_logits()

    def decode(self, ids: np.ndarray) -> None:
        self.generator.append_tokens(ids[0].tolist())
        self.generator.get_logits()


class LlamaCpp:
    """A GGUF file in llama.cpp, through the bindings of llama-cpp-python."""

    def __init__(self, path: str, threads: int = 1) -> None:
        import llama_cpp

        self.library = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 1024, 512, 512
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        assert self.context, f"{path}: llama.cpp cannot load it"
        self.batch, self.length = llama_cpp.llama_batch_init(512, 0, 1), 0

    def prefill(self, ids: np.ndarray) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        self.length = 0
        self.decode(ids)

    def decode(self, ids: np.ndarray) -> None:
        batch = self.batch
        batch.n_tokens = ids.size
        for index, token in enumerate(ids.ravel().tolist()):
            batch.token[index], batch.pos[index] = token, self.length + index
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, index + 1 == ids.size
        self.length += ids.size
        status = self.library.llama_decode(self.context, batch)
        assert status == 0, f"llama_decode: {status}"
        self.library.llama_get_logits(self.context)


class Exported:
    """An ONNX file of the exporter of transformers, with past and present as inputs and outputs."""

    def __init__(self, path: str) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.ort, self.inputs = ort, {item.name: item for item in self.session.get_inputs()}
        self.outputs = [item.name for item in self.session.get_outputs()]
        self.past: dict[str, Any] = {}
        self.length = 0

    def _run(self, ids: np.ndarray) -> None:
        total = self.length + ids.shape[1]
        feeds: dict[str, Any] = {}
        for name, item in self.inputs.items():
            if name == "input_ids":
                array: Any = ids.astype(np.int64)
            elif "mask" in name:
                array = np.ones((1, total), np.int64)
            elif "position" in name:
                array = np.arange(self.length, total)[None] if len(item.shape) == 2 else np.arange(self.length, total)
            elif self.past:
                feeds[name] = self.past[name]
                continue
            else:
                # The exporter writes static sizes as text, too.
                sizes = [1 if axis == 0 else 0 if axis == 2 else int(size) for axis, size in enumerate(item.shape)]
                array = np.zeros(sizes, np.float32)
            feeds[name] = self.ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        results = self.session.run_with_ort_values(self.outputs, feeds)
        states = [name for name in self.inputs if name not in ("input_ids", "attention_mask", "position_ids")]
        self.past = dict(zip(states, results[1:], strict=True))
        self.length = total

    def prefill(self, ids: np.ndarray) -> None:
        self.past, self.length = {}, 0
        self._run(ids)

    def decode(self, ids: np.ndarray) -> None:
        self._run(ids)


def cpu_ms(call: Callable[[], None]) -> float:
    """CPU milliseconds that the process spends in one call."""
    return spent_ms(time.process_time, call)


def spent_ms(clock: Callable[[], float], call: Callable[[], None]) -> float:
    """Milliseconds of one call by a clock."""
    start = clock()
    call()
    return (clock() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--genai", action="append", default=[])
    parser.add_argument("--hf", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    kinds: list[tuple[list[str], Callable[[str], Model]]] = [
        (options.models, Moec),
        (options.genai, Genai),
        (options.hf, Exported),
    ]
    named = [(item.partition("="), kind) for items, kind in kinds for item in items]
    compare({name: partial(kind, path) for (name, _, path), kind in named}, options.rounds)


Opener = Callable[[], Model]
Times = dict[str, list[list[float]]]
"""Phase -> for each opening, the milliseconds of each round."""


def compare(
    openers: Mapping[str, Opener],
    rounds: int,
    *,
    prompts: Sequence[int] = (PROMPT,),
    openings: int = 1,
    threads: int = 1,
) -> dict[str, Times]:
    """Measure models alternately, print a table, and return what it is made of.

    Args:
        openers: Opens each model.
        rounds: Number of measured rounds of each opening.
        prompts: Lengths of the prompts; decode steps follow one of `PROMPT` tokens.
        openings: How often all models are opened anew: memory addresses make equal sessions differ by some percent.
        threads: Of the models; with several, wall-clock time is measured.
    """
    print(describe())
    random, phases = np.random.default_rng(0), ["decode", *(f"prefill {length}" for length in prompts)]
    found: dict[str, Times] = {name: {phase: [] for phase in phases} for name in openers}
    for _ in range(openings):
        models = {name: opener() for name, opener in openers.items()}
        for times in found.values():
            for of_phase in times.values():
                of_phase.append([])
        for turn in range(rounds + 1):  # the first round warms up
            for name, model in models.items():
                # A model in a process of its own has the clock of that process.
                clock = time.perf_counter if threads > 1 else getattr(model, "cpu_seconds", time.process_time)
                figures = {}
                for length in sorted(prompts, reverse=True):
                    ids = random.integers(3, 31999, (1, length))
                    figures[f"prefill {length}"] = spent_ms(clock, partial(model.prefill, ids))
                steps = [
                    spent_ms(clock, partial(model.decode, random.integers(3, 31999, (1, 1)))) for _ in range(STEPS)
                ]
                for phase, value in {**figures, "decode": min(steps)}.items():
                    if turn:
                        found[name][phase][-1].append(value)
        del models
    print(f"\n{table(found, dict.fromkeys(found, next(iter(found))))}")
    return found


def table(found: Mapping[str, Times], base: Mapping[str, str]) -> str:
    """A row for each model: medians, and their ratio to those of another one, with its range over the openings.

    Args:
        found: What `compare` returns.
        base: Name of a model -> name of that which it is compared with.
    """
    phases = list(next(iter(found.values())))
    lines = [
        f"| model | {' | '.join(f'{phase} ms | ratio' for phase in phases)} |",
        f"|{'---|' * (1 + 2 * len(phases))}",
    ]
    for name, other in base.items():
        cells = []
        for phase in phases:
            own, its = found[name][phase], found[other][phase]
            whole = [statistics.median(value for opening in times for value in opening) for times in (own, its)]
            each = [statistics.median(mine) / statistics.median(yours) for mine, yours in zip(own, its, strict=True)]
            spread = f" ({min(each):.2f} to {max(each):.2f})" if len(each) > 1 and name != other else ""
            cells.append(f"{whole[0]:.1f} | {whole[0] / whole[1]:.2f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
