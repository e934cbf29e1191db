"""Sparse attention with an indexer: what is captured of it, against transformers, whole, in pieces and with padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as deepseek

from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.frontend.indexers import IndexedKeys, IndexerScores
from moec.compiler.frontend.masks import InvertedMask, Mask
from moec.compiler.frontend.recording import Recording
from moec.compiler.gates.source import load_source
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.operands import Attention, Indexer
from moec.compiler.ir.program import ATTENTION, INDEXER

INDEXERS = {"deepseek_v32": 3, "glm_moe_dsa": 2, "axk2": 3, "hy_v4": 2}
"""Family -> its indexers in three layers; the last layer of two families shares the one before."""


@pytest.fixture
def opened(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Checkpoint]:
    return lambda family: Checkpoint.open(tiny_checkpoint(family))


def close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, atol=3e-5 * np.abs(want).max())


@pytest.mark.parametrize("family", INDEXERS)
def test_every_division_into_steps_is_one_pass_of_transformers(family: str, opened: Any, capture_of: Any) -> None:
    program = capture_of(family)
    indexers = [Indexer.of(node) for node in program.nodes(INDEXER)]
    assert len(indexers) == INDEXERS[family]
    assert {own.top_k for own in indexers} == {16}
    ids, runner = np.random.default_rng(0).integers(3, program.vocab_size, (2, 80)), ProgramRunner(program)
    want = load_source(opened(family))(ids)
    for steps in ((80,), (1, 1, 2, 76), (33, 1, 46)):
        start, got = 0, []
        for step in steps:
            got.append((runner.decode if start else runner.prefill)(ids[:, start : start + step]))
            start += step
        close(np.concatenate(got, axis=1), want)


def test_padding_is_never_selected(opened: Any, capture_of: Any) -> None:
    program = capture_of("deepseek_v32")
    ids = np.random.default_rng(1).integers(3, program.vocab_size, (2, 40))
    mask = (np.arange(40)[None] >= np.array([[0], [7]])).astype(np.int64)
    got = ProgramRunner(program).prefill(ids * mask, mask)
    close(got[1, 7:], load_source(opened("deepseek_v32"))(ids[1:, 7:])[0])


def test_layers_that_share_an_indexer_have_one_state(capture_of: Any) -> None:
    program = capture_of("glm_moe_dsa")
    found = {state.layer: state for state in program.states if state.kind == "index_key"}
    assert sorted(found) == [0, 1]
    assert (found[1].input.name, found[1].output.name) == ("past_key_values.1.index_key", "present.1.index_key")
    assert found[1].input.shape == ("batch", 1, "past_sequence", 28)
    selected = [Attention.of(node).selected for node in program.nodes(ATTENTION)]
    assert selected[0] is not selected[1]
    assert selected[1] is selected[2]


def test_without_the_selection_the_logits_differ(opened: Any, capture_of: Any) -> None:
    program = capture_of("deepseek_v32")
    graph = program.copy_graph()
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        node.args = (*node.args[:12], None)
    ids = np.random.default_rng(0).integers(3, program.vocab_size, (1, 40))
    got, want = ProgramRunner(program.replace(graph=graph)).prefill(ids), load_source(opened("deepseek_v32"))(ids)
    close(got[:, :16], want[:, :16])
    assert np.abs(got - want)[:, 16:].max() > 0.1


def test_an_indexer_of_another_form_is_refused(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepseek, "F", SimpleNamespace(**{**vars(F), "relu": F.silu}))
    with pytest.raises(UnsupportedModelError, match=r"its indexer scores tokens in a way that .* \(silu\)") as refused:
        capture(opened("deepseek_v32"))
    assert "indexer" in str(refused.value)
    assert refused.value.exit_code == 3


KEYS = IndexedKeys(Recording(64, {}), 0, torch.zeros(1, 4, 8))
TURNED = KEYS.transpose(-1, -2).float().unsqueeze(1)
SCORES = torch.matmul(torch.zeros(1, 4, 3, 8), TURNED)
HIDDEN = InvertedMask(Mask(lambda *_: None, 64))  # type: ignore[arg-type,return-value]


def of_heads() -> IndexerScores:
    scores: IndexerScores = torch.matmul(torch.zeros(1, 4, 1, 3), F.relu(SCORES * 0.5))  # type: ignore[arg-type]
    return scores


@pytest.mark.parametrize(
    "deed",
    [
        lambda: KEYS.transpose(0, 1),
        lambda: KEYS.unsqueeze(1),
        lambda: KEYS + 1,
        lambda: torch.matmul(TURNED, torch.zeros(8, 3)),
        lambda: torch.matmul(torch.zeros(1, 4, 3, 8), KEYS),
        lambda: SCORES * -1.0,
        lambda: torch.sigmoid(SCORES),
        lambda: torch.matmul(torch.zeros(1, 4, 1, 3), SCORES),
        lambda: of_heads() * 2.0,
        lambda: of_heads().masked_fill(HIDDEN, -torch.inf),
        lambda: of_heads().squeeze(-2).masked_fill(HIDDEN, -1.0),
        lambda: of_heads().squeeze(-2).topk(3),
        lambda: of_heads().squeeze(-2).masked_fill(HIDDEN, -torch.inf).topk(3, dim=0),
        lambda: of_heads().squeeze(-2).masked_fill(HIDDEN, -torch.inf).topk(3).indices.to(torch.float32),
    ],
)
def test_any_other_operation_is_refused(deed: Any) -> None:
    with pytest.raises((UnsupportedModelError, TypeError)):
        deed()


def test_the_operations_of_transformers_are_known() -> None:
    selected = of_heads().squeeze(-2).masked_fill(HIDDEN, -torch.inf).topk(3, dim=-1).indices.to(torch.int32)
    assert selected.mask is None


def test_keys_in_float32_are_kept_in_the_dtype_of_the_graph(opened: Any) -> None:
    """dots3 in float16 computes them in float32."""
    checkpoint = opened("dots3_note_text")
    program = capture(checkpoint, dtype=torch.float16)
    (state,) = [state for state in program.states if state.kind == "index_key"][:1]
    assert state.output.dtype is torch.float16
    ids = np.random.default_rng(3).integers(3, program.vocab_size, (1, 24))
    got, want = ProgramRunner(program).prefill(ids), load_source(checkpoint)(ids)
    assert np.median(np.abs(got - want).max(-1)) < 1e-2 * np.abs(want).max()
