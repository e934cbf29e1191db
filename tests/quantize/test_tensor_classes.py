"""Classes of the weights of recurrent layers: projections are quantized, what makes a decay or update rate is not."""

from __future__ import annotations

from typing import Any

import pytest

from moec.passes.quantize import Quantize
from moec.quantize.lazy import Quantized
from moec.quantize.plan import TensorClass, preset
from moec.quantize.tensor_classes import weight_roles

ATTENTION, OTHER = TensorClass.ATTENTION, TensorClass.OTHER
MIXERS = {
    "qwen3_next": (
        "model.layers.0.linear_attn",
        {"in_proj_qkvz": ATTENTION, "in_proj_ba": OTHER, "out_proj": ATTENTION},
    ),
    "kimi_linear": (
        "model.layers.0.self_attn",
        {
            **dict.fromkeys(("q_proj", "k_proj", "v_proj", "g_a_proj", "g_b_proj", "o_proj"), ATTENTION),
            "forget_gate.f_a_proj": ATTENTION,
            **dict.fromkeys(("forget_gate.f_b_proj", "b_proj"), OTHER),
        },
    ),
    # Mamba makes time step, keys and queries of one projection.
    "jamba": ("model.layers.0.mamba", dict.fromkeys(("in_proj", "x_proj", "out_proj"), ATTENTION)),
    "minimax": ("model.layers.0.self_attn", dict.fromkeys(("qkv_proj", "output_gate", "out_proj"), ATTENTION)),
    "lfm2_moe": ("model.layers.0.conv", dict.fromkeys(("in_proj", "out_proj"), ATTENTION)),
}


@pytest.mark.parametrize("family", MIXERS)
def test_projections_of_a_mixer(family: str, program_of: Any) -> None:
    mixer, wanted = MIXERS[family]
    roles = weight_roles(program_of(family))
    found = {name: role.tensor_class for name, role in roles.items() if name.startswith(f"{mixer}.")}
    assert found == {f"{mixer}.{name}.weight": own for name, own in wanted.items()}


def test_int4_leaves_what_is_no_projection_alone(program_of: Any) -> None:
    program = Quantize(preset("int4")).run(program_of("qwen3_next")).program
    coded = {name for name in program.weight_names() if isinstance(program.weights[name], Quantized)}
    mixer = {name.partition("linear_attn.")[2] for name in program.weight_names() if "linear_attn." in name}
    quantized = {name.partition("linear_attn.")[2] for name in coded if "linear_attn." in name}
    assert quantized == {"in_proj_qkvz.weight", "out_proj.weight"}
    assert {name.partition(".")[0] for name in mixer - quantized} >= {"dt_bias", "in_proj_ba", "norm", "conv1d"}
