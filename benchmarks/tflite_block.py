"""One MoE block on LiteRT: latency by number of active experts, compared with a conversion by litert-torch.

    python benchmarks/tflite_block.py [--litert-torch] [--tokens 1] [--threads 2] [--rounds 30]

The block has H 512, F 1024, E 16 and top_k 8, and runs `--tokens` tokens. All variants are timed alternately, so that a
busy machine affects them equally; the table has the median and the fastest call of each. `--litert-torch` adds
transformers' batched_mm experts, converted by litert-torch (which must be installed). The error of each variant against
fp32 is printed before the timing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from arguments import add_flags
from machine import describe
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from moec.compiler.ir.program import EXPERTS, Program
from moec.compiler.ir.weights import Constant, LazyTensor, WeightStore
from moec.quantize.formats import IntegerFormat, parse_format
from moec.quantize.lazy import Quantized
from moec.targets.common.table import lookup
from moec.targets.tflite.context import Context, Settings, Shared
from moec.targets.tflite.library import module
from moec.targets.tflite.lowerings.table import TABLE
from moec.targets.tflite.model import Graph, Model
from moec.targets.tflite.weights import Weights
from moec.targets.tflite.writer import write

HIDDEN, WIDTH, EXPERT_COUNT, TOP_K = 512, 1024, 16, 8
FORMS = ("none", "int8:channel:int8-dynamic", "int4:32:int8-dynamic")
GATE = ("silu", True, False, False, 1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Block:
    """Weights of the block, and tokens with their routing."""

    hidden: Tensor
    indices: Tensor
    gate_up: Tensor
    down: Tensor

    @classmethod
    def random(cls, tokens: int) -> Block:
        generator = torch.Generator().manual_seed(0)
        return cls(
            torch.randn(tokens, HIDDEN, generator=generator),
            torch.rand(tokens, EXPERT_COUNT, generator=generator).argsort()[:, :TOP_K],
            torch.randn(EXPERT_COUNT, 2 * WIDTH, HIDDEN, generator=generator) * HIDDEN**-0.5,
            torch.randn(EXPERT_COUNT, HIDDEN, WIDTH, generator=generator) * WIDTH**-0.5,
        )

    def routing(self, active: int) -> Tensor:
        """Routing weights [tokens, k], of which the first `active` are not 0."""
        return torch.where(torch.arange(TOP_K) < active, 1.0 / active, 0.0).expand(len(self.hidden), -1).contiguous()


def write_moec(block: Block, form: str, path: Path, *, branches: bool = True) -> None:
    """Write the block as lowered by moec, with weights in the format `form`."""
    held = {"gate_up": stored(block.gate_up, form), "down": stored(block.down, form)}
    program = Program(fx.Graph(), WeightStore(held), (), (), (), torch.float32, {}, {})
    ctx = Context(Shared(program, Weights(program)), Settings(1, branches), Graph("decode"))
    graph, mode = fx.Graph(), FakeTensorMode(allow_non_fake_inputs=True)
    operands = {"hidden": block.hidden, "indices": block.indices, "weights": block.routing(TOP_K)}
    nodes = []
    for name, value in operands.items():
        node = graph.placeholder(name)
        node.meta["val"] = mode.from_tensor(value)
        ctx.bind(node, ctx.graph.input(name, value.shape, "INT32" if name == "indices" else "FLOAT32"))
        nodes.append(node)
    for name, value in (("gate_up", block.gate_up), ("down", block.down)):
        node = graph.get_attr(name)
        node.meta["val"] = mode.from_tensor(value)
        nodes.append(node)
    hidden, indices, weights, gate_up, down = nodes
    call = graph.call_function(EXPERTS, (hidden, indices, weights, gate_up, None, down, None, *GATE))
    call.meta["val"] = hidden.meta["val"]
    ctx.graph.output("out", lookup(TABLE, call, "tflite")(ctx, call))
    write(Model(signatures={"decode": ctx.graph}), path, lambda *_: None)


def stored(value: Tensor, form: str) -> LazyTensor:
    chosen = parse_format(form)
    return Quantized("block", Constant(value), chosen) if isinstance(chosen, IntegerFormat) else Constant(value)


def opened(path: Path, threads: int) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """A function that runs the file's first signature and returns its output."""
    interpreter = module("ai_edge_litert.interpreter").Interpreter(str(path), num_threads=threads)
    runner = interpreter.get_signature_runner(next(iter(interpreter.get_signature_list())))
    names = list(runner.get_input_details())

    def call(feeds: dict[str, np.ndarray]) -> np.ndarray:
        positional = dict(zip(sorted(names), (feeds["hidden"], feeds["indices"], feeds["weights"]), strict=True))
        result = runner(**({name: feeds[name] for name in names} if set(names) == set(feeds) else positional))
        return next(iter(result.values()))

    return call


def write_litert_torch(block: Block, path: Path) -> None:
    """Convert transformers' batched_mm experts with litert-torch."""
    import litert_torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_local_experts": EXPERT_COUNT}
    config = MixtralConfig(**sizes, num_experts_per_tok=TOP_K)
    config._experts_implementation = "batched_mm"
    experts = MixtralExperts(config).eval().requires_grad_(requires_grad=False)
    experts.load_state_dict({"gate_up_proj": block.gate_up, "down_proj": block.down})
    sample = (block.hidden, block.indices, block.routing(TOP_K))
    litert_torch.convert(experts, sample).export(str(path))


def feeds_of(block: Block, active: int) -> dict[str, np.ndarray]:
    return {
        "hidden": block.hidden.numpy(),
        "indices": block.indices.numpy().astype(np.int32),
        "weights": block.routing(active).numpy(),
    }


def variants(block: Block, folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Name and function of each variant; each is checked against torch first."""
    for form in FORMS:
        path = folder / f"{form}.tflite"
        write_moec(block, form, path)
        call = opened(path, options.threads)
        for active in (1, 2, 4, 8):
            yield checked(block, call, form, active)
    for form in FORMS[:2]:
        path = folder / f"dense-{form}.tflite"
        write_moec(block, form, path, branches=False)
        yield checked(block, opened(path, options.threads), f"{form}, no control flow", TOP_K)
    if options.litert_torch:
        write_litert_torch(block, folder / "write_litert_torch.tflite")
        call = opened(folder / "write_litert_torch.tflite", options.threads)
        yield checked(block, call, "litert-torch batched_mm", TOP_K)


def checked(
    block: Block, call: Callable[[dict[str, np.ndarray]], np.ndarray], name: str, active: int
) -> tuple[str, Callable[[], np.ndarray]]:
    feeds = feeds_of(block, active)
    want = EXPERTS(block.hidden, block.indices, block.routing(active), block.gate_up, None, block.down, None, *GATE)
    error = float(np.abs(call(feeds) - want.numpy()).max() / want.abs().max())
    print(f"  {name}, {active} active: error against fp32 {error:.1e}")
    return f"{name}, {active} active", lambda: call(feeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--litert-torch", action="store_true")
    add_flags(parser, tokens=1, threads=2, rounds=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        calls = dict(variants(Block.random(options.tokens), Path(folder), options))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(options.rounds):
            for name, call in calls.items():
                for _ in range(3):
                    start = time.perf_counter()
                    call()
                    times[name].append(time.perf_counter() - start)
    print(f"\n{describe()}, litert {importlib.metadata.version('ai-edge-litert')}")
    print(f"\n| block, {options.threads} threads, {options.tokens} token(s) | median ms | fastest ms |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {1e3 * float(np.median(seconds)):.3f} | {1e3 * min(seconds):.3f} |")


if __name__ == "__main__":
    main()
