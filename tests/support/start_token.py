"""A tokenizer that puts the token 0 before every text, as that of Llama does with its own."""

from __future__ import annotations

import json
from pathlib import Path


def add_start_token(path: Path) -> None:
    """Change the tokenizer.json of the golden model, whose token 0 is `<|endoftext|>`."""
    described = json.loads(path.read_text())
    assert described["post_processor"] is None or "SpecialToken" not in str(described["post_processor"])
    start = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    path.write_text(json.dumps(described))
