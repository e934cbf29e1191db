"""`--flavor web`: names, files and configuration as transformers.js expects them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moec.compiler.common.model_config import read_config
from moec.compiler.ir.program import Program, StateSpec
from moec.quantize.lazy import Quantized
from moec.targets.onnx.files import WEB_FOLDER

DATA_LIMIT = 2_000_000_000
"""Largest size of a data file in bytes. Browsers limit the size of a buffer, some to 2 GB."""
SECTION = "transformers.js_config"
"""Key in config.json under which transformers.js looks for its own settings."""

_SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "q4": "_q4", "q4f16": "_q4f16"}
"""Name of a precision in transformers.js -> what it appends to the names of files (`DEFAULT_DTYPE_SUFFIX_MAPPING`)."""
_SSM_TYPES = frozenset({"granitemoehybrid", "falcon_h1", "nemotron_h"})
"""Values of `model_type` for which transformers.js calls the state of a scan `past_ssm` (`getCacheNames`, 4.3.2)."""


def precision(program: Program) -> str:
    """The precision of a Program's weights as transformers.js names it: "fp32", "fp16", "int8", "q4" or "q4f16"."""
    half = program.dtype is torch.float16
    bits = {
        tensor.format.bits for name in program.weight_names() if isinstance(tensor := program.weights[name], Quantized)
    }
    if 4 in bits:
        return "q4f16" if half else "q4"
    return "int8" if bits and not half else "fp16" if half else "fp32"


def model_name(program: Program) -> str:
    """Path of the graph in the artifact, such as `onnx/model_q4.onnx`."""
    return f"{WEB_FOLDER}/model{_SUFFIXES[precision(program)]}.onnx"


def with_web_names(program: Program) -> Program:
    """`program` with its states named as transformers.js looks for them."""
    if program.config.get("model_type") not in _SSM_TYPES:
        return program

    def named(state: StateSpec) -> StateSpec:
        if state.kind != "recurrent":
            return state
        past, present = f"past_ssm.{state.layer}", f"present_ssm.{state.layer}"
        return replace(state, input=replace(state.input, name=past), output=replace(state.output, name=present))

    return program.replace(states=tuple(map(named, program.states)))


def complete(directory: Path) -> None:
    """Tell transformers.js, in config.json, which files to load.

    Args:
        directory: Holds the model files and config.json.

    Raises:
        ArtifactError: config.json is damaged.
    """
    path = directory / "config.json"
    (graph,) = (directory / WEB_FOLDER).glob("model*.onnx")
    suffix = graph.stem.removeprefix("model")
    (dtype,) = (name for name, own in _SUFFIXES.items() if own == suffix)
    chunks = len(list(graph.parent.glob(f"{graph.name}_data*")))
    section: Mapping[str, Any] = {"dtype": dtype, "use_external_data_format": {graph.name: chunks}}
    text = json.dumps({**read_config(path), SECTION: section}, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
