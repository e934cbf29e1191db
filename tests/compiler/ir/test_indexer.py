"""The reference of `moec::indexer`, against a loop over the tokens."""

from __future__ import annotations

import pytest
import torch

from moec.compiler.ir.indexer import INDEXER


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("past", "length", "top_k"), [(0, 9, 4), (7, 3, 5), (7, 1, 1), (5, 4, 50)])
@pytest.mark.parametrize("padded", [False, True])
def test_the_visible_tokens_of_the_largest_scores(past: int, length: int, top_k: int, padded: bool) -> None:
    total = past + length
    query, key, weights = rand(2, length, 6, 8, seed=0), rand(2, 1, length, 8, seed=1), rand(2, length, 6, seed=2)
    cache = rand(2, 1, past, 8, seed=3)
    mask = torch.ones(2, total, dtype=torch.long)
    mask[1, : 2 if padded else 0] = 0
    position = torch.arange(past, total)
    got, present = INDEXER(query, key, weights, cache, position, mask if padded else None, 0.3, "causal", 0, top_k)
    keys = torch.cat([cache, key], 2)
    assert torch.equal(present, keys)
    for batch in range(2):
        for token in range(length):
            seen = [slot for slot in range(past + token + 1) if mask[batch, slot]]
            score = {
                slot: float((weights[batch, token] * (0.3 * query[batch, token] @ keys[batch, 0, slot]).relu()).sum())
                for slot in seen
            }
            want = sorted(score, key=lambda slot: -score[slot])[:top_k]
            assert sorted(want) == got[batch, token].nonzero().flatten().tolist()


def test_tokens_of_equal_score_are_taken_together() -> None:
    """Heads that are all below 0 give a score of 0; which of them a top-k takes differs from runtime to runtime."""
    query, key = torch.ones(1, 1, 1, 2), -torch.ones(1, 1, 1, 2)
    past = -torch.ones(1, 1, 4, 2)
    past[0, 0, 2] = 1.0
    selected, _ = INDEXER(query, key, torch.ones(1, 1, 1), past, torch.tensor([4]), None, 1.0, "causal", 0, 2)
    assert selected.all()
    selected, _ = INDEXER(query, key, torch.ones(1, 1, 1), past, torch.tensor([4]), None, 1.0, "causal", 0, 1)
    assert selected[0, 0].tolist() == [False, False, True, False, False]
