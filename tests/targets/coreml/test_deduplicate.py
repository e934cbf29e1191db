"""The graph says nothing twice, and says what it said before."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.targets.coreml.deduplicate import compact
from moec.targets.coreml.executor import MilModel
from moec.targets.coreml.executor.package import load_spec, model_file
from moec.targets.coreml.library import coremltools_module, quiet
from moec.targets.coreml.package import PACKAGE, WEIGHTS

WEIGHT_FILE = f"Data/{WEIGHTS}/weight.bin"

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_@]*")


def blocks_of(block: Any) -> Iterator[Any]:
    yield block
    for operation in block.operations:
        for inner in operation.blocks:
            yield from blocks_of(inner)


def bodies(spec: Any) -> Mapping[str, Any]:
    return {
        name: next(iter(function.block_specializations.values())) for name, function in spec.mlProgram.functions.items()
    }


def label(operation: Any) -> str | None:
    if "name" not in operation.attributes:
        return None
    return str(operation.attributes["name"].immediateValue.tensor.strings.values[0])


@pytest.fixture(scope="module")
def package(tiny_checkpoint: Any, program_of: Any, lower: Any) -> Path:
    directory: Path = lower(program_of(tiny_checkpoint("olmoe"), torch.float16), context=32).directory
    return directory / PACKAGE


def branches(builder: Any) -> Path:
    """Constants of one value outside and inside of the branches of two `cond`, and of others inside alone."""
    mb = builder.mb

    def body(x: Any) -> Any:
        total = mb.add(x=mb.mul(x=x, y=np.float32(2)), y=mb.mul(x=x, y=np.float32(2)))
        for index in range(2):
            low = mb.less(x=mb.reduce_sum(x=total, axes=[0], keep_dims=False), y=np.float32(1))
            total = mb.cond(
                pred=low,
                _true_fn=lambda total=total: mb.add(x=mb.mul(x=total, y=np.float32(2)), y=np.float32(7)),
                _false_fn=lambda total=total: mb.sub(x=mb.mul(x=total, y=np.float32(7)), y=np.float32(3)),
                name=f"chosen_{index}",
            )
        return mb.mul(x=total, y=np.float32(3), name="result")

    path: Path = builder.save({"x": builder.placeholder((4,))}, body)
    return path


def test_results_and_chosen_names_stay(builder: Any) -> None:
    path = branches(builder)
    feeds = [{"x": np.full(4, value, np.float32)} for value in (-3, 0, 5)]
    before = [MilModel.open(path).session().predict(feed) for feed in feeds]
    spec = load_spec(model_file(path))
    size = spec.ByteSize()
    compact(spec)
    assert spec.ByteSize() < 0.75 * size
    model_file(path).write_bytes(spec.SerializeToString(deterministic=True))
    for feed, want in zip(feeds, before, strict=True):
        found = MilModel.open(path).session().predict(feed)
        assert found.keys() == want.keys() == {"result"}
        np.testing.assert_array_equal(found["result"], want["result"])
    (body,) = bodies(spec).values()
    assert [label(item) for item in body.operations if item.type == "cond"] == ["chosen_0", "chosen_1"]


def test_a_constant_is_shared_within_its_scope_alone(builder: Any) -> None:
    spec = load_spec(model_file(branches(builder)))
    compact(spec)
    (body,) = bodies(spec).values()

    def constants(block: Any) -> list[float]:
        values = (item.attributes["val"].immediateValue.tensor.floats.values for item in block.operations)
        return [item[0] for item in values if len(item)]

    assert constants(body).count(2) == 1
    # 2 is known outside; 7 in each branch is its own, and so is the 3 that is made outside only later.
    inner = [block for item in body.operations for block in item.blocks]
    assert [constants(block) for block in inner] == [[7], [7, 3]] * 2


def test_weights_of_equal_values_keep_their_names(builder: Any) -> None:
    """They are read back by name, as a buffer of Qwen3.5's multimodal rotary embedding whose values occur twice."""
    mb, value = builder.mb, np.ones(4, np.float32)

    def body(x: Any) -> Any:
        return mb.add(x=mb.add(x=x, y=mb.const(val=value, name="first")), y=mb.const(val=value, name="second"))

    spec = load_spec(model_file(builder.save({"x": builder.placeholder((4,))}, body)))
    compact(spec)
    (function,) = bodies(spec).values()
    assert {"first", "second"} <= {item.outputs[0].name for item in function.operations}


def test_the_graph_repeats_nothing(package: Path) -> None:
    spec = load_spec(model_file(package))
    for body in bodies(spec).values():
        names: set[str] = set()
        for block in blocks_of(body):
            constants = [item for item in block.operations if item.type == "const"]
            values = [(item.outputs[0].type.SerializeToString(), str(item.attributes["val"])) for item in constants]
            assert len(values) == len(set(values))
            for operation in block.operations:
                outputs = [output.name for output in operation.outputs]
                assert not names.intersection(outputs)
                names.update(outputs)
                named = operation.type == "const" or bool(operation.blocks)
                assert label(operation) == outputs[0] if named else (label(operation) is None) == bool(outputs)
        assert all(IDENTIFIER.fullmatch(name) for name in names)
        assert {"logits", "model_norm_weight", "w1_7_up", "w1_7_down"} <= names
    assert {"moe0_0", "moe1_7"} <= {item.outputs[0].name for item in bodies(spec)["decode"].operations if item.outputs}
    once = spec.SerializeToString(deterministic=True)
    compact(spec)
    assert spec.SerializeToString(deterministic=True) == once


def test_coremltools_reads_it(package: Path) -> None:
    load = coremltools_module("coremltools.converters.mil.frontend.milproto.load").load
    spec = load_spec(model_file(package))
    with quiet():
        program = load(spec, specification_version=9, file_weights_dir=str((package / WEIGHT_FILE).parent))
    assert {name: [item.name for item in made.outputs] for name, made in program.functions.items()} == {
        "decode": ["logits"],
        "prefill": ["logits"],
    }
