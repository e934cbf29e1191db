"""What lowering writes: sizes, bytes that repeat, metadata, skipped experts, and what it refuses."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.common.errors import LoweringError, UsageError
from moec.compiler.common.validation import validate
from moec.compiler.common.verdict import Status
from moec.compiler.gates.coverage import run_every_expert
from moec.compiler.gates.integrity import Comparisons
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import EXPERTS, Program
from moec.compiler.ir.weights import Constant, LazyTensor
from moec.passes.quantize import Quantize
from moec.passes.routing.dynamic_routing import DynamicRouting
from moec.passes.routing.policies.uniform_k import UniformK
from moec.quantize.formats import FloatFormat, PaletteFormat, parse_format
from moec.quantize.lazy import Quantized, palettized
from moec.quantize.plan import QuantizationPlan, requested
from moec.targets.base import Phase
from moec.targets.coreml import stored
from moec.targets.coreml.executor import MilModel
from moec.targets.coreml.executor.package import load_spec, model_file
from moec.targets.coreml.library import coremltools_module
from moec.targets.coreml.package import PACKAGE, WEIGHTS
from moec.targets.coreml.target import CoremlOptions, CoremlTarget
from tests.support.compensations import compensated

Golden = Callable[[str], Any]

WEIGHT_FILE = f"Data/{WEIGHTS}/weight.bin"


def quantized(program: Program, text: str) -> Program:
    wanted = parse_format(text)
    assert not isinstance(wanted, FloatFormat)
    changed: dict[str, LazyTensor] = {}
    for layer in program.layers:
        for name in (layer.gate_up_proj, layer.down_proj):
            tensor = program.weights[name]
            if isinstance(wanted, PaletteFormat):
                changed[name] = palettized(name, tensor, wanted)
                continue
            chosen = wanted.resolve(tensor.shape[-1], name)
            # Rounded once: lowering, the interpreter and the integrity gate read the codes in turn.
            codes = Quantized(name, tensor, chosen).quantized_rows(0, tensor.shape[0])
            experts = tuple(codes[index] for index in range(tensor.shape[0]))
            changed[name] = Quantized(name, tensor, chosen, rounded=experts)
    return program.replace(weights=program.weights.with_tensors(changed))


def planned_bytes(program: Program) -> int:
    """Bytes of every weight in its planned format, float weights in fp16."""
    total = 0
    for name in program.weight_names():
        tensor = program.weights[name]
        wanted = getattr(tensor, "format", None)
        total += wanted.planned_bytes(tensor.shape) if wanted else 2 * int(np.prod(tensor.shape))
    return total


def prompt(program: Program, length: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(3, program.vocab_size, (1, length))


def check_against_interpreter(lowered: Any, limit: float) -> None:
    runner, reference, ids = lowered.runner(), ProgramRunner(lowered.program), prompt(lowered.program)
    for function, piece in (("prefill", ids[:, :6]), ("decode", ids[:, 6:7]), ("decode", ids[:, 7:])):
        want = getattr(reference, function)(piece)
        assert np.abs(getattr(runner, function)(piece) - want).max() <= limit * np.abs(want).max()


def test_weights_are_stored_once(golden: Golden) -> None:
    """Both functions and every branch use one copy, and no bias of zeros is written beside each linear."""
    lowered = golden("fp16")
    planned = planned_bytes(lowered.program)
    assert planned <= lowered.nbytes <= 1.05 * planned
    assert (lowered.directory / PACKAGE / WEIGHT_FILE).stat().st_size <= 1.005 * planned


@pytest.mark.parametrize("text", [pytest.param("int8:64", marks=pytest.mark.slow), "int4:32", "palettize4"])
def test_quantized_experts(golden: Golden, lower: Any, text: str) -> None:
    program = quantized(golden("fp16").program, text)
    lowered = lower(program, context=32, prefill_chunk=16)
    planned = planned_bytes(program)
    assert planned <= lowered.nbytes <= 1.05 * planned
    check_against_interpreter(lowered, 2e-2)
    verdict = Comparisons(program, CoremlTarget().stored_weights(lowered.directory)).judge()
    assert verdict.status is Status.PASS, verdict.summary


@pytest.mark.parametrize("name", ["int8", "int4", "palettize4"])
def test_everything_quantized(golden: Golden, lower: Any, name: str) -> None:
    """The smallest packages, of which the graph takes the largest part: no more than a twentieth with all the rest."""
    program = Quantize(requested(name)).run(golden("fp16").program).program
    lowered = lower(program)
    planned = planned_bytes(program)
    assert planned <= lowered.nbytes <= 1.05 * planned


@pytest.mark.parametrize(("chunk", "stacks"), [(16, 1), (300, 3), (512, 4)])
def test_prefill_sums_experts_in_groups(
    tiny_checkpoint: Any, program_of: Any, lower: Any, chunk: int, stacks: int
) -> None:
    """As many as fit in 1024 rows, at most eight, and fewer in the last group: 8; 3, 3 and 2; 2 each."""
    program = program_of(tiny_checkpoint("olmoe"), torch.float32)
    assert {layer.num_experts for layer in program.layers} == {8}
    lowered = lower(program, context=512, prefill_chunk=chunk)
    assert lowered.facts["ops"]["prefill"]["stack"] == stacks * len(program.layers)
    check_against_interpreter(lowered, 1e-4)


def test_zero_points(tiny_checkpoint: Any, program_of: Any, lower: Any) -> None:
    program = quantized(program_of(tiny_checkpoint("olmoe"), torch.float16), "int4:channel:asym")
    lowered = lower(program, context=32)
    check_against_interpreter(lowered, 2e-2)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float16, 2e-2)], ids=["fp32", "fp16"])
def test_palettes(tiny_checkpoint: Any, program_of: Any, lower: Any, dtype: torch.dtype, limit: float) -> None:
    """The whole preset: palettes for experts and attention, the router float; a table per group of rows."""
    program = program_of(tiny_checkpoint("olmoe"), dtype)
    scales = "fp32" if dtype is torch.float32 else "fp16"
    ends = dict.fromkeys(("embedding", "lm_head"), f"int8:32:{scales}")
    inner = dict.fromkeys(("experts_gate_up", "experts_down", "attention"), "palettize4:8")
    plan = QuantizationPlan.from_dict({"formats": {**inner, **ends}})
    program = Quantize(plan).run(program).program
    lowered = lower(program, context=32)
    check_against_interpreter(lowered, limit)
    verdict = Comparisons(program, CoremlTarget().stored_weights(lowered.directory)).judge()
    assert verdict.status is Status.PASS, verdict.summary
    assert lowered.facts["ops"]["decode"]["constexpr_lut_to_dense"] == sum(
        2 * layer.num_experts + 4 for layer in program.layers
    )
    row = MilModel.open(lowered.directory / PACKAGE).constants("decode")["w0_0_down"]
    shape = program.weights[program.layers[0].down_proj].shape[1:]
    assert row.type.element.name == scales
    assert row.stored_bytes == math.prod(shape) // 2 + shape[0] // 8 * 16 * np.dtype(f"f{dtype.itemsize}").itemsize


def test_scales_are_widened_and_never_narrowed(tiny_checkpoint: Any, program_of: Any, lower: Any) -> None:
    checkpoint = tiny_checkpoint("olmoe")
    narrow = quantized(program_of(checkpoint, torch.float32), "int8:channel")
    lowered = lower(narrow, context=32)
    check_against_interpreter(lowered, 1e-4)
    assert Comparisons(narrow, CoremlTarget().stored_weights(lowered.directory)).judge().status is Status.PASS
    wide = quantized(program_of(checkpoint, torch.float16), "int8:channel:fp32")
    with pytest.raises(LoweringError, match="its scales are fp32, but the program computes in fp16") as raised:
        lower(wide, context=32)
    assert "--dtype fp32" in raised.value.hint


def digests(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_rebuild_is_byte_identical(tiny_checkpoint: Any, program_of: Any, lower: Any) -> None:
    program = program_of(tiny_checkpoint("olmoe"), torch.float16)
    first = lower(program, context=32)
    # Names that somebody else's program used up in between must not show.
    coremltools_module("coremltools.converters.mil").Builder.name_count["add"] += 7
    second = lower(program, context=32)
    assert digests(first.directory) == digests(second.directory)
    assert len(digests(first.directory)) == 3


def test_metadata(tiny_checkpoint: Any, program_of: Any, lower: Any) -> None:
    program = program_of(tiny_checkpoint("olmoe"), torch.float16)
    lowered = lower(program, context=32, author="Ada", license="Apache-2.0")
    description = load_spec(model_file(lowered.directory / PACKAGE)).description
    assert (description.metadata.author, description.metadata.license) == ("Ada", "Apache-2.0")
    assert "OlmoeForCausalLM" in description.metadata.shortDescription
    functions = {function.name: function for function in description.functions}
    assert functions.keys() == {"decode", "prefill"}
    for function in functions.values():
        assert [item.name for item in function.input] == ["input_ids", "cache_position"]
        assert [item.name for item in function.state] == ["keyCache", "valueCache"]
        assert all(item.shortDescription for item in (*function.input, *function.output, *function.state))
        assert list(function.state[0].type.stateType.arrayType.shape) == [2, 2, 32, 16]


def test_layers_that_differ_have_states_of_their_own(tiny_checkpoint: Any, program_of: Any, lower: Any) -> None:
    program = program_of(tiny_checkpoint("mimo_v2_flash"), torch.float16)
    shapes = {(state.kind, state.input.shape[1], state.input.shape[3]) for state in program.states}
    assert len(shapes) > 2, "the family no longer has layers that differ: choose another"
    description = load_spec(model_file(lower(program, context=64).directory / PACKAGE)).description
    names = [item.name for item in description.functions[0].state]
    assert len(names) == len(program.states)
    assert "keyCache0" in names


def halved(program: Program) -> Program:
    return DynamicRouting(UniformK(k=2)).run(program).program


def expert_macs(lowered: Any) -> int:
    runner, ids = lowered.runner(), prompt(lowered.program, 4)
    for token in ids[0]:
        runner.decode(token[None, None])
    return int(runner.facts()["executed"]["decode"]["expert_macs"])


def test_half_the_slots_are_half_the_work(golden: Golden, lower: Any) -> None:
    static = golden("fp16")
    assert {layer.top_k for layer in static.program.layers} == {4}
    dynamic = lower(halved(static.program), context=32, prefill_chunk=16)
    hidden, width = static.program.layers[0].hidden_size, static.program.layers[0].intermediate_size
    # 4 tokens, 4 layers, 4 slots, gate, up and down.
    assert expert_macs(static) == 4 * 4 * 4 * 3 * hidden * width
    assert expert_macs(dynamic) <= 0.55 * expert_macs(static)
    check_against_interpreter(dynamic, 2e-2)


def test_a_routing_budget_at_run_time_is_an_input_with_a_default(
    tiny_checkpoint: Any, program_of: Any, lower: Any
) -> None:
    program = program_of(tiny_checkpoint("olmoe"), torch.float32)
    routed = DynamicRouting(UniformK(k=1), runtime_budget=True).run(program).program
    lowered = lower(routed, context=16)
    check_against_interpreter(lowered, 1e-4)
    runner = lowered.runner()
    once = runner.prefill(prompt(program))
    runner._defaults["routing_budget"] = np.array([2], np.float32)
    assert np.abs(runner.prefill(prompt(program)) - once).max() > 1e-2
    want = ProgramRunner(program).prefill(prompt(program))
    np.testing.assert_allclose(runner.prefill(prompt(program)), want, atol=1e-4 * float(np.abs(want).max()))


def test_what_stands_in_for_dropped_experts_is_added(tiny_checkpoint: Any, program_of: Any, lower: Any) -> None:
    program = program_of(tiny_checkpoint("olmoe"), torch.float32)
    routed = compensated(program, UniformK(k=1, renormalize=False))
    check_against_interpreter(lower(routed, context=16), 1e-4)


@pytest.mark.parametrize("length", [1, 5])
def test_a_dropped_expert_contributes_nothing_even_if_it_yields_nan(
    tiny_checkpoint: Any, program_of: Any, lower: Any, length: int
) -> None:
    program = program_of(tiny_checkpoint("olmoe"), torch.float32)
    name = program.layers[0].down_proj
    used = np.zeros(program.layers[0].num_experts, bool)

    def watch(node: Any, args: Any, _result: Any) -> None:
        if node.target is EXPERTS and not used.any():
            used[np.unique(args[1].numpy())] = True

    want = ProgramRunner(program, observer=watch).prefill(prompt(program, length))
    idle = np.flatnonzero(~used)
    assert idle.size, "the prompt uses every expert: choose a shorter one"
    values = program.weights.read(name).clone()
    values[idle] = float("nan")
    broken = program.replace(weights=program.weights.with_tensors({name: Constant(values)}))
    # The first layer alone is watched: later ones see the same values if it is right.
    found = lower(broken, context=16).runner().prefill(prompt(program, length))
    assert np.abs(found - want).max() <= 1e-4 * np.abs(want).max()


def test_a_constant_that_converting_folded_is_not_read_back(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the metadata, and not in the package: the result of its op is."""
    lowered = golden("fp16")
    metadata = stored.read_metadata(lowered.directory)
    more = metadata.model_copy(update={"matrices": {**metadata.matrices, "border": "no_such_constant"}})
    monkeypatch.setattr(stored, "read_metadata", lambda _: more)
    found = CoremlTarget().stored_weights(lowered.directory)
    assert "border" not in found
    assert metadata.matrices.keys() < found.keys()


def test_a_flipped_block_of_any_one_expert_is_caught(tiny_checkpoint: Any, program_of: Any, lower: Any) -> None:
    program = program_of(tiny_checkpoint("olmoe"), torch.float16)
    lowered, target = lower(program, context=64), CoremlTarget()
    assert Comparisons(program, target.stored_weights(lowered.directory)).judge().status is Status.PASS
    file, ids = lowered.directory / PACKAGE / WEIGHT_FILE, prompt(program, 48)
    content, want = file.read_bytes(), ProgramRunner(program).prefill(ids)
    for layer in program.layers:
        for expert, values in enumerate(program.weights.read(layer.down_proj)):
            row = values.to(torch.float16).numpy().tobytes()
            assert content.count(row) == 1
            start = content.index(row)
            file.write_bytes(content[:start] + bytes(64) + content[start + 64 :])
            verdict = Comparisons(program, target.stored_weights(lowered.directory)).judge()
            assert verdict.status is Status.FAIL
            assert f"{layer.down_proj} experts {expert}" in verdict.summary
    # The prompt reaches the last of them, and parity sees it too.
    assert np.abs(lowered.runner().prefill(ids) - want).max() > 2e-2 * np.abs(want).max()


@pytest.mark.parametrize("minimum", ["ios16", "ios17", "macos13", "macos14"])
def test_systems_without_states_are_refused(minimum: str) -> None:
    with pytest.raises(UsageError, match=f"{minimum} supports neither states.*nor int4 weights"):
        validate(CoremlOptions, {"minimum": minimum}, where="options")


def test_context_beyond_the_model(tiny_checkpoint: Any, program_of: Any, lower: Any) -> None:
    program = program_of(tiny_checkpoint("olmoe"), torch.float16)
    with pytest.raises(UsageError, match="made for 512 tokens"):
        lower(program, context=513)


def test_an_op_without_a_lowering_is_named(tiny_checkpoint: Any, program_of: Any, lower: Any) -> None:
    program = program_of(tiny_checkpoint("olmoe"), torch.float16)
    graph = program.copy_graph()
    node = next(item for item in graph.nodes if item.target is torch.ops.aten.silu.default or item.target is EXPERTS)
    with graph.inserting_after(node):
        new = graph.call_function(torch.ops.aten.lgamma.default, (node,))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    odd = program.replace(graph=graph)
    (rejection,) = CoremlTarget().lint(odd, CoremlOptions())
    assert "lgamma" in rejection.reason
    with pytest.raises(LoweringError, match=r"no lowering for aten\.lgamma"):
        lower(odd, context=32)


def test_capabilities() -> None:
    target, options = CoremlTarget(), CoremlOptions()
    assert target.capabilities(options, Phase.DECODE).skips_experts
    prefill = target.capabilities(options, Phase.PREFILL)
    assert not prefill.skips_experts
    assert "every expert" in prefill.reason


def test_experts_run_alone_where_every_slot_of_a_token_has_a_row(
    tiny_checkpoint: Any, program_of: Any, lower: Any
) -> None:
    """The function for one token then takes two rows, as Llama 4 with two experts per token has them."""
    program = program_of(tiny_checkpoint("llama4_text"), torch.float32)
    runners = CoremlTarget().open_experts(lower(program, context=32).directory)
    hidden = {row.index: torch.randn(8, row.hidden_size) for row in program.layers}
    errors = [error for result in run_every_expert(program, runners, hidden) for error in result.errors.values()]
    assert len(errors) == sum(row.num_experts for row in program.layers)
    assert max(errors) < 1e-5
