import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moec.compiler.common.errors import MoecError, UnsupportedModelError, UsageError
from moec.compiler.ir.fake_values import infer
from moec.compiler.ir.interpreter import Interpreter, empty_states
from moec.compiler.ir.invariants import check_invariants
from moec.compiler.ir.printing import format_graph
from moec.compiler.ir.specialise import specialise, without_padding

SIZES = {"batch": 1, "sequence": 4, "past_sequence": 6, "total_sequence": 10}


@pytest.fixture(scope="module")
def program(capture_of):
    return capture_of("deepseek_v2")


@pytest.fixture(scope="module")
def feeds(program):
    generator = torch.Generator().manual_seed(3)
    values = {
        "input_ids": torch.randint(3, program.vocab_size, (1, 4), generator=generator),
        "attention_mask": torch.ones(1, 10, dtype=torch.int64),
        "position_ids": torch.arange(6, 10)[None],
        "cache_position": torch.arange(6, 10),
    }
    for state in program.states:
        values[state.input.name] = torch.randn([SIZES.get(size, size) for size in state.input.shape])
    return values


@pytest.fixture(scope="module")
def want(program, feeds):
    return Interpreter(program).run(feeds)["logits"]


def dynamic(program):
    """Nodes that still have a dynamic size or compute one."""
    found = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        values = value if isinstance(value, list | tuple) else [value]
        sizes = [size for item in values if isinstance(item, torch.Tensor) for size in item.shape]
        if any(isinstance(size, torch.SymInt) for size in [*sizes, *values]):
            found.append(node)
    return found


def test_all_axes_constant_leave_no_arithmetic_on_sizes(program, feeds, want):
    before = format_graph(program)
    fixed = specialise(program, batch=1, sequence=4, past_sequence=6)
    check_invariants(fixed)
    assert dynamic(fixed) == []
    assert not fixed.nodes(torch.ops.aten.sym_size.int)
    assert fixed.dims == {}
    assert [spec.shape for spec in fixed.inputs] == [(1, 4), (1, 10), (1, 4), (4,)]
    assert {(state.input.shape[2], state.output.shape[2]) for state in fixed.states} == {(6, 10)}
    assert fixed.graph.output_node().args[0][0].meta["val"].shape == (1, 4, 128)
    assert torch.equal(Interpreter(fixed).run(feeds)["logits"], want)
    assert format_graph(program) == before


@pytest.mark.parametrize("axis", ["batch", "sequence", "past_sequence", "total_sequence"])
def test_one_axis_constant_leaves_the_others(program, feeds, want, axis):
    fixed = specialise(program, **{axis: SIZES[axis]})
    check_invariants(fixed)
    assert set(fixed.dims) == set(SIZES) - {axis}
    shapes = {size for spec in fixed.inputs for size in spec.shape}
    shapes |= {size for state in fixed.states for size in (*state.input.shape, *state.output.shape)}
    assert axis not in shapes
    assert shapes >= set(SIZES) - {axis}
    assert torch.equal(Interpreter(fixed).run(feeds)["logits"], want)


def test_one_step_after_another_is_all_at_once(program):
    steps = specialise(specialise(specialise(program, sequence=4), batch=1), total_sequence=10)
    assert steps.dims == {}
    assert format_graph(steps) == format_graph(specialise(program, batch=1, sequence=4, past_sequence=6))


def test_an_empty_past(program, feeds):
    fixed = specialise(program, batch=1, sequence=4, past_sequence=0)
    values = {name: tensor[:, :, :0] if tensor.ndim == 4 else tensor for name, tensor in feeds.items()}
    values |= {"attention_mask": torch.ones(1, 4, dtype=torch.int64), "cache_position": torch.arange(4)}
    assert torch.equal(Interpreter(fixed).run(values)["logits"], Interpreter(program).run(values)["logits"])


def test_states_that_are_no_caches_keep_their_sizes(capture_of):
    """The first state is that of a convolution: it says nothing of the past."""
    program = capture_of("lfm2_moe")
    steps = specialise(specialise(program, past_sequence=6), batch=1, sequence=4)
    check_invariants(steps)
    assert [spec.shape for spec in steps.inputs][1] == (1, 10)
    shapes = {state.kind: (state.input.shape, state.output.shape) for state in steps.states}
    assert shapes["conv"] == ((1, 64, 3), (1, 64, 3))
    assert shapes["key"] == ((1, 2, 6, 16), (1, 2, 10, 16))
    assert dynamic(steps) == []


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 0}, "cannot have size 0"),
        ({"past_sequence": -1}, "cannot have size -1"),
        ({"sequence": 4, "past_sequence": 6, "total_sequence": 11}, "total_sequence 11 is not sequence 4"),
        ({"sequence": 4, "total_sequence": 3}, "past_sequence cannot have size -1"),
    ],
)
def test_impossible_sizes(program, sizes, message):
    with pytest.raises(UsageError, match=message):
        specialise(program, **sizes)


def test_an_axis_that_is_constant_already(program):
    with pytest.raises(UsageError, match="batch is constant already") as caught:
        specialise(specialise(program, batch=1), batch=2)
    assert "sequence" in caught.value.hint


def test_without_padding(program, feeds, want):
    bare = without_padding(program)
    check_invariants(bare)
    assert "attention_mask" not in [spec.name for spec in bare.inputs]
    assert all(node.args[6] is None for node in bare.nodes(torch.ops.moec.attention.default))
    assert torch.equal(Interpreter(bare).run(feeds)["logits"], want)
    assert without_padding(bare) is bare


def test_what_is_multiplied_by_the_mask_stays_as_it_is(capture_of):
    """Convolutions multiply their inputs by the mask, which is all ones where nothing is padding."""
    program = capture_of("lfm2_moe")
    bare = without_padding(program)
    check_invariants(bare)
    assert [spec.name for spec in bare.inputs] == ["input_ids", "position_ids", "cache_position"]
    assert len(bare.nodes(torch.ops.aten.mul.Tensor)) == len(program.nodes(torch.ops.aten.mul.Tensor)) - 2
    ids = torch.randint(3, program.vocab_size, (1, 9))
    positions = torch.arange(9)
    values = {"input_ids": ids, "position_ids": positions[None], "cache_position": positions}
    values |= empty_states(program, 1)
    whole = Interpreter(program).run({**values, "attention_mask": torch.ones(1, 9, dtype=torch.int64)})
    for name, found in Interpreter(bare).run(values).items():
        assert torch.equal(found, whole[name]), name


@pytest.mark.parametrize("factor", ["ids", "mask"])
def test_a_product_with_the_mask_that_changes_something_stops_it(program, factor):
    """Of another shape or dtype than its other factor, or the mask by itself: nothing is there to take its place."""
    graph = program.copy_graph()
    inputs = {node.target: node for node in graph.find_nodes(op="placeholder")}
    mask = inputs["attention_mask"]
    other = {"mask": mask, "ids": inputs["position_ids"]}[factor]
    with graph.inserting_before(next(iter(mask.users))):
        product = graph.call_function(torch.ops.aten.mul.Tensor, (mask, other))
        negative = graph.call_function(torch.ops.aten.neg.default, (product,))
    product.meta = {"val": mask.meta["val"], "module": "model.gate"}
    negative.meta = dict(product.meta)
    graph.call_function(torch.ops.aten.neg.default, (negative,))
    with pytest.raises(UnsupportedModelError, match=r"model.gate: %mul.* uses the attention mask"):
        without_padding(program.replace(graph=graph))


def test_a_size_that_is_read_from_the_mask_is_read_from_another_input(program):
    graph = program.copy_graph()
    inputs = {node.target: node for node in graph.find_nodes(op="placeholder")}
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    with graph.inserting_after(list(inputs.values())[-1]):
        batch = graph.call_function(torch.ops.aten.sym_size.int, (mask, 0))
    batch.meta = {"val": ids.meta["val"].shape[0]}  # the passes make it one symbol
    with graph.inserting_after(batch):
        shaped = graph.call_function(torch.ops.aten.view.default, (ids, [batch, -1]))
    shaped.meta = dict(ids.meta)
    bare = without_padding(program.replace(graph=graph))
    found = next(node for node in bare.graph.nodes if node.target is torch.ops.aten.view.default).args[1][0]
    assert found.args == (next(node for node in bare.graph.nodes if node.target == "input_ids"), 0)


def test_a_mask_that_something_else_reads_cannot_go(program):
    graph = program.copy_graph()
    mask = next(node for node in graph.nodes if node.target == "attention_mask")
    with graph.inserting_after(mask):
        total = graph.call_function(torch.ops.aten.sum.default, (mask,))
    with graph.inserting_after(total):
        graph.call_function(torch.ops.aten.neg.default, (total,))
    with pytest.raises(UnsupportedModelError, match="uses the attention mask"):
        without_padding(program.replace(graph=graph))


def test_inference_never_fixes_an_axis():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    dynamic_axis = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    node = fx.Graph().placeholder("x")
    node.meta["val"] = mode.from_tensor(torch.ones(3), symbolic_context=dynamic_axis)
    assert infer(torch.ops.aten.neg.default, (node,), {}, mode).shape == node.meta["val"].shape
    with pytest.raises(MoecError, match="fixes a dynamic axis"):
        infer(lambda tensor: int(tensor.shape[0]), (node,), {}, mode)
