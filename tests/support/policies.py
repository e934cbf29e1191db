"""All built-in routing policies, with parameters with which each of two layers drops slots."""

from __future__ import annotations

from typing import Any

from moec.passes.routing.policies.table import BUILT_IN, policy

PARAMETERS: dict[str, dict[str, Any]] = {
    "layer-k": {"ks": [2, 3]},
    "top-p": {"mass": 0.8, "slack": [1.0, 1.5]},
    "threshold": {"tau": 0.2, "importance": [1.0, 0.5]},
    "capped": {"mass": 0.8, "caps": [2, 3]},
    "ratio": {"beta": 0.3, "scale": [1.0, 1.5]},
    "entropy": {"center": 2.0, "location": [0.7, 0.5], "spread": [0.3, 0.2]},
    "margin": {"center": 2.0, "location": [-0.3, -0.5], "spread": [0.3, 0.2]},
    "activation-norm": {"center": 2.0, "location": [1.0, 1.0], "spread": [0.3, -0.2]},
    "uniform-k": {"k": 2},
    "random-drop": {"probability": 0.5},
    "per-layer": {"layers": [{"policy": "top-p", "mass": 0.8}, {"policy": "threshold", "tau": 0.2}]},
}
POLICIES = {
    **{built_in.name: policy(built_in.name, **PARAMETERS[built_in.name]) for built_in in BUILT_IN},
    "threshold of weights": policy("threshold", tau=0.1, importance=[1.0, 0.5], absolute=True),
}
