"""How often the same prompt gives different logits: for an ONNX artifact, and for one that adds slots by a scatter.

    python benchmarks/repeatability.py ARTIFACT [--prefills 1000] [--gates 10] [--threads 2]

The second form is that of earlier versions of moec: a `ScatterND` adds the rows of all slots to their tokens. Adding to
one row from several threads loses updates in ONNX Runtime (microsoft/onnxruntime#18048, #23396), which the gate
`repeatability` must detect. Prints how many prefills of 480 tokens differ from the first, and how many gates failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).parent))
from arguments import add_flags
from machine import describe

from moec.compiler.common.verdict import Status
from moec.compiler.gates.repeatability import judge_repeatability
from moec.compiler.gates.tolerance import Precision
from moec.targets.onnx.runner import OnnxRunner


def write_adding_form(artifact: Path, directory: Path) -> Path:
    """Write a copy of `artifact` in which a `ScatterND` adds the slots of each layer; returns `directory`.

    Raises:
        ValueError: The artifact has no experts in the grouped form.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for path in artifact.iterdir():
        if path.is_file() and path.name != "model.onnx":
            os.link(path, directory / path.name)
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    makers = {name: node for node in model.graph.node for name in node.output}
    sums = [node for node in model.graph.node if _is_sum(node, makers)]
    if not sums:
        raise ValueError(f"{artifact}: no layer has grouped experts")
    for node in sums:
        nodes = _adding(node, makers)
        place = list(model.graph.node).index(node)
        del model.graph.node[place]
        for offset, new in enumerate(nodes):
            model.graph.node.insert(place + offset, new)
    for name, value in (("first", 0), ("second", 1), ("last", -1), ("end", 2**62)):
        model.graph.initializer.append(helper.make_tensor(f"adding.{name}", TensorProto.INT64, [1], [value]))
    onnx.save(model, directory / "model.onnx")
    return directory


def _is_sum(node: Any, makers: dict[str, Any]) -> bool:
    """Whether `node` is the squeeze after the product of a token's weights and rows."""
    product = makers.get(node.input[0]) if node.op_type == "Squeeze" else None
    if product is None or product.op_type != "MatMul" or product.input[1] not in makers:
        return False
    places = makers[product.input[1]]
    return bool(places.op_type == "Gather" and makers[places.input[1]].op_type == "Reshape")


def _adding(node: Any, makers: dict[str, Any]) -> list[Any]:
    """Nodes that replace `node` and end in `ScatterND(add)` of the rows, in the order of the experts."""
    product = makers[node.input[0]]
    weights, rows = makers[product.input[0]].input[0], makers[product.input[1]].input[0]
    order = makers[makers[makers[product.input[1]].input[1]].input[0]].input[1]
    tokens = next(other.output[0] for other in makers.values() if other.op_type == "Div" and other.input[0] == order)
    p = f"adding.{node.output[0]}."
    return [
        helper.make_node("Slice", [rows, "adding.second", "adding.end", "adding.first"], [p + "rows"]),
        helper.make_node("Reshape", [weights, "adding.last"], [p + "flat"]),
        helper.make_node("Gather", [p + "flat", order], [p + "own"]),
        helper.make_node("Unsqueeze", [p + "own", "adding.second"], [p + "column"]),
        helper.make_node("Mul", [p + "rows", p + "column"], [p + "updates"]),
        helper.make_node("Unsqueeze", [tokens, "adding.second"], [p + "places"]),
        helper.make_node("Shape", [weights], [p + "count"], start=0, end=1),
        helper.make_node("Shape", [rows], [p + "width"], start=1),
        helper.make_node("Concat", [p + "count", p + "width"], [p + "shape"], axis=0),
        helper.make_node("ConstantOfShape", [p + "shape"], [p + "zeros"]),
        helper.make_node("ScatterND", [p + "zeros", p + "places", p + "updates"], [node.output[0]], reduction="add"),
    ]


def measure(name: str, directory: Path, options: argparse.Namespace) -> None:
    """Print one row: prefills that differ from the first, and gates that failed."""
    runner = OnnxRunner(directory, threads=options.threads)
    random = np.random.default_rng(0)
    ids = random.integers(3, options.vocabulary, (1, options.tokens))
    first, different = runner.prefill(ids), 0
    for _ in range(options.prefills - 1):
        different += not np.array_equal(runner.prefill(ids), first)
    failed = sum(
        judge_repeatability(runner, random.integers(3, options.vocabulary, ids.shape), Precision.FP32).status
        is Status.FAIL
        for _ in range(options.gates)
    )
    print(f"| {name} | {different} of {options.prefills - 1} | {failed} of {options.gates} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    add_flags(parser, prefills=1000, gates=10, threads=2, tokens=480)
    options = parser.parse_args()
    description = json.loads((options.artifact / "moec.json").read_text())
    logits = next(item for item in description["signature"]["outputs"] if item["name"] == "logits")
    options.vocabulary = int(logits["shape"][-1])
    print(describe())
    print(f"\n| form | prefills of {options.tokens} tokens that differ | gates that failed |\n|---|---|---|")
    measure("as moec writes it", options.artifact, options)
    with tempfile.TemporaryDirectory(dir=options.artifact.parent) as folder:
        measure("slots added by ScatterND", write_adding_form(options.artifact, Path(folder) / "adding"), options)


if __name__ == "__main__":
    main()
