"""Record what `olmoe-tiny` must give: golden logits, greedy tokens, perplexities and digests of its files.

    python golden_models/record.py

All figures come from Transformers alone: eager attention and experts, float32, CPU. Nothing of moec is used,
so the records can judge it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

MODEL = Path(__file__).resolve().parent / "olmoe-tiny"
PROMPTS = (
    "The list of arguments is",
    "def main():\n    ",
    "It is a truth universally acknowledged, that",
    "In the beginning God created the heaven and the earth. And the earth was without form, and void;",
)
LAST_POSITIONS = 4
GREEDY_TOKENS = 64
WINDOWS = 48
WINDOW = 256
RECORDS = ("golden_logits.npz", "perplexities.json", "SHA256SUMS")


def load_model(directory: Path) -> Any:
    """Transformers' model in float32 with eager attention and experts."""
    # `from_pretrained` leaves the model in evaluation mode.
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    model.set_experts_implementation("eager")
    model.requires_grad_(False)
    return model


@torch.no_grad()
def golden_logits(model: Any, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Logits and greedy tokens of every prompt.

    Returns:
        For prompt N of T tokens `N.input_ids` int64 [T], `N.logits` float32 [4, vocabulary] of the last
        positions, and `N.greedy` int64 [64], the tokens that follow.
    """
    arrays: dict[str, np.ndarray] = {}
    for number, prompt in enumerate(PROMPTS):
        input_ids = torch.tensor([tokenizer.encode(prompt).ids])
        arrays[f"{number}.input_ids"] = input_ids[0].numpy()
        arrays[f"{number}.logits"] = model(input_ids).logits[0, -LAST_POSITIONS:].numpy()
        tokens = input_ids
        for _ in range(GREEDY_TOKENS):
            # The whole sequence again each time: no cache that could hide an error.
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
        arrays[f"{number}.greedy"] = tokens[0, input_ids.shape[1] :].numpy()
    return arrays


@torch.no_grad()
def perplexity(model: Any, tokenizer: Tokenizer, text: str) -> float:
    """Perplexity of the first `WINDOWS` windows of `WINDOW` tokens, each read on its own: 255 predictions each."""
    tokens = torch.tensor(tokenizer.encode(text).ids[: WINDOWS * WINDOW]).reshape(WINDOWS, WINDOW)
    losses = []
    for window in torch.split(tokens, 8):
        scores = model(window).logits[:, :-1].double().log_softmax(-1)
        losses.append(-scores.gather(-1, window[:, 1:, None]).sum().item())
    return math.exp(math.fsum(losses) / (WINDOWS * (WINDOW - 1)))


def digests(directory: Path) -> str:
    """`sha256sum` lines of every file below `directory` but the list itself."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(directory)}" for path in files)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="directory of the checkpoint")
    directory = parser.parse_args().model
    torch.set_num_threads(1)
    model, tokenizer = load_model(directory), Tokenizer.from_file(str(directory / "tokenizer.json"))
    arrays: dict[str, Any] = golden_logits(model, tokenizer)
    np.savez_compressed(directory / "golden_logits.npz", **arrays)
    texts = sorted((MODEL / "texts").glob("heldout_*.txt"))
    table = {text.name: perplexity(model, tokenizer, text.read_text()) for text in texts}
    record = {"windows": WINDOWS, "window": WINDOW, "dtype": "float32", "perplexity": table}
    (directory / "perplexities.json").write_text(json.dumps(record, indent=2) + "\n")
    (directory / "SHA256SUMS").write_text(digests(directory))
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
