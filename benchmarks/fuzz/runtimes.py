"""Runs artifacts without moec's runners where there is a runtime: plain onnxruntime, and LiteRT's own signatures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class RuntimeFailedError(Exception):
    """A runtime does not load an artifact, or fails when it runs it."""


class Runtime(Protocol):
    """Feeds steps: `step(ids [B, S], mask [B, past + S])` -> logits [B, S, V]; `reset` forgets the sequences."""

    batches: bool

    def reset(self) -> None:
        """Forget the sequences."""

    def step(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """One step."""


class PlainOnnx:
    """`onnxruntime.InferenceSession` and the names of inputs and outputs: `past*` in, `present*` out.

    Args:
        path: The model.
        scalars: Values of scalar inputs.
        batches: Whether it takes several sequences at once.
    """

    def __init__(self, path: Path, scalars: Mapping[str, float], *, batches: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.scalars, self.batches = scalars, batches
        self.outputs = [spec.name for spec in self.session.get_outputs()]
        self.reset()

    def reset(self) -> None:
        """Forget the sequences."""
        self.states: dict[str, np.ndarray] = {}

    def step(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """One step."""
        batch, new = ids.shape
        positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, -new:]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds = {}
        for spec in self.session.get_inputs():
            if spec.name in given:
                feeds[spec.name] = given[spec.name].astype(np.int64)
            elif spec.name.startswith("past"):
                sizes = [batch, *(size if isinstance(size, int) else 0 for size in spec.shape[1:])]
                feeds[spec.name] = self.states.get(spec.name, np.zeros(sizes, _NUMPY[spec.type]))
            elif spec.name == "inputs_embeds":
                feeds[spec.name] = np.zeros((batch, new, spec.shape[2]), _NUMPY[spec.type])
            elif spec.name in self.scalars:
                feeds[spec.name] = np.asarray(self.scalars[spec.name], _NUMPY[spec.type]).reshape(spec.shape)
        found = dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))
        for name in (spec.name for spec in self.session.get_inputs() if spec.name.startswith("past")):
            short = name.replace("past_key_values", "past", 1)
            self.states[name] = found["present" + short.removeprefix("past")]
        logits: np.ndarray = found["logits"].astype(np.float32)
        return logits


class PlainLitert:
    """LiteRT's interpreter and its signatures, `prefill_N` and `decode`. A piece is padded at its end.

    Args:
        path: The model.
        scalars: Values of scalar inputs.
        padded: Whether a prompt may be padded to the length of a signature.
    """

    batches = False

    def __init__(self, path: Path, scalars: Mapping[str, float], *, padded: bool) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.interpreter = Interpreter(model_path=str(path), num_threads=1)
        names = self.interpreter.get_signature_list()
        self.runners = {name: self.interpreter.get_signature_runner(name) for name in names}
        self.details = {name: runner.get_input_details() for name, runner in self.runners.items()}
        self.sizes = sorted((int(name.removeprefix("prefill_")) for name in names if name != "decode"), reverse=True)
        caches = [item for name, item in self.details["decode"].items() if name.startswith("kv_cache_")]
        self.capacity = min((max(map(int, item["shape"][1:3])) for item in caches), default=10**6)
        self.scalars, self.padded = scalars, padded
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self.length = 0
        states = re.compile("kv_cache_|conv_state_|recurrent_state_")
        self.states = {
            name: np.zeros(item["shape"], item["dtype"])
            for name, item in self.details["decode"].items()
            if states.match(name)
        }

    def step(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:  # noqa: ARG002
        """One step, in pieces of the lengths of the signatures."""
        found, start = [], 0
        while start < ids.shape[1]:
            rest = ids.shape[1] - start
            size = next((size for size in self.sizes if size <= rest), 0)
            if not size and self.padded and rest > 1 and self.sizes:
                size = self.sizes[-1] if self.length + self.sizes[-1] <= self.capacity else 0
            used = min(size or 1, rest)
            found.append(self._piece(ids[0, start : start + used], size or 1))
            start += used
        return np.concatenate(found, axis=1)

    def _piece(self, tokens: np.ndarray, size: int) -> np.ndarray:
        name = "decode" if size == 1 and 1 not in self.sizes else f"prefill_{size}"
        feeds: dict[str, Any] = dict(self.states)
        for key, item in self.details[name].items():
            shape, dtype = tuple(item["shape"]), item["dtype"]
            if key == "tokens":
                feeds[key] = np.pad(tokens, (0, size - len(tokens)))[None].astype(dtype)
            elif key == "input_pos":
                feeds[key] = np.arange(self.length, self.length + size, dtype=dtype)
            elif key == "token_count":
                feeds[key] = np.array([len(tokens)], dtype)
            elif key not in feeds:
                feeds[key] = np.full(shape, self.scalars.get(key, 0.0), dtype)
        found = self.runners[name](**feeds)
        self.states = {key: np.array(found[key]) for key in self.states}
        self.length += len(tokens)
        logits: np.ndarray = np.array(found["logits"], dtype=np.float32)[:, : len(tokens)]
        return logits


class MoecRunner:
    """moec's own runner, where there is no other: Core ML runs on Apple's systems only."""

    batches = False

    def __init__(self, target: str, directory: Path) -> None:
        from moec.targets import get_target

        self.runner = get_target(target).open(directory, threads=1)

    def reset(self) -> None:
        """Forget the sequences."""
        self.runner.reset()

    def step(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:  # noqa: ARG002
        """One step."""
        return self.runner.decode(ids.astype(np.int64))


def open_runtime(recipe: Mapping[str, Any], directory: Path, *, padded: bool) -> Runtime:
    """The runtime for an artifact.

    Args:
        recipe: Its recipe.
        directory: The artifact.
        padded: Whether padding may change nothing: not so where rotary frequencies depend on the length.

    Raises:
        RuntimeFailedError: It does not load the artifact.
    """
    try:
        return _opened(recipe, directory, padded=padded)
    except Exception as error:  # runtimes raise exceptions without a narrower common base class
        raise RuntimeFailedError(f"the runtime does not load it: {error}") from error


def _opened(recipe: Mapping[str, Any], directory: Path, *, padded: bool) -> Runtime:
    scalars = _scalars(recipe.get("routing") or {})
    options = recipe.get("options", {})
    match recipe["target"]:
        case "tflite":
            return PlainLitert(directory / "model.tflite", scalars, padded=padded)
        case "coreml":
            return MoecRunner("coreml", directory)
        case "tensorrt":
            return PlainOnnx(directory / "model.onnx", scalars, batches=padded and options.get("batch", 1) > 1)
        case _:
            (path,) = directory.rglob("*.onnx")
            return PlainOnnx(path, scalars, batches=padded)


KNOBS = {
    "top-p": "mass",
    "capped": "mass",
    "threshold": "tau",
    "ratio": "beta",
    "uniform-k": "k",
    "random-drop": "probability",
}


def _scalars(routing: Mapping[str, Any]) -> dict[str, float]:
    name = routing.get("policy", "off")
    if name == "off" or "parameters" not in routing:
        return {}
    value = routing["parameters"].get(KNOBS.get(name, "center"))
    return {} if value is None else {"routing_budget": float(value)}


def fed(runtime: Runtime, ids: np.ndarray, mask: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """Logits [B, T, V] of sequences that are fed in steps.

    Raises:
        RuntimeFailedError: The runtime fails.
    """
    runtime.reset()
    found, start = list[np.ndarray](), 0
    for step in steps:
        try:
            found.append(runtime.step(ids[:, start : start + step], mask[:, : start + step]))
        except Exception as error:  # runtimes raise exceptions without a narrower common base class
            raise RuntimeFailedError(f"the runtime fails: {error}") from error
        start += step
    return np.concatenate(found, axis=1)
