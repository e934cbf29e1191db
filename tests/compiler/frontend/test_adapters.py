"""Blocks that bypass the registries of transformers: captured by an adapter, and equal to what they replace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moec.compiler.families.tiny_models import tiny_model
from moec.compiler.frontend.adapters.base import ADAPTERS
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.source import load_source
from moec.compiler.ir.interpreter import Interpreter, ProgramRunner, empty_states
from moec.compiler.ir.program import EXPERTS, Program
from moec.passes.routing.dynamic_routing import DynamicRouting
from moec.passes.routing.policies.top_p import TopP

Checkpoints = Callable[[str], Path]
FAMILIES = {
    "dbrx": {"DbrxExperts"},
    "jetmoe": {"JetMoeMoE", "JetMoeAttention"},
    "llama4_text": {"Llama4TextMoe"},
    "longcat_flash": {"LongcatFlashExperts"},
    "Step-3.7-Flash": {"Step3p7Experts"},
}


def captured(directory: Path) -> tuple[Checkpoint, Program]:
    checkpoint = Checkpoint.open(directory)
    return checkpoint, capture(checkpoint)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_equal_transformers(family: str, tiny_checkpoint: Checkpoints) -> None:
    checkpoint, program = captured(tiny_checkpoint(family))
    ids = np.random.default_rng(0).integers(3, program.vocab_size, (2, 21))
    want, runner = load_source(checkpoint)(ids), ProgramRunner(program)
    got = [runner.prefill(ids[:, :13]), runner.decode(ids[:, 13:14]), runner.decode(ids[:, 14:])]
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=1e-5 * np.abs(want).max())
    assert len(program.layers) == len(program.nodes(EXPERTS)) > 0


BY_STRUCTURE = {"minimax": "MiniMaxLightningAttention", "zaya": "ZayaCCAProjection"}
"""Families whose blocks are found by what they hold; `test_scans` compares what they compute."""


def test_every_adapter_is_tested() -> None:
    assert {adapter.block for adapter in ADAPTERS if isinstance(adapter.block, str)} == set().union(*FAMILIES.values())
    others = [adapter for adapter in ADAPTERS if not isinstance(adapter.block, str)]
    found = {
        family: {type(part).__name__ for part in tiny_model(family).modules() for each in others if each.fits(part)}
        for family in (*BY_STRUCTURE, "qwen3_next", "mixtral")
    }
    assert found == {**{family: {name} for family, name in BY_STRUCTURE.items()}, "qwen3_next": set(), "mixtral": set()}
    assert len(others) == len(BY_STRUCTURE)


def test_jetmoe_keeps_one_key_for_all_slots(tiny_checkpoint: Checkpoints) -> None:
    """Transformers hands attention a copy of the keys for every slot; the cache has no use for them."""
    _, program = captured(tiny_checkpoint("jetmoe"))
    assert {state.input.shape for state in program.states} == {("batch", 2, "past_sequence", 16)}


def run_experts(program: Program, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Experts and weights that each MoE layer is given."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def observe(node: torch.fx.Node, args: tuple[torch.Tensor, ...], _: object) -> None:
        if node.target is EXPERTS:
            seen.append((args[1], args[2]))

    length = ids.shape[1]
    feeds = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(length)[None],
        "cache_position": torch.arange(length),
    }
    Interpreter(program, observer=observe).run({**feeds, **empty_states(program, 1)})
    return seen


def test_longcat_drops_the_slots_that_compute_nothing(tiny_checkpoint: Checkpoints) -> None:
    _, program = captured(tiny_checkpoint("longcat_flash"))
    ids = torch.randint(3, program.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    assert [layer.num_experts for layer in program.layers] == [8, 8]
    for indices, weights in run_experts(program, ids):
        assert int(indices.max()) < 8
        dropped = (weights == 0).float().mean()
        assert 0.1 < dropped < 0.6  # 4 of its 12 experts compute nothing


def test_a_policy_sees_the_computed_slots_of_longcat_alone(tiny_checkpoint: Checkpoints) -> None:
    _, program = captured(tiny_checkpoint("longcat_flash"))
    routed = DynamicRouting(TopP(mass=0.5), False).run(program).program
    ids = torch.randint(3, program.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    (_, before), (_, after) = run_experts(program, ids)[0], run_experts(routed, ids)[0]
    computed = before.sum(-1) > 0
    assert bool((after[~computed] == 0).all())
    # A token with one computed slot keeps it, whatever its share of the token is.
    assert bool((after[computed] > 0).any(-1).all())
    assert int((after > 0).sum()) < int((before > 0).sum())
