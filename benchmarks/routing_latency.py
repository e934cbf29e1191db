"""Time that dynamic routing saves: static and dynamic artifacts of one checkpoint, measured alternately on one thread.

    python benchmarks/routing_latency.py [--work DIR] [--quantize int4] [--rounds 36]

The random OLMoE of 1.0 GB (see checkpoints.py) is exported three times: static, with top-p at half of the slots, and
with top-p at a mass that drops nothing. Times are CPU milliseconds of the process. The time within experts is the
kernel time of `QMoE` or `MoE` in ONNX Runtime's profile. Routing follows random token ids.

The memory addresses of a session make equal models differ by some percent, so sessions are opened several times. The
cost of the policy's nodes is also measured without the model: the policy's nodes of all layers, from the artifact that
drops nothing, compared with as many copying nodes.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import BASE, random_checkpoint
from machine import describe
from speed import PROMPT, STEPS, Moec, cpu_ms

BUDGET = 0.5
NOTHING = 0.99999
"""A mass at which every token keeps all of its experts."""
OPENING = 6
EXPERT_OPS = ("QMoE", "MoE")


def mass_for(checkpoint: Path, budget: float) -> tuple[float, float]:
    """The mass with which top-p keeps the share `budget` of the slots of random tokens, and the share that it keeps."""
    from moec import passes
    from moec.compiler.frontend.capture import capture
    from moec.compiler.frontend.checkpoint import Checkpoint
    from moec.passes.routing.calibrate.collect import collect
    from moec.passes.routing.calibrate.fit import fit
    from moec.passes.routing.calibrate.traces import kept_share, replay
    from moec.passes.routing.policies.table import parameters_of

    program, _ = passes.run_passes(capture(Checkpoint.open(str(checkpoint))), passes.default_passes())
    ids = np.random.default_rng(1).integers(3, BASE["vocab_size"] - 1, (4, PROMPT))
    traces = collect(program, ids)
    policy = fit("top-p", traces, budget)
    return float(parameters_of(policy)["mass"]), kept_share(policy, replay(traces))


def export(checkpoint: Path, output: Path, quantize: str, mass: float | None) -> Path:
    """Export without gates, once."""
    import moec

    if not (output / "moec.json").is_file():
        options: dict[str, Any] = {} if quantize == "none" else {"quantize": {"format": quantize, "rounding": "rtn"}}
        if mass is not None:
            options["routing"] = {"policy": "top-p", "parameters": {"mass": mass}}
        moec.export(str(checkpoint), target="onnx", output=str(output), gates=False, **options)
    return output


def measure(outputs: dict[str, Path], rounds: int) -> dict[str, dict[str, list[float]]]:
    """CPU milliseconds of each artifact's steps, measured alternately with the same tokens.

    The sessions are reopened in another order after every `OPENING` rounds.
    """
    found: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in outputs}
    random = np.random.default_rng(0)
    names = list(outputs)
    for _ in range(math.ceil(rounds / OPENING)):
        models = {name: Moec(str(outputs[name])) for name in names}
        for turn in range(OPENING + 1):  # the first round warms up
            prompt, steps = random.integers(3, 31999, (1, PROMPT)), random.integers(3, 31999, (STEPS * 2, 1, 1))
            for name in names:
                spent = cpu_ms(functools.partial(models[name].prefill, prompt))
                if turn:
                    found[name]["prefill"].append(spent)
            # Alternate after every step, so that a busy machine affects all models equally.
            for ids in steps:
                for name in names:
                    spent = cpu_ms(functools.partial(models[name].decode, ids))
                    if turn:
                        found[name]["decode"].append(spent)
            names = names[1:] + names[:1]
        names.reverse()
        del models
    return found


def within_experts(outputs: dict[str, Path], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of the experts' kernels in a prefill and in a decode step, from ONNX Runtime's profile."""
    from moec.targets.onnx.runner import OnnxRunner

    random = np.random.default_rng(2)
    spent: dict[str, dict[str, float]] = {name: {} for name in outputs}
    for phase, length, steps in (("prefill", PROMPT, rounds), ("decode", 1, rounds * STEPS)):
        runners = {name: OnnxRunner(output, threads=1, profile=True) for name, output in outputs.items()}
        for _ in range(steps):
            ids = random.integers(3, 31999, (1, length))
            for runner in runners.values():
                runner.prefill(ids)
        for name, runner in runners.items():
            times = runner.kernel_times()
            spent[name][phase] = sum(times.get(op, 0) for op in EXPERT_OPS) / 1e6
    return spent


def nodes_alone(output: Path, tokens: int, repeats: int = 400) -> tuple[int, float]:
    """Number of policy nodes per layer, and the CPU milliseconds of the policy nodes of all layers."""
    model = onnx.load(output / "model.onnx", load_external_data=False)
    producers = {name: node for node in model.graph.node for name in node.output}
    ends = [node.input[2] for node in model.graph.node if node.op_type == "ScatterElements"]
    starts, inside, waiting = [], set(), list(ends)
    while waiting:
        name = waiting.pop()
        if name in producers and name not in starts and name not in inside:
            if producers[name].op_type == "TopK":
                starts.append(name)
            else:
                inside.add(name)
                waiting += producers[name].input
    policy = [node for node in model.graph.node if node.output[0] in inside]
    used = {name for node in policy for name in node.input}
    constants = [tensor for tensor in model.graph.initializer if tensor.name in used]
    for tensor in constants:
        if uses_external_data(tensor):
            load_external_data_for_tensor(tensor, str(output))
            tensor.data_location = onnx.TensorProto.DEFAULT
    top_k = max(tensor.dims[0] for tensor in constants if len(tensor.dims) == 2)
    rows = np.sort(np.random.default_rng(3).random((tokens, top_k), np.float32))[:, ::-1].copy()
    slots = {
        name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["tokens", top_k]) for name in starts + ends
    }
    copies = [helper.make_node("Identity", [start], [end]) for start, end in zip(starts, reversed(ends), strict=True)]
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    spent = []
    for nodes, values in ((policy, constants), (copies, [])):
        graph = helper.make_graph(
            nodes, "policy", [slots[name] for name in starts], [slots[name] for name in ends], values
        )
        part = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        session = onnxruntime.InferenceSession(part.SerializeToString(), settings)
        run = functools.partial(session.run, None, dict.fromkeys(starts, rows))
        spent.append(min(cpu_ms(run) for _ in range(repeats)))
    return len(policy) // len(ends), spent[0] - spent[1]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where to keep checkpoint and artifacts")
    parser.add_argument("--quantize", default="int4")
    parser.add_argument("--rounds", type=int, default=36)
    options = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        checkpoint = random_checkpoint(work / "olmoe-1gb")
        mass, kept = mass_for(checkpoint, BUDGET)
        print(f"top-p {mass:.4f} keeps {kept:.1%} of the slots\n")
        cases = {"static": None, f"top-p, budget {BUDGET}": mass, "top-p, drops nothing": NOTHING}
        outputs = {
            name: export(checkpoint, work / f"routing-{options.quantize}-{index}", options.quantize, mass)
            for index, (name, mass) in enumerate(cases.items())
        }
        found = measure(outputs, options.rounds)
        experts = within_experts(outputs, options.rounds)
        nodes, step = nodes_alone(outputs["top-p, drops nothing"], 1)
        _, prompt = nodes_alone(outputs["top-p, drops nothing"], PROMPT)
    header = ["artifact", "decode ms", "ratio", "within experts", f"prefill {PROMPT} ms", "ratio", "within experts"]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    first = next(iter(found))
    for name, figures in found.items():
        cells = [name]
        for phase in ("decode", "prefill"):
            # The median of the ratios of neighbouring measurements varies less than the ratio of the medians.
            ratios = [mine / other for mine, other in zip(figures[phase], found[first][phase], strict=True)]
            inside = experts[name][phase] / experts[first][phase] if experts[first][phase] else float("nan")
            cells += [f"{statistics.median(figures[phase]):.2f}", f"{statistics.median(ratios):.3f}", f"{inside:.3f}"]
        print(f"| {' | '.join(cells)} |")
    shares = [
        f"{spent * 1e3:.0f} us, {spent / statistics.median(found[first][phase]):.2%} of the static {phase}"
        for phase, spent in (("decode", step), ("prefill", prompt))
    ]
    print(f"\nThe policy's nodes alone, {nodes} in each layer: {'; '.join(shares)}")


if __name__ == "__main__":
    main()
