"""Files, errors and sharing: everything about a lowering that is no number."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from moec.compiler.common.errors import ArtifactError, LoweringError
from moec.compiler.ir.program import ATTENTION
from moec.targets.onnx.experts import OnnxExperts
from moec.targets.onnx.runner import NUM_LOGITS, OnnxRunner
from moec.targets.onnx.target import OnnxOptions, OnnxTarget

aten = torch.ops.aten


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("flavor", ["default", "portable"])
def test_two_lowerings_are_byte_identical(
    flavor: str, tmp_path: Path, tiny_checkpoint: Any, lower_checkpoint: Any
) -> None:
    first = lower_checkpoint(tiny_checkpoint("gpt_oss"), flavor=flavor)
    again = tmp_path / "again"
    again.mkdir()
    OnnxTarget().lower(first.program, OnnxOptions(flavor=flavor), again, lambda *_: None)
    assert set(first.lowered.model_files) == set(files(again)) == {"model.onnx", "model.onnx_data"}
    assert files(first.directory) == files(again)


def test_the_model_is_valid_and_standard(tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    portable = lower_checkpoint(tiny_checkpoint("olmoe"), flavor="portable")
    model = onnx.load(portable.directory / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [opset.domain for opset in model.opset_import] == [""]


def test_tied_embedding_is_stored_once(tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    model = lower_checkpoint(tiny_checkpoint("cohere2_moe"))
    graph = ir.load(model.directory / "model.onnx").graph
    tables = [name for name in graph.initializers if "embed_tokens" in name or "lm_head" in name]
    assert tables == ["model.embed_tokens.weight"]
    assert {node.op_type for node in graph.initializers[tables[0]].consumers()} == {"Gather", "FusedMatMul"}


def test_weights_are_not_read_before_they_are_written(one_op: Any) -> None:
    from moec.targets.onnx import lower
    from moec.targets.onnx.lowerings.table import onnx_dialect

    one = one_op(aten.linear.default, lambda d: (torch.ones(d.b, 4), d.weight(torch.ones(3, 4))))
    (name,) = one.core.weight_names()
    broken = dataclasses.replace(one.core.weights[name], value=torch.full((3, 4), torch.nan))
    program = one.core.replace(weights=one.core.weights.with_tensors({name: broken}))
    model, context = lower.build(program, onnx_dialect(contrib=True))
    (entry,) = context.initializers
    assert model.graph.initializers[entry].const_value is None


def test_op_without_lowering(one_op: Any, tmp_path: Path) -> None:
    one = one_op(aten.logit.default, lambda d: (torch.ones(d.b, 4),))
    with pytest.raises(LoweringError) as caught:
        OnnxTarget().lower(one.program, OnnxOptions(), tmp_path, lambda *_: None)
    assert caught.value.message == "the.module: the onnx target has no lowering for aten.logit.default"
    assert "aten.log.default" in caught.value.hint
    assert [(item.where, item.reason) for item in OnnxTarget().lint(one.program, OnnxOptions())] == [
        ("the.module", "no lowering for aten.logit.default")
    ]


def test_forms_that_are_refused(one_op: Any) -> None:
    from moec.targets.onnx import lower
    from moec.targets.onnx.lowerings.table import onnx_dialect

    refused = {
        aten.slice_scatter.default: lambda d: (torch.ones(d.b, 8), torch.ones(d.b, 4), 1, 0, 8, 2),
        aten.index.Tensor: lambda d: (torch.ones(4, 4), [torch.zeros(d.b).long(), torch.zeros(d.b).long()]),
        aten.linalg_vector_norm.default: lambda d: (torch.ones(d.b, 4), 3.0, [-1]),
        aten.layer_norm.default: lambda d: (torch.ones(d.b, 4, 4), [4, 4]),
    }
    for target, arguments in refused.items():
        with pytest.raises(LoweringError, match=rf"the\.module: .*{target}"):
            lower.build(one_op(target, arguments).core, onnx_dialect(contrib=True))


def test_sizes_are_computed(check_op: Any) -> None:
    """A size that is worked out from others, with each kind of arithmetic."""
    check_op(aten.full.default, lambda d: ([d.batch * 3, d.sequence], 1.0))


def test_one_mask_for_layers_that_share_it(tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    """afmoe has two sliding layers and a full one: two masks, whatever the number of layers."""
    model = lower_checkpoint(tiny_checkpoint("afmoe"))
    graph = ir.load(model.directory / "model.onnx").graph
    masks = [node.inputs[3].name for node in graph if node.op_type == "Attention"]  # type: ignore[union-attr]
    assert len(masks) == len(model.program.nodes(ATTENTION)) == 3
    assert len(set(masks)) == 2


def test_signature_is_that_of_the_file(tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    model = lower_checkpoint(tiny_checkpoint("olmoe"))
    graph = onnx.load(model.directory / "model.onnx", load_external_data=False).graph

    def shape(value: Any) -> list[Any]:
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    said = model.lowered.signature
    inputs = [*said["inputs"], *(state["input"] for state in said["states"])]
    assert [(item["name"], item["shape"]) for item in inputs] == [(value.name, shape(value)) for value in graph.input]
    outputs = [*said["outputs"], *(state["output"] for state in said["states"])]
    assert [(item["name"], item["shape"]) for item in outputs] == [(value.name, shape(value)) for value in graph.output]
    assert [item["name"] for item in said["inputs"]] == ["input_ids", "attention_mask", "position_ids", NUM_LOGITS]


def test_a_damaged_model_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=r"model\.onnx: ONNX Runtime cannot load it"):
        OnnxRunner(tmp_path)


def test_a_model_that_cannot_be_run_is_an_artifact_error(tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    """ONNX Runtime's exceptions have no base class, so gates and commands would not know them."""
    directory = lower_checkpoint(tiny_checkpoint("olmoe")).directory
    with pytest.raises(ArtifactError, match=r"ONNX Runtime cannot run the model: .*out of data bounds"):
        OnnxRunner(directory).prefill(np.full((1, 3), 10**6))
    experts = OnnxExperts(directory)
    with pytest.raises(ArtifactError, match="ONNX Runtime cannot run the model"):
        experts(0, np.zeros((3, 7), np.float32), np.zeros((3, 2), np.int64), np.ones((3, 2), np.float32))


def test_runner_profile(tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    model = lower_checkpoint(tiny_checkpoint("olmoe"))
    runner = OnnxRunner(model.directory, threads=1, profile=True)
    runner.prefill(np.array([[3, 4, 5]]))
    spent = runner.kernel_times()
    assert spent["MatMul"] > 0
    assert runner.facts()["threads"] == 1
    runner = OnnxRunner(model.directory, threads=1, profile=True)
    runner.prefill(np.array([[3, 4, 5]]))
    found = runner.node_times()
    graph = onnx.load(model.directory / "model.onnx", load_external_data=False).graph
    (head,) = [node for node in graph.node if "logits" in node.output]
    assert found[head.op_type, head.name] > 0, "nodes have the names of the graph"
    assert {op for op, _ in found} == spent.keys()


def test_a_session_leaves_the_floats_of_its_process_alone(tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    """In a new process, since ONNX Runtime's option has an effect on the thread of the first session alone."""
    model = lower_checkpoint(tiny_checkpoint("olmoe"))
    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from moec.targets.onnx.runner import OnnxRunner\n"
        "runner = OnnxRunner(Path(sys.argv[1]), threads=1)\n"
        "inside, run = [], runner._states.run\n"
        "tenth = lambda: float(np.finfo(np.float32).tiny * np.float32(0.1))\n"
        "runner._states.run = lambda *given: (inside.append(tenth()), run(*given))[1]\n"
        "runner.prefill(np.array([[1, 2]]))\n"
        "print(inside == [0.0], tenth() > 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model.directory)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "True"]
