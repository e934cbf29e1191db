"""Speed of int4 decode and prefill compared with onnxruntime-genai: builds and measures all models.

    python benchmarks/speed_int4.py [--work DIR] [--rounds 7] [--openings 1] [--threads 1] [--only TEXT] [--llama-cpp]
        [--shape olmoe-1b-7b-8] [--earlier CHECKOUT] [--first-token] [--kernels]

Checkpoints are random, of equal widths (1.004 GB in bfloat16): OLMoE for moec, and LFM2-MoE for onnxruntime-genai,
whose builder does not support OLMoE. Both run int4 weights with int8 activations. The builder sets int8 activations for
linears only, so its QMoE nodes are set to `accuracy_level` 4 afterwards. onnxruntime-genai has 4 bits in blocks of 32
for all weights; moec's preset has blocks of 128 and 8 bits for lm_head; other rows have 4 bits for all weights. "Cache
in place" is the flavor whose KV caches are buffers that a step writes into, as in onnxruntime-genai; both moec's runner
and onnxruntime-genai can run it. "Half of the slots" is dynamic routing by top-p with a budget of 0.5; its router is
random, as are the tokens. A prompt is fed for the logits of its last token by moec, by llama.cpp, and by
onnxruntime-genai where its builder was told to (`prune_lm_head`); otherwise it computes all.

With `--llama-cpp` (needs llama-cpp-python and gguf), the same OLMoE is measured as Q4_0, quantized by llama.cpp, with
lm_head in Q6_K; llama.cpp also rounds activations to int8.

`--shape olmoe-1b-7b-8` has 8 layers of the widths of OLMoE-1B-7B (7.1 GB in bfloat16) and no onnxruntime-genai.
`--earlier` names a checkout of an earlier commit of moec, whose code exports the same formats and runs them, in
processes of their own, beside those of this checkout. `--first-token` measures from the opening in a new process to the
first token of a prompt of 128 tokens. `--kernels` prints the time of each kind of kernel in a decode step, and the
bytes that a token reads, beside the bandwidth of this machine.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from apart import Apart, environment_of, first_tokens
from checkpoints import large_checkpoint, random_checkpoint, random_lfm2_checkpoint
from gguf_files import is_float, quantize, write_olmoe
from kernels import kernel_table
from machine import describe
from routing_latency import mass_for
from speed import Genai, LlamaCpp, Model, Moec, compare, table

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("experts_gate_up", "experts_down", "attention", "embedding", "lm_head")
ALL_128, ALL_32 = ({"formats": dict.fromkeys(CLASSES, form)} for form in ("int4:128", "int4:32"))
PROMPTS = (128, 512)
BUDGET = 0.5
SHAPES: dict[str, Callable[[Path], Path]] = {
    "olmoe-1gb": random_checkpoint,
    "olmoe-1b-7b-8": partial(large_checkpoint, num_hidden_layers=8),
}
"""Name of a shape -> writes a random checkpoint of it, once."""


@dataclass(frozen=True)
class Row:
    """A row of moec: its format and flavor, whether weights are packed, whether half of the slots are dropped."""

    format: Any
    flavor: str = "default"
    runtime: type[Model] = Moec
    packed: bool = False
    halved: bool = False
    activations: str = ""
    """What the export is told of activations; empty: nothing."""

    @property
    def directory(self) -> str:
        """Name of the artifact's directory; rows of one artifact share it."""
        kind = self.format if isinstance(self.format, str) else "-".join(sorted(set(self.format["formats"].values())))
        more = [*(["halved"] if self.halved else []), *filter(None, [self.activations])]
        return "-".join(["moec", kind.replace(":", "-"), self.flavor, *more])

    @property
    def quantize(self) -> dict[str, Any]:
        """The section of the recipe."""
        return {
            "format": self.format,
            "rounding": "rtn",
            **({"activations": self.activations} if self.activations else {}),
        }


ROWS: dict[str, Row] = {
    "moec int4": Row("int4"),
    "moec int4, packed": Row("int4", packed=True),
    "moec int4, half of the slots": Row("int4", halved=True),
    "moec int4, cache in place": Row("int4", "genai"),
    "moec int4, cache in place, packed": Row("int4", "genai", packed=True),
    "moec int4:128 in all classes": Row(ALL_128),
    "moec int4:128 in all classes, packed": Row(ALL_128, packed=True),
    "moec int4:128 in all classes, cache in place": Row(ALL_128, "genai"),
    "moec int4:128 in all classes, cache in place, packed": Row(ALL_128, "genai", packed=True),
    "moec int4:128 in all classes, cache in place, half of the slots": Row(ALL_128, "genai", halved=True),
    "moec int4:128 in all classes, cache in place, half of the slots, packed": Row(
        ALL_128, "genai", halved=True, packed=True
    ),
    "moec int4:128 in all classes, in onnxruntime-genai": Row(ALL_128, "genai", Genai),
    "moec int4:32 in all classes": Row(ALL_32),
}
LLAMA_CPP = "llama.cpp Q4_0"
COMPARED = ("int4", "int4:128 in all classes")
"""Formats that an earlier commit exports too, in both flavors, with its own activations and in int8."""


def build_moec(checkpoint: Callable[[], Path], directory: Path, row: Row) -> Path:
    """Export with weights rounded to nearest, once; and pack, once."""
    from moec.compiler.api import export
    from moec.compiler.run.packing import pack_into

    packed = directory.with_name(f"{directory.name}-packed")
    if not directory.is_dir() and not (row.packed and packed.is_dir()):
        chosen: dict[str, Any] = {"quantize": row.quantize}
        if row.halved:
            mass, kept = mass_for(checkpoint(), BUDGET)
            print(f"top-p {mass:.3f} keeps {kept:.1%} of the slots")
            chosen["routing"] = {"policy": "top-p", "parameters": {"mass": mass}}
        options = {"flavor": row.flavor}
        export(checkpoint(), target="onnx", output=directory, gates=False, options=options, **chosen)
    if row.packed and not packed.is_dir():
        pack_into(directory, packed, lambda *_: None)
    return packed if row.packed else directory


def build_genai(checkpoint: Path, directory: Path, *options: str) -> Path:
    """Run onnxruntime-genai's builder, once, with int8 activations, which it does not set for the experts."""
    if not directory.is_dir():
        made = directory.with_suffix(".partial")
        shutil.rmtree(made, ignore_errors=True)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(checkpoint), "-o", str(made)]
        extra = ["-p", "int4", "-e", "cpu", "--extra_options", "int4_accuracy_level=4", *options]
        subprocess.run([*command, *extra], check=True, capture_output=True)
        made.rename(directory)
    return directory


def expert_activations_in_int8(built: Path, directory: Path) -> Path:
    """A copy of a model that onnxruntime-genai's builder made (once), with int8 activations for QMoE too."""
    import onnx

    if not directory.is_dir():
        shutil.copytree(built, directory, copy_function=os.link)
        model = onnx.load(built / "model.onnx", load_external_data=False)
        for node in model.graph.node:
            if node.op_type == "QMoE":
                node.attribute.append(onnx.helper.make_attribute("accuracy_level", 4))
        (directory / "model.onnx").unlink()
        onnx.save(model, directory / "model.onnx")
    return directory


def build_llama_cpp(checkpoint: Callable[[], Path], file: Path) -> Path:
    """Write the checkpoint as GGUF without a vocabulary and quantize it with llama.cpp, once."""
    if file.is_file():
        return file
    import llama_cpp

    whole, partial = file.with_suffix(".f16"), file.with_suffix(".partial")
    write_olmoe(checkpoint(), whole, in_half_precision)
    quantize(whole, partial, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0)
    whole.unlink()
    partial.rename(file)
    return file


def in_half_precision(name: str, values: torch.Tensor) -> tuple[Any, None]:
    """Vectors and routers in float32, other tensors in float16."""
    return (values.float() if is_float(name, values) else values.half()).numpy(), None


Built = tuple[type[Model], str]
"""What runs a model, and its path."""


def builders_of(work: Path, shape: str, *, llama_cpp: bool) -> dict[str, Callable[[], Built]]:
    """What builds each row, once."""
    found: dict[str, Callable[[], Built]] = {}
    prefix = "" if shape == "olmoe-1gb" else f"{shape}-"

    @functools.cache
    def checkpoint() -> Path:
        return SHAPES[shape](work / shape)

    def peer(*options: str) -> Built:
        source = random_lfm2_checkpoint(work / "lfm2-1gb", ROOT / "golden_models" / "olmoe-tiny")
        name = "-".join(["genai", *(option.partition("=")[0] for option in options)])
        built = build_genai(source, work / f"{name}-built", *options)
        return Genai, str(expert_activations_in_int8(built, work / f"{name}-int4"))

    def own(row: Row) -> Built:
        return row.runtime, str(build_moec(checkpoint, work / f"{prefix}{row.directory}", row))

    if shape == "olmoe-1gb":
        found["onnxruntime-genai int4"] = peer
        found["onnxruntime-genai int4, logits of the last token"] = partial(peer, "prune_lm_head=true")
    found |= {name: partial(own, row) for name, row in ROWS.items()}
    if llama_cpp:
        found[LLAMA_CPP] = lambda: (LlamaCpp, str(build_llama_cpp(checkpoint, work / f"{shape}-q4_0.gguf")))
    return found


def build_earlier(checkpoint: Path, directory: Path, row: Row, checkout: Path) -> Path:
    """Export with the code of another checkout, once."""
    if not directory.is_dir():
        chosen = {"target": "onnx", "gates": False, "quantize": row.quantize, "options": {"flavor": row.flavor}}
        program = (
            "import json, sys; from moec.compiler.api import export; "
            "export(sys.argv[1], output=sys.argv[2], **json.loads(sys.argv[3]))"
        )
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", program, str(checkpoint), str(directory), json.dumps(chosen)]
            subprocess.run(command, check=True, env=environment_of(checkout, Path(folder)))
    return directory


def compare_earlier(work: Path, shape: str, checkout: Path, options: argparse.Namespace) -> None:
    """Measure what another checkout makes of the same formats, and print the ratios of this one to it."""
    checkpoint, openers = SHAPES[shape](work / shape), dict[str, Callable[[], Model]]()
    commit = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    pairs: list[tuple[str, str]] = []
    for name, activations in itertools.product(COMPARED, ("", "int8-dynamic")):
        for place in ("", ", cache in place"):
            row = replace(ROWS[f"moec {name}{place}"], activations=activations)
            built = build_earlier(checkpoint, work / f"{commit}-{shape}-{row.directory}", row, checkout)
            earlier = f"{commit} {name}{place}{', int8 activations' if activations else ''}"
            openers[earlier] = partial(_opened_apart, row.runtime, str(built), options.threads, checkout)
            pairs += [(f"moec {name}{place}{packed}", earlier) for packed in ("", ", packed")]
    rows = builders_of(work, shape, llama_cpp=False)
    for name, _ in pairs:
        if name not in openers:
            runtime, path = rows[name]()
            openers[name] = partial(_opened_apart, runtime, path, options.threads, None)
    found = compare(
        openers, options.rounds, prompts=options.prompts, openings=options.openings, threads=options.threads
    )
    for earlier in (name for name in openers if name.startswith(commit)):
        print(f"\nRelative to {earlier}:\n")
        print(table(found, {name: other for name, other in pairs if other == earlier}))


def _opened_apart(runtime: type[Model], path: str, threads: int, checkout: Path | None) -> Model:
    return Apart(runtime.__name__, path, threads, checkout).open()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where to keep checkpoints and artifacts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--openings", type=int, default=1, help="how often all models are opened anew")
    parser.add_argument("--threads", type=int, default=1, help="with several, wall-clock time is measured")
    parser.add_argument("--prompts", nargs="+", type=int, default=PROMPTS, metavar="TOKENS", help="lengths of prompts")
    parser.add_argument("--only", default="", help="measure only rows whose name matches this regular expression")
    parser.add_argument("--llama-cpp", action="store_true", help="measure llama.cpp too")
    parser.add_argument("--shape", choices=SHAPES, default="olmoe-1gb", help="of the model")
    parser.add_argument("--earlier", type=Path, metavar="CHECKOUT", help="compare with an earlier commit of moec")
    parser.add_argument("--first-token", action="store_true", help="measure from opening to the first token")
    parser.add_argument("--kernels", action="store_true", help="print the time of kernels in a decode step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        if options.earlier:
            compare_earlier(work, options.shape, options.earlier, options)
            return
        rows = builders_of(work, options.shape, llama_cpp=options.llama_cpp)
        chosen = {name: build() for name, build in rows.items() if re.search(options.only, name)}
        measure(chosen, options)


def measure(chosen: Mapping[str, Built], options: argparse.Namespace) -> None:
    """Print what the flags ask for."""
    if options.first_token:
        models = {name: (runtime.__name__, path) for name, (runtime, path) in chosen.items()}
        print(f"{describe()}\n\n{first_tokens(models, options.openings, options.threads)}")
    elif options.kernels:
        print(f"{describe()}\n\n{kernel_table({name: Path(path) for name, (_, path) in chosen.items()})}")
    else:
        openers = {name: partial(runtime, path, options.threads) for name, (runtime, path) in chosen.items()}
        found = compare(
            openers, options.rounds, prompts=options.prompts, openings=options.openings, threads=options.threads
        )
        if LLAMA_CPP in found:
            print(f"\n{table(found, dict.fromkeys(found, LLAMA_CPP))}")


if __name__ == "__main__":
    main()
