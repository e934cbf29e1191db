"""Files that only a target's runtime can run, such as Core ML packages (`Target.file_format`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.common.errors import CheckpointError
from moec.compiler.foreign.binding import Binding, Bindings, bind
from moec.compiler.foreign.cost import computed_experts
from moec.compiler.foreign.model import Choices, Cost, ForeignModel, Unseen
from moec.compiler.foreign.routing import chosen_per_layer
from moec.compiler.foreign.stepping import Feeds, SteppingRunner, feeds
from moec.compiler.ir.program import Program
from moec.targets.model_files import FileFormat, FileSession, ModelFile, Operator, StoredTensor
from moec.targets.runners import Runner


class TargetFile(ForeignModel):
    """A file that a target opens.

    Args:
        path: The file or directory.
        form: Its format.

    Raises:
        ArtifactError: It is damaged.
    """

    def __init__(self, path: Path, form: FileFormat[ModelFile]) -> None:
        self.path, self.files, self._file = path, (path,), form.open(path)
        self.format = form.name  # type: ignore[misc]  # of the object, since one class opens all
        self.producer, self.runtime = self._file.producer, self._file.runtime
        self.float_precision = self._file.float_precision

    def tensors(self) -> Sequence[StoredTensor]:
        """Every weight."""
        return self._tensors

    @cached_property
    def _tensors(self) -> Sequence[StoredTensor]:
        return self._file.tensors()

    def operators(self) -> Sequence[Operator]:
        """Every node of the graph."""
        return self._file.operators()

    def open(self, program: Program, bindings: Bindings, *, threads: int = 0) -> Runner:  # noqa: ARG002
        """See `ForeignModel.open`."""
        return self._runner(self._file.session(), program, bindings)

    def _runner(self, session: FileSession, program: Program, bindings: Bindings) -> _FileRunner:
        binding = self._bound(program, bindings)
        facts = {"format": self.format, "runtime": self.runtime}
        return _FileRunner(session, binding, facts, self._file.stands_in)

    def _bound(self, program: Program, bindings: Bindings) -> Binding:
        inside = self._file.states > 0
        if not inside and program.states and bindings.states:
            raise CheckpointError(
                f"{self.path}: it keeps no states", hint="leave `states` out of the file of --bindings"
            )
        return bind(self._file.inputs, self._file.outputs, program, bindings, str(self.path), inside=inside)

    def choices(self, program: Program, bindings: Bindings) -> Choices | Unseen:
        """What every top-k over the experts returns."""
        candidates = self._file.top_k
        if not candidates:
            return Unseen("the graph has no top-k in which a router could be seen")
        session = self._file.session([name for pair in candidates for name in pair])
        binding = self._bound(program, bindings)

        def chosen(ids: np.ndarray) -> Mapping[int, np.ndarray]:
            session.reset()
            given = ids
            if binding.whole and (fixed := binding.ids.shape[-1]):
                given = np.pad(ids, [(0, 0), (0, fixed - ids.shape[1])])
            found = chosen_per_layer(candidates, session.run(feeds(binding, given, 0)), program, given.shape[1])
            return {layer: rows[: ids.shape[1]] for layer, rows in found.items()}

        found = chosen(np.zeros((1, 1), np.int64))
        if len(found) != len(program.layers):
            return Unseen(f"{len(found)} routers were found in the graph, and the checkpoint has {len(program.layers)}")
        return chosen

    def cost(self, program: Program, bindings: Bindings) -> Cost | Unseen:
        """The products of one token."""
        session = self._file.session()
        self._runner(session, program, bindings).prefill(np.zeros((1, 1), np.int64))
        tokens = 1
        binding = self._bound(program, bindings)
        if binding.whole and (fixed := binding.ids.shape[-1]):
            tokens = fixed
        products = [dataclasses.replace(own, rows=own.rows / tokens) for own in session.products()]
        return Cost(computed_experts(products, program), "the products of one token")


class _FileRunner(SteppingRunner):
    """Feeds a file in pieces that it takes.

    Args:
        session: Runs the file.
        binding: What its inputs and outputs are.
        facts: For the report.
        stands_in: See `moec.targets.runners.RunnerLimits`.
    """

    def __init__(self, session: FileSession, binding: Binding, facts: Mapping[str, Any], stands_in: str) -> None:
        self._session = session
        mask = binding.mask.most(-1) if binding.mask is not None else None
        most = binding.ids.most(-1) if binding.whole else mask
        super().__init__(session.run, binding, facts, max_sequence=most)
        self.limits = dataclasses.replace(self.limits, stands_in=stands_in)
        # Logits of the last token alone: every token is a step of its own.
        single = len(binding.logits.shape) >= 2 and binding.logits.shape[-2] == 1
        self._piece = 1 if single else binding.ids.most(-1)

    def reset(self) -> None:
        """Drop the sequence and its states."""
        self._session.reset()
        super().reset()

    def _step(self, ids: np.ndarray, states: Feeds, past: int) -> tuple[np.ndarray, Feeds]:
        if self._binding.whole or self._piece is None:
            return super()._step(ids, states, past)
        found = list[np.ndarray]()
        for start in range(0, ids.shape[1], self._piece):
            logits, states = super()._step(ids[:, start : start + self._piece], states, past + start)
            found.append(logits)
        return np.concatenate(found, axis=1), states
