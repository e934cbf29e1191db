"""Sequences that join and leave a batch between two steps compute what each computes alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from moec.compiler.families.tiny_models import write_tiny_checkpoint
from moec.compiler.ir.interpreter import ProgramRunner
from moec.targets.runners import Row, can_batch, limits_of

MODELS = {
    "attention with sinks and a window": ("gpt_oss", "default"),
    "standard ops": ("olmoe", "portable"),
    "caches in place": ("olmoe", "genai"),
    "a convolution": ("lfm2_moe", "default"),
    "a scan, caches in place": ("qwen3_next", "genai"),
    "keys of an indexer": ("deepseek_v32", "default"),
}
PROMPTS = (9, 4, 300)
"""Tokens of the prompts; the last is longer than the first capacity of a buffer."""


class Sequences:
    """Random sequences, their logits when each is computed alone, and how many tokens of each were fed."""

    def __init__(self, model: Any, length: int) -> None:
        self.ids = np.random.default_rng(1).integers(3, model.program.vocab_size, (len(PROMPTS), length))
        runner = ProgramRunner(model.program)
        self.want = [runner.prefill(row[None])[0] for row in self.ids]
        self.fed = list(PROMPTS)

    def step(self, rows: dict[int, Row]) -> None:
        """Feed one token to each of `rows`, which are all rows of one runner, and compare the logits."""
        slots = 1 + max(self.fed[which] for which in rows)
        mask = np.ones((len(rows), slots), np.int64)
        for row in rows.values():
            mask[row.index, : row.padding] = 0
        tokens = np.array([[self.ids[which][self.fed[which]]] for which in rows])
        logits = next(iter(rows.values())).runner.decode(tokens, mask)
        for which, row in rows.items():
            want = self.want[which][self.fed[which]]
            np.testing.assert_allclose(logits[row.index, -1], want, atol=2e-5 * np.abs(want).max())
            self.fed[which] += 1


@pytest.mark.parametrize("model", MODELS)
def test_join_and_leave(model: str, tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    family, flavor = MODELS[model]
    made = lower_checkpoint(tiny_checkpoint(family), flavor=flavor)
    assert can_batch(made.runner)
    sequences, batch = Sequences(made, PROMPTS[-1] + 12), made.runner.fork()
    rows = {}
    for which, length in enumerate(PROMPTS):
        runner = made.runner.fork()
        runner.prefill(sequences.ids[which : which + 1, :length])
        rows[which] = Row(runner)
    members: dict[int, Row] = {}
    for now in ((0, 1), (0, 1), (1, 0, 2), (2, 1), (1,), (1,)):
        if tuple(members) != now:
            members = dict(zip(now, batch.gather([members.get(which, rows[which]) for which in now]), strict=True))
        sequences.step(members)
    assert sequences.fed == [9 + 3, 4 + 6, 300 + 2]
    assert members[1].padding == 0  # the longer ones have left, and their slots with them


def test_the_file_says_beyond_which_length_sequences_must_not_share_a_batch(
    tmp_path: Any, lower_checkpoint: Any
) -> None:
    directory = write_tiny_checkpoint("qwen3_moe", tmp_path / "dynamic")
    config = json.loads((directory / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 10000.0, "max_position_embeddings": 24}
    (directory / "config.json").write_text(json.dumps({**config, **scaling}))
    assert limits_of(lower_checkpoint(directory).runner).max_shared_length == 24


@pytest.mark.parametrize(("family", "length"), [("olmoe", None), ("qwen3_next", None), ("llama4_text", 0)])
def test_padding_counts_for_some_models(
    family: str, length: int | None, tiny_checkpoint: Any, lower_checkpoint: Any
) -> None:
    """The attention temperature of Llama 4 depends on the number of slots before a token, padding included."""
    runner = lower_checkpoint(tiny_checkpoint(family)).runner
    assert limits_of(runner).max_shared_length == length
    assert can_batch(runner) == (length is None)
