"""Whole models: `.tflite` files against the interpreter, the contract on dropped slots, formats, and bad input."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moec
from moec import passes
from moec.compiler.common.errors import ArtifactError, LoweringError, MissingExtraError, UsageError
from moec.compiler.families.tiny_models import write_tiny_checkpoint
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.coverage import run_every_expert
from moec.compiler.ir.experts import ACTIVATIONS, Gate
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import EXPERTS, Program
from moec.compiler.ir.weights import Constant
from moec.passes.quantize import Quantize
from moec.passes.routing.dynamic_routing import DynamicRouting
from moec.passes.routing.policies.top_p import TopP
from moec.quantize.formats import IntegerFormat, parse_format
from moec.quantize.lazy import quantized as lazily_quantized
from moec.quantize.plan import QuantizationPlan, TensorClass
from moec.targets import get_target
from moec.targets.base import Phase
from moec.targets.runners import limits_of
from moec.targets.tflite import library as extra
from moec.targets.tflite.experts import open_experts
from moec.targets.tflite.reader import TfliteFile
from moec.targets.tflite.runner import TfliteRunner
from moec.targets.tflite.target import TfliteOptions, TfliteTarget
from tests.support.compensations import compensated

Programs = Callable[[str], Program]
DYNAMIC = "int8-dynamic"
EXPERT_CLASSES = (TensorClass.EXPERTS_GATE_UP, TensorClass.EXPERTS_DOWN)


def difference(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def tokens(program: Program, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, program.vocab_size, (1, count))


def quantized(program: Program, **formats: str) -> Program:
    plan = QuantizationPlan.build({TensorClass(name): parse_format(text) for name, text in formats.items()})
    return Quantize(plan=plan).run(program).program


# Parity ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [True, False], ids=["branches", "dense"])
@pytest.mark.parametrize("family", ["golden", "gpt_oss", "deepseek_v3"])
def test_the_file_gives_the_logits_of_the_program(
    build: Any, program_of: Programs, family: str, branches: bool
) -> None:
    program = program_of(family)
    runner, reference = build.runner(program, branches=branches), ProgramRunner(program)
    ids = tokens(program, 45)
    whole = reference.prefill(ids)
    # 16: one piece; 21: a piece and a padded one; 43: two pieces and a padded one; 1: decoding alone.
    for cut in (16, 21, 43, 1):
        got = np.concatenate([runner.prefill(ids[:, :cut]), runner.decode(ids[:, cut:])], axis=1)
        assert difference(got, whole) < 1e-5, cut


def test_greedy_tokens_are_those_of_the_program(build: Any, program_of: Programs) -> None:
    program = program_of("golden")
    runner = build.runner(program)
    prompt = tokens(program, 8)
    logits, chosen = runner.prefill(prompt), []
    for _ in range(64):
        chosen.append(int(logits[0, -1].argmax()))
        logits = runner.decode(np.array([chosen[-1:]]))
    # By induction: given these tokens, the reference would have chosen each of them.
    sequence = np.concatenate([prompt, np.array([chosen])], axis=1)
    want = ProgramRunner(program).prefill(sequence)[0, prompt.shape[1] - 1 : -1].argmax(-1)
    assert chosen == want.tolist()


FAMILIES = (
    *("afmoe", "cohere2_moe", "dbrx", "deepseek_v2", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "gemma4_text"),
    *("glm4_moe", "glm4_moe_lite", "granitemoe", "granitemoe_swa", "granitemoeshared", "lfm2_moe", "llama4_text"),
    "mixtral",
    *("phimoe", "qwen2_moe", "qwen3_moe"),
)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(build: Any, program_of: Programs, family: str) -> None:
    test_the_file_gives_the_logits_of_the_program(build, program_of, family, branches=True)


def counting_from_past(program: Program, target: Any) -> Program:
    """`program` with its positions made by `target(arange(sequence), past)`."""
    graph = program.copy_graph()
    inputs = {node.target: node for node in graph.find_nodes(op="placeholder")}
    positions, cache_position = inputs["position_ids"], inputs["cache_position"]
    sequence, past = program.dims["sequence"], program.dims["past_sequence"]
    with graph.inserting_before(next(iter(positions.users))):
        made = [
            (graph.call_function(torch.ops.aten.sym_size.int, (inputs["input_ids"], 1)), sequence),
            (graph.call_function(torch.ops.aten.sym_size.int, (inputs["past_0_key"], 2)), past),
        ]
        made.append(
            (graph.call_function(torch.ops.aten.arange.start_step, (0, made[0][0], 1)), cache_position.meta["val"])
        )
        made.append((graph.call_function(target, (made[2][0], made[1][0])), cache_position.meta["val"]))
        row = graph.call_function(torch.ops.aten.unsqueeze.default, (made[3][0], 0))
    for node, value in (*made, (row, positions.meta["val"])):
        node.meta = {"val": value, "module": "model.rotary"}
    positions.replace_all_uses_with(row)
    return program.replace(graph=graph)


def test_positions_counted_from_the_past_are_read_from_the_input(build: Any, program_of: Programs) -> None:
    # As Llama 4 does it. With a cache of fixed capacity the length of the past says nothing.
    program, ids = program_of("mixtral"), tokens(program_of("mixtral"), 18)
    changed = counting_from_past(program, torch.ops.aten.add.Tensor)
    assert difference(build.runner(changed).prefill(ids), ProgramRunner(program).prefill(ids)) < 1e-5


def test_anything_else_that_reads_the_length_of_the_past_is_refused(build: Any, program_of: Programs) -> None:
    with pytest.raises(LoweringError, match=r"model.rotary: .*depends on the length of the past"):
        build.file(counting_from_past(program_of("mixtral"), torch.ops.aten.mul.Tensor))


# Contract -------------------------------------------------------------------------------------------------------------


def experts_call(weight: Any, hidden: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Any:
    gate = ("silu", True, False, False, 1.0, 0.0, 0.0)
    return (EXPERTS, hidden, indices, weights, weight(gate_up), None, weight(down), None, *gate)


@pytest.mark.parametrize("branches", [True, False], ids=["branches", "dense"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_slot_of_weight_zero_contributes_nothing_even_if_its_expert_yields_nan(
    build: Any, weight: Any, count: int, branches: bool
) -> None:
    generator = torch.Generator().manual_seed(count)
    hidden, gate_up = torch.randn(count, 8, generator=generator), torch.randn(4, 12, 8, generator=generator)
    down = torch.randn(4, 8, 6, generator=generator)
    gate_up[3] = float("nan")
    indices, weights = torch.tensor([[0, 3]] * count), torch.tensor([[0.7, 0.0]] * count)
    call = experts_call(weight, hidden, indices, weights, gate_up, down)
    (got,) = build.calls({"call": call}, branches=branches)["call"]
    want = EXPERTS(hidden, indices, weights, gate_up, None, down, None, *call[8:])
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.isfinite(got).all()


def test_a_token_keeps_its_total_when_only_another_one_needs_the_expert(build: Any, weight: Any) -> None:
    hidden, gate_up, down = torch.ones(2, 8), torch.ones(2, 12, 8), torch.ones(2, 8, 6)
    gate_up[1] = float("inf")
    indices, weights = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[1.0, 0.0], [1.0, 0.5]])
    call = experts_call(weight, hidden, indices, weights, gate_up, down)
    for branches in (True, False):
        (got,) = build.calls({"call": call}, branches=branches)["call"]
        assert np.isfinite(got[0]).all()
        assert not np.isfinite(got[1]).all()


@pytest.mark.parametrize(
    ("gate", "bias"),
    [
        (Gate("silu", interleaved=True, alpha=1.702, limit=0.7, up_offset=1.0), True),
        (Gate("silu", limit=0.3, limit_activated=True), True),
        (Gate("silu"), True),
        *((Gate(name, gated=False), False) for name in ACTIVATIONS),
        *((Gate(name, interleaved=True), False) for name in ACTIVATIONS),
    ],
)
def test_every_kind_of_expert(build: Any, weight: Any, gate: Gate, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    wide = 12 if gate.gated else 6
    hidden, indices, weights = random(3, 8), torch.tensor([[0, 2], [1, 0], [3, 2]]), random(3, 2).abs()
    gate_up, down = random(4, wide, 8), random(4, 8, 6)
    biases = [random(4, wide), random(4, 8)] if bias else [None, None]
    activation, gated, interleaved, *rest = dataclasses.astuple(gate)
    own = (activation, gated, interleaved, False, *rest)
    held = [None if value is None else weight(value) for value in biases]
    call = (EXPERTS, hidden, indices, weights, weight(gate_up), held[0], weight(down), held[1], *own)
    (got,) = build.calls({"call": call})["call"]
    want = EXPERTS(hidden, indices, weights, gate_up, biases[0], down, biases[1], *own)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_each_expert_is_a_branch_with_weights_of_its_own_stored_once(build: Any, program_of: Programs) -> None:
    program = program_of("golden")
    path = build.file(program)
    file = TfliteFile(path)
    graphs = [file.model.Subgraphs(index) for index in range(file.model.SubgraphsLength())]
    branches = [graph for graph in graphs if graph.Name().startswith(b"experts")]
    layers, experts, signatures = len(program.layers), program.layers[0].num_experts, 2
    assert len(branches) == layers * experts * signatures
    # The entry points hold no weight of an expert, and the two signatures read the same bytes.
    entry = [graphs[0].Tensors(index).Name() or b"" for index in range(graphs[0].TensorsLength())]
    assert not any(b"gate_up_proj" in name for name in entry)
    stored = sum(
        program.weights[name].nbytes for name in dict.fromkeys(map(program.weights.resolve, program.weight_names()))
    )
    assert path.stat().st_size < 1.1 * stored


def test_a_policy_drops_slots_and_its_budget_is_an_input(build: Any, program_of: Programs) -> None:
    routing = DynamicRouting(policy=TopP(mass=0.7), runtime_budget=True)
    program = passes.run_passes(program_of("golden"), [*passes.default_passes(), routing])[0]
    runner, ids = build.runner(program), tokens(program, 20)
    assert difference(runner.prefill(ids), ProgramRunner(program).prefill(ids)) < 1e-5
    pretrained = ProgramRunner(program_of("golden")).prefill(ids)
    assert difference(runner.prefill(ids), pretrained) > 1e-3
    runner.overrides["routing_budget"] = np.array(1.0, np.float32)
    assert difference(runner.prefill(ids), pretrained) < 1e-5


def test_what_stands_in_for_dropped_experts_is_added(build: Any, program_of: Programs) -> None:
    program = compensated(program_of("golden"), TopP(mass=0.7, renormalize=False))
    runner, ids = build.runner(program), tokens(program, 20)
    assert difference(runner.prefill(ids), ProgramRunner(program).prefill(ids)) < 1e-5
    plain = DynamicRouting(TopP(mass=0.7, renormalize=False)).run(program_of("golden")).program
    assert difference(runner.prefill(ids), ProgramRunner(plain).prefill(ids)) > 1e-3


# Formats --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formats", "limit"),
    [
        (dict.fromkeys(("experts_gate_up", "experts_down", "attention"), f"int8:channel:{DYNAMIC}"), 2e-2),
        ({"experts_gate_up": f"int4:32:{DYNAMIC}", "experts_down": f"int8:channel:{DYNAMIC}"}, 2e-2),
        ({"experts_gate_up": f"int4:channel:{DYNAMIC}", "experts_down": f"int4:channel:{DYNAMIC}"}, 2e-2),
        ({"experts_gate_up": "int8:channel", "experts_down": "int8:channel", "attention": "int8:channel"}, 1e-5),
        ({"embedding": "int8:channel"}, 1e-5),
        ({name.value: "fp16" for name in (*EXPERT_CLASSES, TensorClass.LM_HEAD, TensorClass.EMBEDDING)}, 1e-5),
    ],
    ids=lambda value: "-".join(dict.fromkeys(value.values())) if isinstance(value, dict) else None,
)
def test_formats(build: Any, program_of: Programs, formats: dict[str, str], limit: float) -> None:
    program = quantized(program_of("mixtral"), **formats)
    runner, reference = build.runner(program), ProgramRunner(program)
    ids = tokens(program, 20)
    got, want = runner.prefill(ids), reference.prefill(ids)
    # Most positions: rounded activations may send a token of an undecided router elsewhere.
    errors = np.abs(got - want).max(-1)[0] / np.abs(want).max()
    assert np.median(errors) < limit


def test_biases_in_half_precision_beside_weights_with_rounded_activations(build: Any, tmp_path: Path) -> None:
    """Of attention and of experts: LiteRT refused to load the file, since such a bias is no constant in it."""
    checkpoint = Checkpoint.open(write_tiny_checkpoint("gpt_oss", tmp_path / "model", dtype="float16"))
    program = passes.run_passes(capture(checkpoint, dtype=torch.float32), passes.default_passes())[0]
    program = quantized(
        program, **dict.fromkeys(("experts_gate_up", "experts_down", "attention"), f"int8:channel:{DYNAMIC}")
    )
    ids = tokens(program, 20)
    got, want = build.runner(program).prefill(ids), ProgramRunner(program).prefill(ids)
    assert np.median(np.abs(got - want).max(-1)[0] / np.abs(want).max()) < 2e-2


def test_padding_of_a_prompt_does_not_change_rotary_frequencies(
    build: Any, program_of: Programs, tmp_path: Path
) -> None:
    """A prompt of 20 tokens would be padded to 32, but frequencies change at 24; one of 29 tokens is padded."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0 + index for index in range(8)]}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        **factors,
        "factor": 8.0,
        "original_max_position_embeddings": 24,
    }
    checkpoint = write_tiny_checkpoint("qwen3_moe", tmp_path / "longrope", rope_parameters=rope)
    program = program_of(checkpoint)
    assert program.rotary_borders == (24,)
    runner, reference = build.runner(program, lengths=(1, 32)), ProgramRunner(program)
    for length in (20, 29):
        ids = tokens(program, length)
        assert difference(runner.prefill(ids), reference.prefill(ids)) < 1e-5


@pytest.mark.parametrize(
    "family",
    ["mixtral", "Llama-4-Maverick", "llama4_text"],
    ids=["operands", "constant operands", "a row for every slot"],
)
def test_experts_run_by_themselves(build: Any, program_of: Programs, family: str) -> None:
    program = program_of(family)
    runners = open_experts(build.file(program), threads=1)
    hidden = {row.index: torch.randn(8, row.hidden_size) for row in program.layers}
    results = run_every_expert(program, runners, hidden)
    errors = [error for result in results for error in result.errors.values()]
    assert len(errors) == sum(row.num_experts for row in program.layers)
    assert max(errors) < 1e-5


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("text", ["int4:32:bf16", "int4:64:bf16", "int4:channel:fp32", "int8:channel:fp32"])
def test_activations_are_rounded_as_the_target_says(build: Any, text: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(2)
    form = parse_format(f"{text}:{DYNAMIC}")
    assert isinstance(form, IntegerFormat)
    weight = lazily_quantized("w", Constant(torch.randn(48, 128, generator=generator)), form)
    states = torch.randn(rows, 128, generator=generator) + 0.3
    (got,) = build.calls({"linear": (torch.ops.aten.linear.default, states, weight, None)})["linear"]
    rounding = TfliteTarget().activation_rounding(build.directory)
    want, plain = (each @ weight.read().float().T for each in (rounding(weight, states), states))
    assert difference(got, want.numpy()) < 1e-6
    assert difference(plain.numpy(), want.numpy()) > 1e-4, "or rounding would not show"


@pytest.mark.parametrize("text", ["none", "int8:channel", f"int4:channel:{DYNAMIC}", f"int4:32:{DYNAMIC}"])
def test_experts_are_read_back_as_planned(build: Any, program_of: Programs, text: str) -> None:
    program = quantized(program_of("mixtral"), experts_gate_up=text, experts_down=f"int4:channel:{DYNAMIC}")
    stored = TfliteFile(build.file(program, lengths=(1,))).stored_weights()
    names = {name for layer in program.layers for name in (layer.gate_up_proj, layer.down_proj)}
    assert set(stored) == {*names, "model.embed_tokens.weight"}
    for name in names:
        for index in (0, program.weights[name].shape[0] - 1):
            want = program.weights[name].rows(index, index + 1)[0].float().numpy()
            np.testing.assert_allclose(stored[name].values(index, index + 1)[0], want, rtol=1e-6, atol=1e-9)


def test_experts_stored_otherwise_are_read_back_in_the_programs_layout(build: Any, program_of: Programs) -> None:
    program = program_of("gpt_oss")
    for name, weight in TfliteFile(build.file(program, lengths=(1,))).stored_weights().items():
        np.testing.assert_array_equal(weight.values(1, 2), program.weights[name].rows(1, 2).numpy())


@pytest.mark.parametrize(
    ("formats", "reason"),
    [
        ({"experts_gate_up": "int8:32"}, "one scale per row"),
        ({"experts_gate_up": "int4:32:asym"}, "zero points"),
        ({"embedding": f"int4:32:{DYNAMIC}"}, "embedding quantized in blocks"),
        ({"experts_gate_up": "int4:32"}, "only with activations that are rounded to int8"),
    ],
)
def test_what_litert_cannot_express_is_an_error_that_names_tensor_and_format(
    build: Any, program_of: Programs, formats: dict[str, str], reason: str
) -> None:
    with pytest.raises(LoweringError, match=reason) as caught:
        build.file(quantized(program_of("mixtral"), **formats), lengths=(1,))
    assert "weight" in caught.value.message or "gate_up_proj" in caught.value.message


def test_a_quantized_weight_that_only_floats_can_stand_for_is_an_error(build: Any, program_of: Programs) -> None:
    program = quantized(program_of("mixtral"), experts_down="int8:channel")
    norm = next(name for name in program.weight_names() if name.endswith("norm.weight"))
    changed = program.weights.with_tensors({norm: program.weights[program.layers[0].down_proj]})
    with pytest.raises(LoweringError, match=f"{norm}: quantized to int8:channel"):
        build.file(program.replace(weights=changed), lengths=(1,))


# The target -----------------------------------------------------------------------------------------------------------


def lowered(program: Program, directory: Path, **options: Any) -> Any:
    directory.mkdir()
    return TfliteTarget().lower(program, TfliteOptions(**options), directory, lambda *_: None)


def test_the_same_model_gives_the_same_bytes(program_of: Programs, tmp_path: Path) -> None:
    program = quantized(program_of("mixtral"), experts_gate_up=f"int4:32:{DYNAMIC}", experts_down="int8:channel")
    files = []
    for name in "ab":
        lowered(program, tmp_path / name, prefill=(16,), context=64)
        files.append((tmp_path / name / "model.tflite").read_bytes())
    assert files[0] == files[1]


def test_what_the_target_states(program_of: Programs, tmp_path: Path) -> None:
    program = quantized(program_of("mixtral"), experts_gate_up="int8:channel")
    result = lowered(program, tmp_path / "out", prefill=(32, 16), context=64)
    assert result.facts["prefill_lengths"] == [16, 32]
    assert result.facts["ops"]["IF"] == 3 * sum(layer.num_experts for layer in program.layers)
    layer = program.layers[0]
    experts, rows, width = program.weights[layer.gate_up_proj].shape
    assert result.facts["expert_tensor_bytes"][layer.gate_up_proj] == experts * rows * (width + 4)
    assert set(result.signature["signatures"]) == {"decode", "prefill_16", "prefill_32"}
    json.dumps(result.facts)
    runner = TfliteTarget().open(tmp_path / "out", threads=1)
    limits = limits_of(runner)
    assert (limits.max_batch, limits.padding, limits.max_sequence) == (1, False, 64)
    assert limits.prefill_lengths == (16, 32)
    assert "ai-edge-litert" in runner.facts()["runtime"]


def test_without_control_flow_there_is_no_branch(program_of: Programs, tmp_path: Path) -> None:
    result = lowered(program_of("mixtral"), tmp_path / "out", prefill=(16,), flavor="no-control-flow")
    assert "IF" not in result.facts["ops"]
    assert result.facts["subgraphs"] == 2


def test_capabilities() -> None:
    target = TfliteTarget()
    assert target.capabilities(TfliteOptions(), Phase.DECODE).skips_experts
    assert not target.capabilities(TfliteOptions(), Phase.PREFILL).skips_experts
    dense = target.capabilities(TfliteOptions(flavor="no-control-flow"), Phase.DECODE)
    assert not dense.skips_experts
    assert "no-control-flow" in dense.reason
    assert isinstance(get_target("tflite"), TfliteTarget)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"context": 5000, "prefill": ()}, "made for 1024 tokens"), ({"context": 64, "prefill": (65,)}, "longer than")],
)
def test_sizes_that_do_not_fit(program_of: Programs, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lowered(program_of("golden"), tmp_path / "out", **options)


def test_what_the_runner_does_not_take(build: Any, program_of: Programs) -> None:
    runner = build.runner(program_of("golden"), lengths=(1, 8), capacity=10)
    ids = tokens(program_of("golden"), 11)
    for call, message in (
        (lambda: runner.prefill(np.repeat(ids[:, :2], 2, axis=0)), "runs at most 1"),
        (lambda: runner.prefill(ids[:, :2], np.array([[0, 1]])), "does not support padding"),
        (lambda: runner.prefill(ids), "11 tokens exceed the 10"),
    ):
        with pytest.raises(UsageError, match=message):
            call()
    # Nine of ten slots: padding the tenth token to eight would move the update.
    want = ProgramRunner(program_of("golden")).prefill(ids[:, :10])
    runner.prefill(ids[:, :5])
    assert difference(runner.decode(ids[:, 5:10]), want[:, 5:]) < 1e-5


def test_damaged_files(build: Any, program_of: Programs) -> None:
    path = build.file(program_of("golden"), lengths=(1,), capacity=16)
    content = path.read_bytes()
    for damaged in (b"", content[:100], b"0" * 4096):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            TfliteRunner(path)
        with pytest.raises(ArtifactError):
            TfliteFile(path)


def test_a_preset_means_formats_that_litert_computes_with(golden_model: Path, tmp_path: Path) -> None:
    result = moec.export(
        golden_model,
        target="tflite",
        output=tmp_path / "out",
        quantize={"format": "int4", "rounding": "rtn"},
        options={"prefill": (16,), "context": 64},
        gates=False,
    )
    wanted = {name: str(parse_format(text)) for name, text in TfliteTarget.presets["int4"].items()}
    formats = result.manifest["recipe"]["quantize"]["format"]["formats"]
    assert formats == {"router": "none", "other": "none", **wanted}
    assert set(TfliteTarget.presets) == {"int4", "int8"}


def test_the_older_runtime_is_refused_what_it_computes_wrongly(program_of: Programs, tmp_path: Path) -> None:
    wrong = quantized(program_of("mixtral"), experts_down=f"int8:channel:{DYNAMIC}")
    with pytest.raises(LoweringError, match=r"experts.down_proj.* and 13 more: tflite-runtime .* zeros"):
        lowered(wrong, tmp_path / "wrong", runtime="tflite-runtime")
    lowered(program_of("mixtral"), tmp_path / "out", runtime="tflite-runtime", prefill=(16,), context=64)
    assert TfliteFile(tmp_path / "out" / "model.tflite").facts["runtime"] == "tflite-runtime"


def test_an_environment_that_is_missing_says_how_to_make_it(
    program_of: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nothing"))
    lowered(program_of("mixtral"), tmp_path / "out", runtime="tflite-runtime", prefill=(), context=64)
    with pytest.raises(MissingExtraError) as caught:
        TfliteTarget().open(tmp_path / "out")
    assert "tflite-runtime==2.14.0 'numpy<2'" in caught.value.hint


@pytest.fixture(scope="module")
def older_runtime(program_of: Programs, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Makes the environment by the command in the hint."""
    directory = tmp_path_factory.mktemp("older") / "out"
    lowered(program_of("golden"), directory, runtime="tflite-runtime", prefill=(), context=16)
    try:
        TfliteTarget().open(directory)
    except MissingExtraError as error:
        subprocess.run(error.hint, shell=True, check=True)


@pytest.mark.interop
@pytest.mark.usefixtures("older_runtime")
@pytest.mark.parametrize("text", ["none", "fp16", "int8:channel"])
def test_the_older_runtime_gives_the_logits_of_the_program(program_of: Programs, tmp_path: Path, text: str) -> None:
    classes = ("experts_gate_up", "experts_down", "attention", "embedding", "lm_head")
    program = quantized(program_of("golden"), **dict.fromkeys(classes, text))
    lowered(program, tmp_path / "out", runtime="tflite-runtime", prefill=(16,), context=64)
    runner, ids = TfliteTarget().open(tmp_path / "out", threads=1), tokens(program, 23)
    assert "tflite-runtime 2.14" in runner.facts()["runtime"]
    for cut in (20, 1):
        got = np.concatenate([runner.prefill(ids[:, :cut]), runner.decode(ids[:, cut:])], axis=1)
        assert difference(got, ProgramRunner(program).prefill(ids)) < 1e-5


def test_an_op_without_a_form_is_named(program_of: Programs) -> None:
    program = program_of("golden")
    graph = program.copy_graph()
    node = next(node for node in graph.nodes if node.target is torch.ops.aten._softmax.default)
    node.target = torch.ops.aten.erf.default
    (rejection,) = TfliteTarget().lint(dataclasses.replace(program, graph=graph), TfliteOptions())
    assert "aten.erf" in rejection.reason


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name.partition(".")[0])

    monkeypatch.setattr(extra.importlib, "import_module", missing)
    with pytest.raises(MissingExtraError) as caught:
        TfliteTarget().doctor()
    assert caught.value.hint == "pip install 'moec[tflite]'"
