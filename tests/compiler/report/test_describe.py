"""Rows for people: what was built, and what it was built from where that is something else."""

from typing import Any

from moec.compiler.report.describe import describe_built


def layers(count: int, experts: int, top_k: int) -> list[dict[str, Any]]:
    return [{"module": f"l{n}", "num_experts": experts, "top_k": top_k, "intermediate_size": 128} for n in range(count)]


STATES = {"count": 8, "kinds": ["key", "value"], "bytes_per_token": 8192, "bytes_fixed": 0}
MODEL = {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "layers": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "parameters": {"total": 5_000_000, "active": 4_000_000},
    "moe_layers": layers(4, 8, 4),
    "states": STATES,
    "source": {"parameters": {"total": 9_457_920, "active": 4_739_328}, "moe_layers": layers(4, 16, 4)},
}


def test_a_pruned_routed_and_quantized_artifact_is_described_as_it_is() -> None:
    found = {
        "model": MODEL,
        "recipe": {"target": "onnx", "dtype": "fp32", "options": {"flavor": "genai"}},
        "routing": {
            "policy": "top-p",
            "parameters": {"mass": 0.9},
            "pruning": {"removed": [8, 8, 8, 8]},
            "accounting": {"phases": {"decode": {"executed_flops_share": 0.731}}},
        },
        "quantization": {"classes": {"attention": {"formats": {"int4": 16}}, "router": {"formats": {"none": 4}}}},
        "tensor_bytes": {"attention": 1_000_000, "router": 65_536},
    }
    rows = dict(describe_built(found))
    assert rows["target"] == "onnx fp32 (flavor genai)"
    assert rows["experts"] == ("4 layers of 8, top-4, width 128 (the source model: 4 layers of 16, top-4, width 128)")
    assert rows["parameters"].startswith("5.00 M, active per token 4.00 M (80%) (the source model: 9.46 M")
    assert rows["routing"] == "top-p (mass 0.9); expert FLOPs executed: decode 73.1%"
    assert rows["pruned experts"] == "32 in 4 layers"
    assert rows["weights"] == "1.07 MB: attention 1.00 MB (int4), router 65.54 kB"


def test_what_was_not_changed_is_said_once() -> None:
    same = {**MODEL, "source": {key: MODEL[key] for key in ("parameters", "moe_layers")}}
    rows = dict(describe_built({"model": same}))
    assert rows["experts"] == "4 layers of 8, top-4, width 128"
    assert "source" not in rows["parameters"]
    assert "routing" not in rows


def test_a_report_of_which_little_is_known() -> None:
    assert describe_built({"model": {"architectures": ["X"]}, "recipe": {}, "routing": {}}) == []
