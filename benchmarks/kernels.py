"""Where a decode step spends its time: kernels, and the bytes that a token reads beside the memory bandwidth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

STEPS, PAST = 24, 128
GROUPS = {"experts": ("QMoE", "MoE"), "attention": ("GroupQueryAttention", "Attention")}
"""Column -> kinds of kernels."""


def kernel_table(models: dict[str, Path]) -> str:
    """A row for each model: milliseconds of a decode step by kind of kernel, bytes per token, bytes per second.

    Args:
        models: Name of a row -> an artifact, or a GGUF file, of which only the bytes are known.
    """
    from moec.compiler.measure.estimate.speeds import bandwidth

    columns = ["model", "kernels ms", "experts", "GB/s of the experts", "other products", "head", "attention", "other"]
    columns += ["MB per token", "ms at the bandwidth"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    speed = bandwidth()
    for name, path in models.items():
        read, of_experts = gguf_bytes(path) if path.suffix == ".gguf" else artifact_bytes(path)
        end = f"{read / 1e6:.1f} | {read / speed * 1e3:.1f} |"
        if path.suffix == ".gguf":
            lines.append(f"| {name} | | | | | | | | {end}")
            continue
        times = groups(path)
        whole, experts = sum(times.values()), times["experts"]
        lines.append(
            f"| {name} | {whole:.1f} | {experts:.1f} ({experts / whole:.0%}) | {of_experts / experts / 1e6:.1f} "
            f"| {times['products']:.1f} | {times['head']:.1f} | {times['attention']:.1f} | {times['other']:.1f} | {end}"
        )
    return "\n".join([*lines, "", f"One thread reads {speed / 1e9:.1f} GB/s."])


def groups(directory: Path) -> dict[str, float]:
    """Milliseconds of a decode step after `PAST` tokens: experts, other products, head, attention, and the rest."""
    from moec.targets.onnx.files import model_path
    from moec.targets.onnx.runner import OnnxRunner

    runner, random = OnnxRunner(directory, threads=1, profile=True), np.random.default_rng(0)
    runner.prefill(random.integers(3, 31999, (1, PAST)))
    for _ in range(STEPS):  # more steps than prompts: the profile has the median of each node
        runner.decode(random.integers(3, 31999, (1, 1)))
    graph = onnx.load(model_path(directory), load_external_data=False).graph
    heads = {node.name for node in graph.node if "logits" in node.output}
    found = dict.fromkeys(("experts", "products", "head", "attention", "other"), 0.0)
    for (op, node), nanoseconds in runner.node_times().items():
        kind = next((kind for kind, ops in GROUPS.items() if op in ops), "other")
        if op == "MatMulNBits":
            kind = "head" if node in heads else "products"
        found[kind] += nanoseconds / 1e6
    return found


def artifact_bytes(directory: Path) -> tuple[int, int]:
    """Bytes of the weights that a token reads, and of the experts among them."""
    from moec.compiler.common.artifact import read_manifest
    from moec.targets import get_target

    sizes = get_target("onnx").weight_sizes(directory)
    slots = [int(row["top_k"]) for row in read_manifest(directory)["model"]["moe_layers"]]
    experts = sum(size * count for size, count in zip(sizes.experts, slots, strict=True))
    return sizes.dense + experts, experts


def gguf_bytes(file: Path) -> tuple[int, int]:
    """Bytes of the weights that a token reads, and of the experts among them."""
    import gguf

    reader = gguf.GGUFReader(file)
    used, count = (int(reader.fields[f"olmoe.expert_{name}"].contents()) for name in ("used_count", "count"))
    experts = sum(item.n_bytes for item in reader.tensors if "_exps" in item.name) * used // count
    dense = sum(item.n_bytes for item in reader.tensors if "_exps" not in item.name and "token_embd" not in item.name)
    return int(dense + experts), int(experts)
