"""What moec reads from config.json."""

from __future__ import annotations

from typing import Any

import pytest

from moec.compiler.common.model_config import layer_count
from moec.compiler.families.tiny_models import family_names, tiny_config


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"num_hidden_layers": 3, "layer_types": ["a", "b"]}, 3),
        ({"text_config": {"num_layers": 2}, "num_hidden_layers": 9}, 2),
        ({"layers_block_type": ["mamba", "moe", "attention"]}, 3),
        ({"hybrid_override_pattern": "MEM*"}, 4),
        ({"num_hidden_layers": None}, 0),
    ],
)
def test_layer_count(config: dict[str, Any], count: int) -> None:
    assert layer_count(config) == count


def test_every_family_states_its_layers() -> None:
    """The number is in moec.json, and no artifact without it can be opened; NLLB has an encoder and is refused."""
    assert [name for name in family_names() if layer_count(tiny_config(name).to_dict()) < 1] == ["nllb_moe"]
