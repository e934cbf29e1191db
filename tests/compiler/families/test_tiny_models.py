import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.utils import logging

from moec.compiler.common.errors import UsageError
from moec.compiler.families.tiny_models import family_names, tiny_config, tiny_model, write_tiny_checkpoint
from moec.compiler.frontend.architecture import cache_argument

# Its router reads `[batch, sequence, 2 * keys]` as `[2, batch * sequence, keys]`: a token's experts depend on
# the other tokens, so Transformers' own decode disagrees with its own full pass.
MIXES_TOKENS = {"doge"}
# Its cache counts tokens in layer 0 alone, which keeps none where it is linear attention: positions start again at 0
# unless they are given, as `generate` does.
FORGETS_POSITIONS = {"minimax"}
TOKENS = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(1))


def step(model: Any, ids: torch.Tensor, encoded: Any, past: Any) -> Any:
    cache = {cache_argument(model): past}
    if encoded is None:
        return model(ids, use_cache=True, **cache)
    return model(encoder_outputs=encoded, decoder_input_ids=ids, **cache)


@torch.no_grad()
def full_and_cached_logits(model: Any, prefill: int) -> tuple[torch.Tensor, torch.Tensor]:
    encoded = model.get_encoder()(TOKENS) if model.config.is_encoder_decoder else None
    full = step(model, TOKENS, encoded, None).logits
    output = step(model, TOKENS[:, :prefill], encoded, None)
    parts = [output.logits]
    for position in range(prefill, TOKENS.shape[1]):
        output = step(model, TOKENS[:, position : position + 1], encoded, output[cache_argument(model)])
        parts.append(output.logits)
    return full, torch.cat(parts, dim=1)


@pytest.mark.parametrize("family", family_names())
def test_every_family_is_finite_and_alive(family: str) -> None:
    full, cached = full_and_cached_logits(tiny_model(family), prefill=25)
    assert full.isfinite().all()
    assert 0.3 < full.std() < 8
    # Different tokens give different logits: nothing collapsed.
    assert (full[0] - full[1]).abs().max() > 0.5
    assert family in MIXES_TOKENS | FORGETS_POSITIONS or (full - cached).abs().max() < 1e-4


@pytest.mark.parametrize("family", family_names())
def test_checkpoint_loads_as_the_model_it_was_made_of(family: str, tmp_path: Path) -> None:
    assert write_tiny_checkpoint(family, tmp_path, seed=3) == tmp_path
    config = AutoConfig.from_pretrained(tmp_path)
    auto_class: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    loaded = auto_class.from_pretrained(tmp_path, attn_implementation="eager", dtype="float32")
    made = tiny_model(family, seed=3).state_dict()
    assert made.keys() == loaded.state_dict().keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in loaded.state_dict().items())


def test_seed_decides_every_weight() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, again, other = (tiny_model("gpt_oss", seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_no_weight_is_degenerate() -> None:
    for family in ("gpt_oss", "deepseek_v3", "gemma4_text", "phimoe"):
        weights = tiny_model(family).state_dict()
        constant = [name for name, w in weights.items() if w.numel() > 1 and w.float().std() < 0.05]
        assert constant == [], family
    assert tiny_model("deepseek_v3").state_dict()["model.layers.1.mlp.gate.e_score_correction_bias"].std() > 0.05


def test_routing_is_decided() -> None:
    chosen: list[torch.Tensor] = []
    model: Any = tiny_model("olmoe")
    with torch.no_grad():
        logits = model(TOKENS, output_router_logits=True).router_logits
    for layer in logits:
        ranked = layer.sort(dim=-1, descending=True)
        assert layer.std() > 1.0
        assert (ranked.values[:, 1] - ranked.values[:, 2]).min() > 1e-3
        chosen.append(ranked.indices[:, :2].unique())
    assert all(len(experts) == 8 for experts in chosen)


def test_released_tensor_names_and_dtype(tmp_path: Path) -> None:
    write_tiny_checkpoint("mixtral", tmp_path, dtype="bfloat16")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "model.layers.0.block_sparse_moe.experts.7.w1.weight" in set(file.keys())
        assert all(file.get_slice(name).get_dtype() == "BF16" for name in file.keys())  # noqa: SIM118
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_overrides_replace_and_leave_the_table_alone() -> None:
    assert tiny_config("gemma4_text", num_experts=16).num_experts == 16
    tiny_config("dbrx").ffn_config.moe_num_experts = 5
    assert tiny_config("gemma4_text").num_experts == 8
    assert tiny_config("dbrx").ffn_config.moe_num_experts == 8


def test_the_traits_that_parity_needs_are_there() -> None:
    configs = {family: tiny_config(family) for family in family_names()}
    windows = {name for name, c in configs.items() if 0 < (getattr(c, "sliding_window", 0) or 0) <= 16}
    assert windows >= {"phimoe", "gpt_oss", "mimo_v2_flash", "gemma4_text", "cohere2_moe", "afmoe", "laguna"}
    assert configs["llama4_text"].attention_chunk_size == 16
    grouped = {name for name, c in configs.items() if c.to_dict().get("num_key_value_heads") == 2}
    assert len(grouped) > 25
    assert all(getattr(c, "max_position_embeddings", 512) >= 512 for c in configs.values())


@pytest.mark.parametrize("dtype", ["int8", "float31", "nn"])
def test_unknown_dtype(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=dtype):
        write_tiny_checkpoint("olmoe", tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no_such_family") as caught:
        tiny_config("no_such_family")
    assert "olmoe" in caught.value.hint


def test_writing_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = logging.is_progress_bar_enabled()
    write_tiny_checkpoint("olmoe", tmp_path)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled() == shown
