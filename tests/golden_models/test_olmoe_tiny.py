"""The golden model is what its records say, judged by Transformers alone."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from moec.golden_models import record, train

FILES = record.MODEL
CODE_AND_RECORDS_LIMIT = 40e6


@pytest.fixture(scope="module")
def model() -> Any:
    return record.load_model(FILES)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FILES / "tokenizer.json"))


def test_digests() -> None:
    assert (FILES / "SHA256SUMS").read_text() == record.digests(FILES)


def test_size_in_the_repository() -> None:
    files = [path for path in FILES.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < CODE_AND_RECORDS_LIMIT


def test_logits_and_greedy_tokens(model: Any, tokenizer: Tokenizer) -> None:
    golden = np.load(FILES / "golden_logits.npz")
    assert len(golden.files) == 3 * len(record.PROMPTS)
    for number, prompt in enumerate(record.PROMPTS):
        prompt_ids = golden[f"{number}.input_ids"]
        assert tokenizer.encode(prompt).ids == prompt_ids.tolist()
        greedy = golden[f"{number}.greedy"]
        with torch.no_grad():
            logits = model(torch.from_numpy(np.concatenate([prompt_ids, greedy]))[None]).logits[0]
        last = logits[len(prompt_ids) - record.LAST_POSITIONS : len(prompt_ids)]
        np.testing.assert_allclose(last, golden[f"{number}.logits"], rtol=0, atol=1e-4)
        assert logits[len(prompt_ids) - 1 : -1].argmax(-1).tolist() == greedy.tolist()


def test_perplexity_of_one_text(model: Any, tokenizer: Tokenizer) -> None:
    table = json.loads((FILES / "perplexities.json").read_text())["perplexity"]
    assert set(table) == {path.name for path in (FILES / "texts").glob("heldout_*.txt")}
    text = (FILES / "texts/heldout_python.txt").read_text()
    assert record.perplexity(model, tokenizer, text) == pytest.approx(table["heldout_python.txt"], rel=1e-6)


def test_all_experts_but_the_dead_one_are_used(model: Any, tokenizer: Tokenizer) -> None:
    # The calibration text has three sources, one after the other: read some of each.
    ids = torch.tensor(tokenizer.encode((FILES / "texts/calibration.txt").read_text()).ids)
    tokens = ids[: len(ids) // 6 * 6].reshape(6, -1)[:, :256]
    with torch.no_grad():
        routers = model(tokens, output_router_logits=True).router_logits
    unused = [sorted(set(range(16)) - set(layer.topk(4).indices.flatten().tolist())) for layer in routers]
    assert unused == [[], [], [10], []]


def test_training_text_loses_the_reserved_lines() -> None:
    reserved = train.reserved_lines()
    line = "Ge1:1 In the beginning God created the heaven and the earth."
    assert train.without_reserved(f"kept\n  {line} \n}}", reserved) == "kept\n}"


def test_r_strings_of_a_lazy_load_database(tmp_path: Path) -> None:
    import struct
    import zlib

    def vector(*strings: bytes) -> bytes:
        body = b"".join(struct.pack(">Ii", 0x40009, len(text)) + text for text in strings)
        return zlib.compress(b"X\n" + struct.pack(">Ii", 0x10, len(strings)) + body)

    database = tmp_path / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    database.parent.mkdir(parents=True)
    entries = [vector(b"It is a truth", b""), vector(b"Emma")]
    database.write_bytes(b"".join(struct.pack(">I", len(entry)) + entry for entry in entries))
    assert train.austen_novels(tmp_path) == "It is a truth\n\n\nEmma"


def test_schedule_warms_up_and_decays() -> None:
    assert train.learning_rate(0, 0.0) == pytest.approx(train.PEAK_LEARNING_RATE / train.WARMUP_STEPS)
    assert train.learning_rate(500, 0.0) == train.PEAK_LEARNING_RATE
    assert train.learning_rate(500, 1.0) == pytest.approx(0.03 * train.PEAK_LEARNING_RATE)


def test_a_training_step_learns_and_obeys_its_seed() -> None:
    tokens = torch.arange(4000) % 97

    def trained(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model = train.new_olmoe()
        assert train.train(model, tokens, steps=2, minutes=math.inf, seed=seed) == 2
        weight: torch.Tensor = model.lm_head.weight.detach()
        return weight

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))
