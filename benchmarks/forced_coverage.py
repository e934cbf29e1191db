"""CPU time and memory of the coverage and integrity gates for a random checkpoint of OLMoE-1B-7B's shape, on ONNX.

    python benchmarks/forced_coverage.py DIRECTORY [--layers 16] [--format int4] [--coverage-alone]

DIRECTORY receives the checkpoint (0.86 GB per layer in bfloat16, one file each) and the artifact. Hidden states are
random with the scale of a norm's output, since their values do not affect the cost of the gates. All layers cost the
same.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from arguments import add_flags
from safetensors.torch import save_file

from moec.compiler.common.memory import keep_freed_memory
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.coverage import judge_coverage, run_every_expert
from moec.compiler.gates.integrity import Comparisons
from moec.compiler.gates.reference import SAMPLED
from moec.compiler.gates.tolerance import precision_of
from moec.compiler.gates.usage import Usage
from moec.passes import default_passes, run_passes
from moec.passes.quantize import Quantize
from moec.quantize.plan import requested
from moec.targets.onnx.target import OnnxTarget

HIDDEN, INNER, EXPERTS, TOP_K, VOCABULARY = 2048, 1024, 64, 8, 50304


def tensors_of(layer: int) -> dict[str, torch.Tensor]:
    """Random weights of one layer."""
    generator = torch.Generator().manual_seed(layer)

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5, generator=generator)

    p = f"model.layers.{layer}."
    made = {f"{p}self_attn.{name}_proj.weight": random(HIDDEN, HIDDEN) for name in "qkvo"}
    names = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    made |= {f"{p}{name}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16) for name in names}
    made[f"{p}mlp.gate.weight"] = random(EXPERTS, HIDDEN)
    for expert in range(EXPERTS):
        for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
            made[f"{p}mlp.experts.{expert}.{name}_proj.weight"] = random(*shape)
    return made


def write_checkpoint(directory: Path, layers: int) -> Path:
    """Write the checkpoint (once), one layer in memory at a time."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    ends = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN).to(torch.bfloat16),
        "lm_head.weight": (torch.randn(VOCABULARY, HIDDEN) * HIDDEN**-0.5).to(torch.bfloat16),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
    }
    names: dict[str, str] = {}
    for place in range(layers + 1):
        tensors, name = (tensors_of(place) if place < layers else ends), f"model-{place:05}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, name)
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    add_flags(parser, layers=16, format="int4")
    parser.add_argument("--coverage-alone", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()  # as the command `moec` does
    checkpoint = Checkpoint.open(write_checkpoint(options.directory / f"olmoe-{options.layers}", options.layers))
    program = run_passes(capture(checkpoint), default_passes())[0]
    program = Quantize(requested(options.format)).run(program).program
    target, artifact = OnnxTarget(), options.directory / f"onnx-{options.format}-{options.layers}"
    if not artifact.is_dir():
        artifact.mkdir(parents=True)
        target.lower(program, target.Options(), artifact, lambda *_: None)
    hidden = {row.index: torch.randn(SAMPLED, row.hidden_size) for row in program.layers}
    start, wall, most = time.process_time(), time.perf_counter(), 0
    process = psutil.Process()

    def progress(*_: object) -> None:
        nonlocal most
        own = process.memory_info()
        most = max(most, own.rss - own.shared)

    runners = target.open_experts(artifact)
    comparisons = Comparisons(program, {} if options.coverage_alone else target.stored_weights(artifact))
    found = run_every_expert(program, runners, hidden, 1.0, progress, comparisons.compare)
    verdicts = [judge_coverage(found, list(runners), precision_of(program), 1.0, Usage(program.layers))]
    if not options.coverage_alone:
        verdicts.append(comparisons.judge())
    seconds, elapsed = time.process_time() - start, time.perf_counter() - wall
    for verdict in verdicts:
        print(f"{verdict.gate}: {verdict.status}: {verdict.summary}")
    print(f"{seconds:.1f} s of CPU, {elapsed:.1f} s, {most / 1e9:.2f} GB of anonymous memory between layers")


if __name__ == "__main__":
    main()
