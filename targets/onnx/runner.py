"""Runs an ONNX artifact with ONNX Runtime on CPU. Imports no torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from moec.compiler.errors import ArtifactError

NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class OnnxRunner:
    """The Runner of the ONNX target.

    Args:
        directory: The artifact.
        threads: Intra-op threads; 0 is ONNX Runtime's default.
        profile: Whether ONNX Runtime writes a profile (see `end_profiling`).

    Raises:
        ArtifactError: ONNX Runtime cannot load it.
    """

    def __init__(self, directory: Path, *, threads: int = 0, profile: bool = False) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_profiling = profile
        try:
            self.session = ort.InferenceSession(
                str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
            raise ArtifactError(
                f"{directory / 'model.onnx'}: ONNX Runtime cannot load it: {str(error).splitlines()[0]}",
                hint="moec verify tells whether the files are those that were built",
            ) from error
        self._inputs = {spec.name: spec for spec in self.session.get_inputs()}
        self._outputs = [spec.name for spec in self.session.get_outputs()]
        self._past = {name: present for name in self._inputs if (present := _present(name)) in self._outputs}
        self._states: dict[str, Any] = {}
        self._length = 0
        self._one_by_one = (
            self.session.get_modelmeta().custom_metadata_map.get("moec.attention") == "GroupQueryAttention"
        )
        self.threads = threads
        self.overrides: dict[str, np.ndarray] = {}
        """Values for inputs that have defaults, such as {"routing_budget": array of shape []}."""

    def reset(self) -> None:
        """Forget the sequences."""
        self._states, self._length = {}, 0

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Start new sequences; see `moec.targets.base.Runner`."""
        self.reset()
        return self.decode(input_ids, attention_mask)

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Continue them; see `moec.targets.base.Runner`."""
        batch, length = input_ids.shape
        if self._one_by_one and self._length and batch > 1 and length > 1:
            return self._decode_one_by_one(input_ids, attention_mask)
        total = self._length + length
        mask = np.ones((batch, total), np.int64) if attention_mask is None else attention_mask.astype(np.int64)
        positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, total - length :]
        feeds = {
            "input_ids": np.ascontiguousarray(input_ids, dtype=np.int64),
            "attention_mask": mask,
            "position_ids": np.ascontiguousarray(positions),
        }
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items() if name in self._inputs
        }
        values |= {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self.overrides.items()}
        results = self.session.run_with_ort_values(self._outputs, {**values, **self._state_values(batch)})
        named = dict(zip(self._outputs, results, strict=True))
        self._states = {name: named[present] for name, present in self._past.items()}
        self._length = total
        logits: np.ndarray = named["logits"].numpy()
        return logits.astype(np.float32, copy=False)

    def _decode_one_by_one(self, input_ids: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
        """GroupQueryAttention on CPU takes several new tokens after a past for one sequence alone."""
        start, logits = self._length, []
        for index in range(input_ids.shape[1]):
            mask = None if attention_mask is None else attention_mask[:, : start + index + 1]
            logits.append(self.decode(input_ids[:, index : index + 1], mask))
        return np.concatenate(logits, axis=1)

    def _state_values(self, batch: int) -> dict[str, Any]:
        if self._states:
            return self._states
        empty = {}
        for name in self._past:
            # The batch comes first; another axis without a number is that of the tokens, of which there are none.
            sizes = (size if isinstance(size, int) else 0 for size in self._inputs[name].shape[1:])
            array = np.zeros((batch, *sizes), NUMPY[self._inputs[name].type])
            empty[name] = ort.OrtValue.ortvalue_from_numpy(array)
        return empty

    def facts(self) -> Mapping[str, Any]:
        """Runtime, version and threads."""
        return {"runtime": f"onnxruntime {ort.__version__}", "provider": "CPU", "threads": self.threads}

    def kernels(self) -> Mapping[str, int]:
        """Nanoseconds by op type in one step, from the profile so far; ends profiling.

        Each node counts with its median over the steps: a step that the machine interrupted does not tell.
        """
        path = Path(self.session.end_profiling())
        events = json.loads(path.read_text())
        path.unlink()
        nodes: dict[tuple[str, str], list[int]] = {}
        for event in events:
            op = event.get("args", {}).get("op_name")
            if op and event["name"].endswith("_kernel_time"):
                nodes.setdefault((op, event["name"]), []).append(int(event["dur"]) * 1000)
        spent: dict[str, int] = {}
        for (op, _), times in nodes.items():
            spent[op] = spent.get(op, 0) + int(statistics.median(times))
        return spent


def _present(name: str) -> str:
    """Output that replaces the state `name`: past_key_values.0.key -> present.0.key, past_conv.0 -> present_conv.0."""
    return "present" + name.removeprefix("past").removeprefix("_key_values") if name.startswith("past_") else ""
