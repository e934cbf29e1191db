"""The summary of an artifact: what is known, what was not measured, and the same on every rebuild."""

import json
from typing import Any

import pytest

from moec.compiler.report import summary
from moec.targets import get_target, target_names

MANIFEST: dict[str, Any] = {
    "source": {"bytes": 4_000_000},
    "model": {
        "architectures": ["OlmoeForCausalLM"],
        "moe_layers": [{"num_experts": 12}, {"num_experts": 10}],
        "source": {"moe_layers": [{"num_experts": 16}, {"num_experts": 16}]},
        "notes": ["read as it is"],
    },
    "recipe": {"target": "onnx", "dtype": "fp16"},
    "routing": {
        "policy": "top-p",
        "accounting": {"phases": {"prefill": {"executed_flops_share": 0.9}, "decode": {"executed_flops_share": 0.75}}},
    },
    "quantization": {
        "classes": {
            "router": {"formats": {"none": 2}},
            "experts_down": {"formats": {"int4:32": 2}},
            "attention": {"formats": {"int4:32": 8}},
        }
    },
    "model_files": ["model.onnx", "model.onnx_data"],
    "tools": {"moec": "0.1"},
}
SIZES = {"model.onnx": 100_000, "model.onnx_data": 900_000, "config.json": 700}
INTERVAL = {"value": 0.004, "low": 0.003, "high": 0.005}
MEASURED = (
    {"gate": "quality", "figures": {"increase": 0.0123}},
    {"gate": "latency", "figures": {"workloads": {
        "prefill128": {"candidate": {"wall": {"p50": INTERVAL}}},
        "decode128": {"candidate": {"wall": {"p50": INTERVAL}}, "baseline": {"wall": {"p50": {"value": 1}}}},
    }}},
)  # fmt: skip


def test_every_figure_is_that_of_the_artifact() -> None:
    found = summary.summarise(MANIFEST, SIZES, MEASURED, directory="my out", checkpoint="a/b")
    assert dict(summary.summary_rows(found)) == {
        "made": "OlmoeForCausalLM -> onnx fp16",
        "formats": "fp16: router; int4:32: attention, experts_down",
        "routing": "top-p; expert FLOPs executed: decode 75.0%, prefill 90.0%",
        "experts left": "22 of 32",
        "model files": "1.00 MB, 0.25 times the checkpoint's 4.00 MB",
        "perplexity": "+1.23% against the source model",
        "tokens per second": "250 (decode128)",
    }
    assert found["ratio"] == 0.25
    assert found["tokens_per_second"] == {"decode128": 250.0}
    commands = summary.command_lines(found)
    assert commands[0].startswith("moec chat 'my out'  ")
    assert commands[2].startswith("moec validate 'my out' --against a/b  # ")
    assert len({line.index("#") for line in commands}) == 1


def test_what_was_not_measured_or_is_not_known_is_said() -> None:
    rows = dict(summary.summary_rows(summary.summarise({}, {})))
    assert rows["perplexity"] == rows["tokens per second"] == "not measured"
    assert rows["model files"] == "0 bytes"
    assert rows["routing"] == "as the model was trained"
    plain = summary.summarise({**MANIFEST, "quantization": {}, "source": {}}, SIZES)
    assert dict(summary.summary_rows(plain))["formats"] == "fp16, nothing is quantized"
    assert plain["ratio"] is None


def test_the_order_of_keys_does_not_matter_and_readme_has_no_measurement() -> None:
    """moec.json is read back with sorted keys, so that `moec inspect` must not depend on their order."""
    again = json.loads(json.dumps(MANIFEST, sort_keys=True))
    assert summary.summarise(again, SIZES) == summary.summarise(MANIFEST, SIZES)
    files = {name: SIZES[name] for name in MANIFEST["model_files"]}
    text = summary.readme(MANIFEST, files)
    assert text == summary.readme(again, dict(reversed(files.items())))
    assert text.startswith("# OlmoeForCausalLM for onnx\n")
    for part in (
        "| experts left | 22 of 32 |",
        "| note | read as it is |",
        "moec chat .  ",
        "model.onnx_data | 900.00 kB",
    ):
        assert part in text
    assert "perplexity" not in text
    assert "per second" not in text


@pytest.mark.parametrize("name", ["coreml", "onnx", "tensorrt", "tflite"])
def test_every_target_has_three_commands_for_an_artifact_of_its_own(name: str) -> None:
    assert name in target_names()
    steps = summary.summarise({"recipe": {"target": name}}, {}, directory="out")["next"]
    assert [step["command"] for step in steps] == [
        step.command.format(directory="out", checkpoint="CHECKPOINT") for step in get_target(name).next_steps
    ]
    assert len({step["command"] for step in steps}) == 3
    assert all("out" in step["command"] or step["command"] == "moec doctor" for step in steps)


def test_an_artifact_of_a_target_that_is_not_installed_has_commands_too() -> None:
    assert len(summary.summarise({"recipe": {"target": "elsewhere"}}, {})["next"]) == 3
