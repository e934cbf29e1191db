"""Runs an ONNX artifact with ONNX Runtime on CPU. Imports no torch."""

from __future__ import annotations

import contextlib
import copy
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort

from moec.compiler.common.denormals import can_flush_denormals, denormals_as_zeros
from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.memory import reusing_freed_memory
from moec.compiler.common.threads import should_spin, threads_for
from moec.targets.onnx.files import WEB_FOLDER, is_packed, model_path
from moec.targets.onnx.states import NUMPY, GrowingStates, SharedBufferStates, StateRow
from moec.targets.runners import Row, Runner, RunnerLimits

MAX_SHARED_LENGTH = "moec.max_shared_length"
"""Key in the model's metadata: see `moec.compiler.ir.analysis.max_shared_length`; missing where there is no limit."""
ROUTING_OUTPUTS = "moec.routing_outputs"
"""Key in the model's metadata: MoE layer -> number of experts, where the model returns the experts of each token."""
NUM_LOGITS = "num_logits_to_keep"
"""Optional input: number of last tokens whose logits are computed, 0 for all. The name is that of transformers.js."""
ERROR_SEVERITY = 3
"""Severity from which ONNX Runtime prints messages: errors, but not warnings."""


def routing_outputs(layer: int) -> tuple[str, str]:
    """Names of the outputs with the experts of each token [tokens, k] and with their weights, of a MoE layer."""
    return f"experts.{layer}.indices", f"experts.{layer}.weights"


def session_options(threads: int) -> Any:
    """Options of all sessions: `threads` threads (0: those of `threads_for`), and only errors are printed."""
    # Kernels that pack weights print through the default logger, which session options do not affect.
    ort.set_default_logger_severity(ERROR_SEVERITY)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads_for(threads)
    if not should_spin():
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Products with DequantizeLinear (`--flavor web`) are fused to MatMulNBits, by default with activations in int8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    options.log_severity_level = ERROR_SEVERITY
    return options


def failed(error: Exception) -> ArtifactError:
    """The error for a model that was loaded and cannot be run."""
    return ArtifactError(
        f"ONNX Runtime cannot run the model: {str(error).splitlines()[0]}",
        hint="the artifact was built but cannot be run; please report this with the recipe",
    )


class OnnxRunner(Runner):
    """The Runner of the ONNX target.

    Args:
        directory: The artifact.
        threads: Intra-op threads; 0 is ONNX Runtime's default.
        profile: Whether ONNX Runtime records a profile, for `kernel_times`.
        options: Options of the session; None: those of `session_options`.

    Raises:
        ArtifactError: ONNX Runtime cannot load the model.
    """

    def __init__(
        self, directory: Path, *, threads: int = 0, profile: bool = False, options: ort.SessionOptions | None = None
    ) -> None:
        options = session_options(threads) if options is None else options
        options.enable_profiling = profile
        path = model_path(directory)
        if path.parent.name == WEB_FOLDER:
            # Decode weights once, as the page of `moec web` does: in this form, products with codes are slow.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if can_flush_denormals():
            options.add_session_config_entry("session.set_denormal_as_zero", "1")
        try:
            # Each packed weight is converted once more, and what was converted is dropped for what is stored.
            memory = reusing_freed_memory() if is_packed(path) else contextlib.nullcontext()
            with denormals_as_zeros(), memory:
                self.session = self._open(path, options)
        except Exception as error:  # the only common base class of ONNX Runtime's exceptions
            raise ArtifactError(
                f"{path}: ONNX Runtime cannot load it: {str(error).splitlines()[0]}",
                hint="`moec verify` checks whether the files are still as they were built",
            ) from error
        # An input with a default value is no input to ONNX Runtime, but an initializer that may be overridden.
        specs = (*self.session.get_inputs(), *self.session.get_overridable_initializers())
        self._inputs = {spec.name: NUMPY[spec.type] for spec in specs}
        described = self.session.get_modelmeta().custom_metadata_map
        shared = described.get(MAX_SHARED_LENGTH)
        self.limits = RunnerLimits(max_shared_length=None if shared is None else int(shared))
        routing = json.loads(described.get(ROUTING_OUTPUTS, "{}"))
        self.expert_tokens = {int(layer): np.zeros(count, np.int64) for layer, count in routing.items()}
        """See `moec.targets.runners.CountingRunner`; forks share it."""
        self._shared = described.get("moec.attention") == "GroupQueryAttention"
        self._states: SharedBufferStates | GrowingStates = (
            SharedBufferStates(self.session) if self._shared else GrowingStates(self.session)
        )
        self.threads = threads
        self.overrides: dict[str, np.ndarray] = {}
        """See `moec.targets.runners.AdjustableRunner`."""

    def _open(self, path: Path, options: ort.SessionOptions) -> Any:
        """The session of the graph at `path`."""
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def fork(self) -> Self:
        """A second runner with its own states on the same session; ONNX Runtime allows concurrent runs of a session."""
        twin = copy.copy(self)
        twin._states = type(self._states)(self.session)
        return twin

    def gather(self, rows: Sequence[Row]) -> tuple[Row, ...]:
        """Take copies of other sequences; see `moec.targets.runners.BatchingRunner`."""
        sources = []
        for row in rows:
            assert isinstance(row.runner, OnnxRunner)
            sources.append(StateRow(row.runner._states, row.index, row.padding))
        return tuple(Row(self, index, padding) for index, padding in enumerate(self._states.gather(sources)))

    def reset(self) -> None:
        """Drop all sequences and their states."""
        self._states.reset()

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Continue the sequences; see `moec.targets.runners.Runner`.

        Raises:
            ArtifactError: ONNX Runtime fails.
        """
        return self._step(input_ids, attention_mask, 0)

    def decode_last(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Continue the sequences; see `moec.targets.runners.LastLogitsRunner`.

        Raises:
            ArtifactError: ONNX Runtime fails.
        """
        return self._step(input_ids, attention_mask, 1)[:, -1]

    def _step(self, input_ids: np.ndarray, attention_mask: np.ndarray | None, kept: int) -> np.ndarray:
        """Continue the sequences; `kept` is the number of last tokens whose logits are needed, 0 for all."""
        batch, length = input_ids.shape
        if self._shared and self._states.length and batch > 1 and length > 1:
            return self._decode_one_by_one(input_ids, attention_mask)
        total = self._states.length + length
        mask = np.ones((batch, total), np.int64) if attention_mask is None else attention_mask.astype(np.int64)
        positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, total - length :]
        feeds = {
            "input_ids": np.ascontiguousarray(input_ids, dtype=np.int64),
            "attention_mask": mask,
            "position_ids": np.ascontiguousarray(positions),
            NUM_LOGITS: np.asarray(kept, np.int64),
        }
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items() if name in self._inputs
        }
        for name, array in self.added_inputs(batch, length).items():
            values[name] = ort.OrtValue.ortvalue_from_numpy(
                array.astype(self._inputs.get(name, array.dtype), copy=False)
            )
        try:
            with denormals_as_zeros():
                results = self._states.run(values, batch, length)
        except Exception as error:  # the only common base class of ONNX Runtime's exceptions
            raise failed(error) from error
        self._count_experts(results, mask[:, total - length :])
        return results["logits"].astype(np.float32, copy=False)

    def _count_experts(self, results: Mapping[str, np.ndarray], mask: np.ndarray) -> None:
        """Count the tokens of each expert; padding and slots that routing dropped do not count.

        Args:
            results: The outputs of a step.
            mask: 0 where a new token is padding, [B, S].
        """
        for layer, counts in self.expert_tokens.items():
            indices, weights = (results[name] for name in routing_outputs(layer))
            used = (weights != 0) & (mask.reshape(-1, 1) != 0)
            counts += np.bincount(indices[used], minlength=counts.size)

    def added_inputs(self, batch: int, tokens: int) -> Mapping[str, np.ndarray]:  # noqa: ARG002
        """Arrays to feed to inputs that passes added, in a call of `batch` sequences; others take their defaults."""
        return self.overrides

    def _decode_one_by_one(self, input_ids: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
        """After a past, GroupQueryAttention on CPU takes several new tokens at once only if the batch size is 1."""
        start, logits = self._states.length, []
        for index in range(input_ids.shape[1]):
            mask = None if attention_mask is None else attention_mask[:, : start + index + 1]
            logits.append(self.decode(input_ids[:, index : index + 1], mask))
        return np.concatenate(logits, axis=1)

    def facts(self) -> Mapping[str, Any]:
        """Runtime, its version, provider and threads."""
        return {"runtime": f"onnxruntime {ort.__version__}", "provider": "CPU", "threads": self.threads}

    def kernel_times(self) -> Mapping[str, int]:
        """Nanoseconds per op type in one step, from the profile so far. Ends profiling.

        Each node counts with its median over the steps, so that an interrupted step has no effect.
        """
        spent: dict[str, int] = {}
        for (op, _), time in self.node_times().items():
            spent[op] = spent.get(op, 0) + time
        return spent

    def node_times(self) -> Mapping[tuple[str, str], int]:
        """Nanoseconds of each node, by op type and name: the median over the steps so far. Ends profiling."""
        path = Path(self.session.end_profiling())
        events = json.loads(path.read_text())
        path.unlink()
        nodes: dict[tuple[str, str], list[int]] = {}
        for event in events:
            op, name = event.get("args", {}).get("op_name"), event["name"]
            if op and name.endswith("_kernel_time"):
                nodes.setdefault((op, name.removesuffix("_kernel_time")), []).append(int(event["dur"]) * 1000)
        return {node: int(statistics.median(times)) for node, times in nodes.items()}
