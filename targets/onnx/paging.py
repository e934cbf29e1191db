"""Runs packed weights with a limit on memory: dense weights stay, and experts are read when tokens are routed to them.

ONNX Runtime maps packed weights from their file (`moec.targets.onnx.packing`), so the kernel could read and drop pages
by itself. But it reads ahead around each fault, whatever expert lies there, and an expert of a few megabytes costs a
wait for each such piece. Here the graph also returns the routing, into buffers of ours. A thread sees in them which
experts a layer is about to read while the step is still running, and asks for exactly their pages, all at once. It also
gives back the experts that were used least recently. It only gives advice: results are the same bit for bit.
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.mapped_files import Advice, MappedFile
from moec.compiler.common.memory import return_freed_memory
from moec.compiler.common.recency import RecentExperts
from moec.targets.onnx.experts import EXTERNAL_DATA, LAYERS
from moec.targets.onnx.files import model_path
from moec.targets.onnx.places import ExpertLayer, Place, places_of
from moec.targets.onnx.runner import OnnxRunner
from moec.targets.onnx.states import NUMPY
from moec.targets.paging import ExpertPaging

POLL = 3e-4
"""Seconds between two looks at the routing of a running step."""


@dataclass(eq=False)
class Step:
    """The routing of a running step.

    Attributes:
        values: Name of a value -> its buffer, filled with -1 (indices) and NaN (weights) until it is computed.
        used: For each MoE layer, the experts that were seen in it.
        read: The experts that the layer that is running reads.
    """

    values: Mapping[str, np.ndarray]
    used: list[set[int]] = field(default_factory=list)
    read: set[int] = field(default_factory=set)

    def experts(self, layer: ExpertLayer) -> set[int]:
        """The experts of a layer that are known to be used."""
        indices, weights = self.values[layer.indices], self.values[layer.weights]
        # A row that is not computed yet has an index of -1, which no expert has.
        known = indices[(weights != 0) & (indices >= 0) & (indices < layer.count)]
        return set(np.unique(known).tolist())

    def is_routed(self, layer: ExpertLayer) -> bool:
        """Whether the routing of the last token of a layer is computed."""
        return bool(self.values[layer.indices][-1, -1] >= 0) and not np.isnan(self.values[layer.weights][-1, -1])


class Pager:
    """Reads experts ahead and gives them back.

    Args:
        layers: The experts of each MoE layer.
        files: Name of a data file -> its mappings.
        memory: Bytes of memory for experts, asked for before each layer.
        drop_cache: Whether experts that are given back leave the page cache, too. Where a control group counts its
            pages, the kernel would otherwise have to choose among them, and it does not know which are used.
    """

    def __init__(
        self,
        layers: Sequence[ExpertLayer],
        files: Mapping[str, MappedFile],
        memory: Callable[[], int],
        *,
        drop_cache: bool,
    ) -> None:
        self.layers, self.files, self.drop_cache = tuple(layers), files, drop_cache
        self.counts = ExpertPaging(len(self.layers))
        self._memory, self._recent = memory, RecentExperts([layer.size for layer in layers], memory())
        self._running: list[Step] = []
        self._changed, self._closed = threading.Condition(), False
        for number in range(len(self.layers)):
            self._advise(number, Advice.RANDOM)
            self._give_back(number, 0)
        threading.Thread(target=self._watch, name="pager", daemon=True).start()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def begin(self, step: Step) -> None:
        """Watch a step until `end`."""
        with self._changed:
            self._running.append(step)
            self._changed.notify()

    def end(self, step: Step) -> None:
        """Account for what was not seen while the step ran."""
        with self._changed:
            self._running.remove(step)
            for number in range(len(self.layers)):
                self._use(step, number)
            self._leave(step)

    def _watch(self) -> None:
        while not self._closed:
            with self._changed:
                while not self._running and not self._closed:
                    self._changed.wait()
                for step in self._running:
                    while (number := len(step.used)) < len(self.layers) and step.is_routed(self.layers[number]):
                        self._use(step, number)
            time.sleep(POLL)

    def _use(self, step: Step, number: int) -> None:
        """Read ahead what a layer uses and was not seen before, and give back what was used least recently."""
        if number == len(step.used):
            self._leave(step)
            step.used.append(set())
        new, layer = step.experts(self.layers[number]) - step.used[number], self.layers[number]
        step.used[number] |= new
        self._recent.memory = self._memory()
        missing, dropped = self._recent.use(number, sorted(new))
        for other, expert in dropped:
            if other != number:
                self._give_back(other, expert)
        # What this layer uses cannot be given back before it has run, even if memory does not hold all of it.
        step.read = {*step.read, *missing, *(expert for other, expert in dropped if other == number)}
        if len(new) * layer.size > self._recent.memory:
            # A long prompt: where nearly all experts are read in their order, reading ahead by default is right.
            self._advise(number, Advice.NORMAL)
        else:
            for place in (place for expert in missing for place in layer.places(expert)):
                self.files[place.file].read_ahead(place.offset, place.length)
        self.counts.uses[number] += len(new)
        self.counts.hits[number] += len(new) - len(missing)

    def _leave(self, step: Step) -> None:
        """Give back what the layer read that has run by now, if it is not held, and what came with it."""
        number = len(step.used) - 1
        if step.read:
            self._advise(number, Advice.RANDOM)
        for expert in sorted(step.read):
            self._give_back(number, expert)
        step.read = set()

    def _advise(self, number: int, advice: Advice) -> None:
        for place in self.layers[number].stacks:
            self.files[place.file].advise(place.offset, place.length, advice)

    def _give_back(self, number: int, expert: int) -> None:
        """Give back an expert, and its neighbours up to those that are held: the kernel maps some pages around a fault.

        Of an expert that is held, only the neighbours are given back.
        """
        layer = self.layers[number]
        is_held = (number, expert) in self._recent
        first = last = expert
        while first and (number, first - 1) not in self._recent:
            first -= 1
        while last + 1 < layer.count and (number, last + 1) not in self._recent:
            last += 1
        for start, stop in ((first, expert), (expert + 1, last + 1)) if is_held else ((first, last + 1),):
            for place in layer.places(start, stop - start):
                self.files[place.file].give_back(place.offset, place.length, cache=self.drop_cache)


class WatchedSession:
    """A session of a graph that also returns the routing, with the interface that the states of a runner use.

    Args:
        session: The session.
        added: Names of the outputs that are the routing.

    Attributes:
        pager: Is shown the routing of each step; None: steps are run to see how large the routing of a token is.
    """

    def __init__(self, session: Any, added: Sequence[str]) -> None:
        self._session = session
        self.pager: Pager | None = None
        types = {spec.name: spec.type for spec in session.get_outputs()}
        self._added = {name: np.dtype(NUMPY[types[name]]) for name in added}
        self._shapes = dict[str, tuple[int, ...]]()
        """For each of these outputs, the shape that it has for one token."""
        self._expected = threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def expect(self, tokens: int) -> None:
        """Say how many tokens the next step of this thread has."""
        self._expected.tokens = tokens

    def get_outputs(self) -> list[Any]:
        """The outputs of the artifact."""
        return [spec for spec in self._session.get_outputs() if spec.name not in self._added]

    def io_binding(self) -> Any:
        """A binding whose first outputs are the routing; a name that is bound again keeps its place."""
        binding = self._session.io_binding()
        for name in self._added:
            binding.bind_output(name)
        return binding

    def run_with_ort_values(self, names: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
        """Run a step; see `onnxruntime.InferenceSession`."""
        binding = self.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name)
        self.run_with_iobinding(binding)
        found: list[Any] = binding.get_outputs()[len(self._added) :]
        return found

    def run_with_iobinding(self, binding: Any) -> None:
        """Run a step; see `onnxruntime.InferenceSession`."""
        if self.pager is None:
            self._session.run_with_iobinding(binding)
            first = binding.get_outputs()[: len(self._added)]
            self._shapes = {name: tuple(value.shape()) for name, value in zip(self._added, first, strict=True)}
            return
        values = {}
        for name, dtype in self._added.items():
            rows, *rest = self._shapes[name]
            unknown = -1 if dtype.kind == "i" else np.nan
            values[name] = np.full((rows * self._expected.tokens, *rest), unknown, dtype)
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(values[name]))
        step = Step(values)
        self.pager.begin(step)
        try:
            self._session.run_with_iobinding(binding)
        finally:
            self.pager.end(step)


def beside(places: Sequence[Place], size: int) -> Iterator[tuple[int, int]]:
    """Offsets and lengths of what lies beside places of a file of `size` bytes: before, between and after them."""
    start = 0
    for place in sorted(places, key=lambda one: one.offset):
        yield start, max(0, place.offset - start)
        start = max(start, place.offset + place.length)
    yield start, max(0, size - start)


class PagedRunner(OnnxRunner):
    """A runner that reads experts when tokens are routed to them; see `moec.targets.paging.PagingRunner`.

    Args:
        directory: Packed weights.
        memory: Bytes of memory for the experts, asked for before each layer.
        threads: Intra-op threads; 0 is ONNX Runtime's default.
        drop_cache: See `Pager`.

    Raises:
        UsageError: The experts of a layer are no stacks that a kernel reads.
        ArtifactError: ONNX Runtime cannot load the model, or does not map the weights.
    """

    def __init__(
        self, directory: Path, memory: Callable[[], int], *, threads: int = 0, drop_cache: bool = False
    ) -> None:
        places = places_of(directory)
        self._added = list(dict.fromkeys(name for row in places.layers for name in (row.indices, row.weights)))
        super().__init__(directory, threads=threads)
        folder = model_path(directory).parent
        experts = [place for row in places.layers for place in row.stacks]
        names = {place.file for place in (*places.dense, *places.tables, *experts)}
        files = {name: MappedFile(folder / name) for name in sorted(names)}
        for place in experts:
            if files[place.file].address(place.offset, place.length) is None:
                raise ArtifactError(
                    f"{directory}: ONNX Runtime does not map the experts: they are packed for another machine",
                    hint="pack the artifact here: moec pack",
                )
        for name, file in files.items():
            # Opening has read everything. What is not read again would leave no room for experts until the kernel
            # has dropped it, and it drops pages first that were read ahead and are not used yet.
            dense = [place for place in places.dense if place.file == name]
            for offset, length in beside(dense, (folder / name).stat().st_size):
                file.give_back(offset, length, cache=drop_cache)
        for place in places.tables:
            files[place.file].advise(place.offset, place.length, Advice.RANDOM)
        refused = {reason for one in places.dense if (reason := files[one.file].lock(one.offset, one.length))}
        self.note = f"dense weights are not locked in memory: {', '.join(sorted(refused))}" if refused else ""
        """What could not be done, for people; empty if there is nothing to say."""
        self.prefill(np.zeros((1, 1), np.int64))
        self.reset()
        for counts in self.expert_tokens.values():
            counts[:] = 0
        return_freed_memory()  # that of the graph, 20 MB
        pager = Pager(places.layers, files, memory, drop_cache=drop_cache)
        weakref.finalize(self.session, pager.close)
        self.session.pager, self.paging = pager, pager.counts

    def _open(self, path: Path, options: ort.SessionOptions) -> Any:
        model = onnx.load(path, load_external_data=False)
        known = {output.name for output in model.graph.output}
        entries = {item.key: item.value for item in model.metadata_props}
        kinds = {name: kind for layer in json.loads(entries[LAYERS]) for name, kind in layer.values()}
        for name in self._added:
            assert name not in known, "the outputs of an artifact have names of their own"
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, kinds[name], None))
        options.add_session_config_entry(EXTERNAL_DATA, str(path.parent))
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return WatchedSession(session, self._added)

    def _step(self, input_ids: np.ndarray, attention_mask: np.ndarray | None, kept: int) -> np.ndarray:
        self.session.expect(input_ids.size)
        return super()._step(input_ids, attention_mask, kept)
