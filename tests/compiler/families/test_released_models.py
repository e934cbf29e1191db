"""Released models: config.json as published, exported and proven. A third in every run, the rest marked slow."""

import json
from pathlib import Path
from typing import Any

import pytest

from moec.compiler.common.errors import MoecError, UnsupportedModelError, UsageError
from moec.compiler.families import released_page
from moec.compiler.families.families_page import IN_PART, NO, YES
from moec.compiler.families.released_models import released_config, released_names, write_released_checkpoint
from moec.compiler.frontend.architecture import ALIASES, is_native, notes, read_config
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.measure.summary import model_summary
from moec.compiler.pipeline.captures import Captures
from moec.compiler.pipeline.stages import silent

UNKNOWN = {"DeepSeek-MoE-16B", "Ling-mini-2.0", "MiniMax-M1", "SmallThinker-21BA3B"}
"""transformers has no class for them."""
NO_INT4 = {
    "Kimi-Linear-48B-A3B": {"tensorrt"},  # a width of 16, which no block divides; 128 as published
}
"""Released models of which a target refuses the int4 form."""
AT_THE_LIMIT = "Qwen3.5-35B-A3B"
"""With top-p one of 655 positions is off by 1.1e-4 (limit 1e-4, median 8e-7): short keys, brought to unit length."""
COMPRESSED_CACHE = {"DeepSeek-V4-Flash"}
"""Its cache merges tokens, which moec does not know."""
WORKING = [name for name in released_names() if name not in UNKNOWN | COMPRESSED_CACHE]
ALWAYS = {
    *("Aria", "ERNIE-4.5-21B-A3B-PT", "GLM-4.5V", "Hunyuan-A13B-github", "Kimi-K2-Instruct", "LFM2-8B-A1B"),
    *("Llama-4-Scout", "MiMo-V2-Flash", "Mixtral-8x7B-v0.1", "Phi-3.5-MoE", "Qwen1.5-MoE-A2.7B", "Qwen3-VL-30B-A3B"),
    *("dbrx-instruct", "gemma-4-26B-A4B", "gpt-oss-20b", "granite-3.1-1b-a400m", "granite-4.0-h-tiny", "jetmoe-8b"),
    *("Kimi-Linear-48B-A3B", "Qwen3.5-35B-A3B", "DeepSeek-V3.2"),
}


def rows(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", rows(WORKING))
def test_every_gate_passes_on_onnx(name: str) -> None:
    (cell,) = released_page.check([name], ["onnx"], forms=["static"], progress=silent)
    assert cell.found == YES, cell.reason


@pytest.mark.parametrize("target", ["tflite", "coreml", "tensorrt"])
def test_sparse_attention_on_the_other_targets(target: str) -> None:
    (cell,) = released_page.check(["DeepSeek-V3.2"], [target], forms=["top-p"], progress=silent)
    assert cell.found in (YES, IN_PART), cell.reason


@pytest.mark.parametrize("name", ["gemma-4-26B-A4B", "Nemotron-3-Nano-30B-A3B"])
def test_int4_experts_that_no_kernel_for_experts_takes(name: str) -> None:
    """Gated GELU and squared ReLU on ONNX."""
    (cell,) = released_page.check([name], ["onnx"], forms=["top-p int4"], progress=silent)
    assert cell.found == YES, cell.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKING)
def test_every_form_of_every_target(name: str) -> None:
    cells = released_page.check([name], released_page.TARGETS, progress=silent)
    assert len(cells) == len(released_page.TARGETS) * len(released_page.FORMS)
    refused = [cell for cell in cells if cell.found == NO and "cannot build this model" in cell.reason]
    off = [cell for cell in cells if cell.found == NO and cell not in refused]
    assert not off or name == AT_THE_LIMIT, off
    assert {cell.target for cell in refused if "int4" in cell.form} == NO_INT4.get(name, set())
    assert len(refused) == 2 * len(NO_INT4.get(name, set()))


def test_the_lists_are_those_of_the_data_file() -> None:
    names = set(released_names())
    assert names >= UNKNOWN | COMPRESSED_CACHE | ALWAYS
    assert {name for name in names if not is_native(released_config(name))} == UNKNOWN
    assert 3 * len(ALWAYS) <= len(names) + 2


@pytest.mark.parametrize("name", sorted(UNKNOWN))
def test_what_transformers_does_not_know_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="transformers has no model of type") as caught:
        write_released_checkpoint(name, tmp_path)
    assert caught.value.exit_code == 3
    assert "--trust-remote-code" in caught.value.hint


def test_only_sizes_are_reduced() -> None:
    for name in released_names():
        published, reduced = released_page_entries(name)
        for path, value in reduced.items():
            old = published.get(path)
            assert old is None or not isinstance(old, bool | str) or isinstance(value, list | int), (name, path)
            assert not isinstance(value, bool | str), (name, path)


def released_page_entries(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from moec.compiler.families.released_models import _released

    entry = _released()[name]
    return dict(leaves(entry["config"])), {
        path: value
        for path, value in leaves(entry["reduced"])
        if not path.endswith(("rope_type", "layer_types"))
        if path.rpartition(".")[2] not in {"mlp_layer_types", "is_moe_layer", "hybrid_override_pattern"}
    }


def leaves(value: Any, path: str = "") -> Any:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    else:
        yield path, value


def test_aliases_of_architectures_are_read_as_what_they_equal(tmp_path: Path) -> None:
    for name, alias in ALIASES.items():
        assert not is_native({"model_type": f"{name}_"})
        assert is_native({"model_type": name})
        assert is_native({"model_type": alias.known_as})
    checkpoint = Checkpoint.open(write_released_checkpoint("Kimi-K2-Instruct", tmp_path))
    assert checkpoint.config.model_type == "deepseek_v3"
    assert checkpoint.notes == (
        "config.json names code of its own (auto_map); it is not run, since transformers has the model",
        "model_type kimi_k2 is read as deepseek_v3, which it equals",
    )


def test_a_key_has_the_name_that_transformers_gives_it(tmp_path: Path) -> None:
    raw = {"model_type": "hunyuan", "attention_head_dim": 24}
    assert read_config(tmp_path, raw, trust_remote_code=False).head_dim == 24
    both = read_config(tmp_path, {**raw, "head_dim": 40}, trust_remote_code=False)
    assert both.head_dim == 40


def test_a_model_type_that_is_no_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no model of type \['olmoe'\]"):
        read_config(tmp_path, {"model_type": ["olmoe"]}, trust_remote_code=False)
    assert not notes({"model_type": ["olmoe"]})


def test_what_belongs_to_the_vision_tower_is_left_out(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_released_checkpoint("Qwen3-VL-30B-A3B", tmp_path))
    summary = model_summary(capture(checkpoint))
    visual = sum(name.startswith("model.visual.") for name in checkpoint.entries)
    assert summary["left_out"] == {"model.visual": visual}
    assert visual > 10


@pytest.mark.parametrize(
    "changes",
    [
        {"output_router_logits": True},
        {"output_hidden_states": True, "output_attentions": True},
        {"return_dict": False, "use_cache": False, "torchscript": True},
        {"_attn_implementation": "flash_attention_2", "attn_implementation": "flash_attention_2"},
        {"experts_implementation": "grouped_mm", "_experts_implementation": "grouped_mm", "pruned_heads": {}},
    ],
)
def test_what_training_left_in_a_config_changes_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    directory = write_released_checkpoint("Mixtral-8x7B-v0.1", tmp_path / "checkpoint")
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, **changes}))
    from moec.compiler.common.verdict import Status
    from moec.compiler.gates.cases import Prompts
    from moec.compiler.gates.parity import ParityOptions, check_capture

    checkpoint = Checkpoint.open(directory)
    program = capture(checkpoint)
    verdict = check_capture(checkpoint, program, Prompts(program.vocab_size), ParityOptions())
    assert verdict.status is Status.PASS


def test_code_of_the_checkpoint_runs_only_if_it_is_trusted(tmp_path: Path) -> None:
    """A class of its own that transformers does not know, in a checkpoint that is Mixtral but for its name."""
    directory = write_released_checkpoint("Mixtral-8x7B-v0.1", tmp_path / "checkpoint")
    raw = json.loads((directory / "config.json").read_text())
    named = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    (directory / "config.json").write_text(json.dumps({**raw, "model_type": "mine", "auto_map": named}))
    (directory / "mine.py").write_text(
        "from transformers import MixtralConfig, MixtralForCausalLM\n"
        "open(__import__('pathlib').Path(__import__('os').environ['RAN']), 'w').close()\n"
        "class MineConfig(MixtralConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(MixtralForCausalLM):\n    config_class = MineConfig\n"
    )
    ran = tmp_path / "ran"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAN", str(ran))
        with pytest.raises(UnsupportedModelError, match="code of its own"):
            capture(Checkpoint.open(directory))
        assert not ran.exists()
        checkpoint = Checkpoint.open(directory, trust_remote_code=True)
        assert type(checkpoint.config).__name__ == "MineConfig"
        assert ran.exists()
        assert "mine.py" in checkpoint.digests


def test_rows_are_kept_and_not_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def build(fields: dict[str, Any], output: Path, captures: Captures) -> tuple[str, str]:  # noqa: ARG001
        built.append(fields["target"])
        return (YES, "") if fields["target"] == "onnx" else (NO, "it is | too " + "long " * 100)

    monkeypatch.setattr(released_page, "build", build)
    kept = tmp_path / "rows.jsonl"
    for _ in range(2):
        cells = released_page.check(
            ["Mixtral-8x7B-v0.1", "SmallThinker-21BA3B"], ["onnx", "tflite"], resume=kept, progress=silent
        )
    assert built == ["onnx"] * 4 + ["tflite"] * 4
    page = released_page.markdown(cells, "moec families --released")
    assert "| Mixtral-8x7B-v0.1 | onnx | yes | yes | yes | yes |  |" in page
    assert "1 of 4 rows work in every form." in page
    rows, _, notes = page.partition("## Notes")
    assert "| SmallThinker-21BA3B | onnx | no | no | no | no | static, top-p, static int4, top-p int4: [2] |" in rows
    assert "1. it is | too long" in notes
    assert "2. transformers has no model of type" in notes
    assert max(map(len, rows.splitlines())) < 160
    kept.write_text("no rows")
    with pytest.raises(UsageError, match="not a file of results of released models"):
        released_page.check([], [], resume=kept, progress=silent)


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="unknown released model"):
        released_page.choose(["Mixtral"])
    with pytest.raises(MoecError, match="unknown released model"):
        released_config("Mixtral")
