"""The tensors of a checkpoint under the names of the model, by the conversion rules of transformers.

Per-expert names of older checkpoints, renamed modules and fused projections are handled by `WeightConverter` and
`WeightRenaming` (transformers/core_model_loading.py). moec applies them lazily, to stacked experts one at a time.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping

from moec.compiler.common.errors import CheckpointError, first_line
from moec.compiler.common.rejections import Rejection
from moec.compiler.frontend.checkpoint import Checkpoint, readable
from moec.compiler.ir.weights import LazyTensor, Leaf, Stored, WeightStore, map_all_sources

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_MOVING = (
    loading.Chunk,
    loading.Concatenate,
    loading.Interleave,
    loading.MergeModulelist,
    loading.PermuteForRope,
    loading.Split,
    loading.SplitModulelist,
    loading.Transpose,
)
"""Operations of conversion rules that move values without changing them."""


@dataclass(frozen=True)
class _Shapes:
    """Stands for the model in a conversion, which asks it for its config and for shapes of parameters."""

    config: Any
    shapes: Mapping[str, tuple[int, ...]]

    def get_parameter(self, name: str) -> Tensor:
        """A tensor of the shape of parameter `name`, without values."""
        return torch.empty(self.shapes[name], device="meta")

    def sliced(self, name: str, rows: int) -> _Shapes:
        """A copy in which parameter `name` has `rows` entries along axis 0."""
        return _Shapes(self.config, {name: (rows, *self.shapes[name][1:])})


@dataclass(frozen=True)
class Converted(LazyTensor):
    """The result `name` of a WeightConverter over stored tensors.

    `sources` maps each source pattern to its tensors in order (one per expert for stacked experts).
    """

    name: str
    first_name: str
    converter: loading.WeightConverter
    sources: Mapping[str, tuple[LazyTensor, ...]]
    shape: tuple[int, ...]
    dtype: torch.dtype
    model: _Shapes

    @property
    def _stacks(self) -> bool:
        """Whether index i of axis 0 depends on the i-th tensor of each pattern alone."""
        first = self.converter.operations[0]
        return (
            isinstance(first, loading.MergeModulelist)
            and first.dim == 0
            and all(len(tensors) == self.shape[0] for tensors in self.sources.values())
        )

    @property
    def _keeps_rows(self) -> bool:
        """Whether index i of axis 0 depends on index i of the stored tensors alone."""
        return len(self.shape) > 2 and all(
            isinstance(operation, loading.Transpose) and min(operation.dim0, operation.dim1) > 0
            for operation in self.converter.operations
        )

    def rows(self, start: int, stop: int) -> Tensor:
        """Convert only the sources of the slice if the rule treats each row alone; else convert all, then slice."""
        if self._stacks:
            sources = {key: [tensor.read() for tensor in tensors[start:stop]] for key, tensors in self.sources.items()}
            return self._convert(sources, self.model)
        if self._keeps_rows:
            sources = {key: [tensor.rows(start, stop) for tensor in tensors] for key, tensors in self.sources.items()}
            return self._convert(sources, self.model.sliced(self.first_name, stop - start))
        sources = {key: [tensor.read() for tensor in tensors] for key, tensors in self.sources.items()}
        return self._convert(sources, self.model)[start:stop]

    def _convert(self, sources: Mapping[str, list[Tensor]], model: _Shapes) -> Tensor:
        converter: Any = copy.copy(self.converter)
        converter.collected_tensors = defaultdict(list, sources)
        value = converter.convert(self.first_name, model=model, config=model.config)[self.name]
        converted: Tensor = value[0] if isinstance(value, list) else value
        return converted.to(self.dtype)

    def map_sources(self, leaf: Leaf) -> LazyTensor | None:
        """See `LazyTensor.map_sources`."""
        if not all(isinstance(operation, _MOVING) for operation in self.converter.operations):
            return None
        found = {pattern: map_all_sources(tensors, leaf) for pattern, tensors in self.sources.items()}
        sources = {pattern: tensors for pattern, tensors in found.items() if tensors is not None}
        if len(sources) < len(found):
            return None
        return replace(self, sources=sources, dtype=next(iter(sources.values()))[0].dtype)


@dataclass
class _Plan:
    """The checkpoint tensors that make one parameter, or several parameters if the rule is one-to-many."""

    rule: loading.WeightConverter | loading.WeightRenaming | None
    sources: dict[str, list[LazyTensor]] = field(default_factory=lambda: defaultdict(list))
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class OpenedWeights:
    """The tensors of a model, and the stored tensors that they are made of.

    Attributes:
        store: The tensors under the names of the model.
        origins: Name in the store -> names of the stored tensors that it is made of.
        stored: Names of all stored tensors.
        rejections: Where the files contradict config.json, and the files were followed.
    """

    store: WeightStore
    origins: Mapping[str, frozenset[str]]
    stored: frozenset[str]
    rejections: tuple[Rejection, ...]

    def left_out(self, names: Iterable[str]) -> dict[str, int]:
        """The parts of the checkpoint that the tensors `names` do not use: path -> number of tensors.

        The path of a part is the shortest one that no used tensor shares, such as that of a vision tower or of a
        multi-token prediction layer.
        """
        empty = frozenset[str]()
        used = frozenset[str]().union(*(self.origins.get(self.store.resolve(name), empty) for name in names))
        shared = {name[:end] for name in used for end in range(len(name)) if name[end] == "."}
        parts = Counter(_part(name, shared) for name in self.stored - used)
        return dict(sorted(parts.items()))


def _part(name: str, shared: Collection[str]) -> str:
    """The shortest path of the tensor `name` that is not among `shared`."""
    pieces = name.split(".")
    paths = (".".join(pieces[:count]) for count in range(1, len(pieces) + 1))
    return next((path for path in paths if path not in shared), name)


def open_weights(checkpoint: Checkpoint, model: PreTrainedModel) -> OpenedWeights:
    """Find the tensor of the checkpoint for every parameter and persistent buffer of `model` (on the meta device).

    Returns:
        The weights, with a rejection for each place where the files contradict config.json.

    Raises:
        CheckpointError: A tensor is missing, or its shape disagrees with the config.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tensors: dict[str, LazyTensor] = {}
    shapes = _Shapes(model.config, wanted)
    origins: dict[str, frozenset[str]] = {}
    for name, plan in _plans(checkpoint, model).items():
        made = _lazy(name, plan, shapes)
        origins.update(dict.fromkeys(made, frozenset(plan.names)))
        tensors.update(made)
    rejections = _untie_stored(model, tensors)
    aliases = dict(getattr(model, "all_tied_weights_keys", None) or {})
    # Either name of a tied pair may be the one that the checkpoint holds.
    resolved: dict[str, str] = {}
    for tied, source in aliases.items():
        if source in tensors or tied not in tensors:
            resolved[tied] = source
            tensors.pop(tied, None)
        else:
            resolved[source] = tied
    _check(checkpoint, wanted, tensors, resolved)
    return OpenedWeights(WeightStore(tensors, resolved), origins, frozenset(checkpoint.tensors), rejections)


def _untie_stored(model: PreTrainedModel, tensors: Mapping[str, LazyTensor]) -> tuple[Rejection, ...]:
    """Untie each weight that config.json ties to another weight if the files hold different values for the two.

    The stored values win, as in `tie_weights` of transformers/modeling_utils.py. Both tensors are read up to the first
    difference.

    Args:
        model: The model on the meta device.
        tensors: Name -> tensor of the files.
    """
    rejections = []
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for name, source in list(tied.items()):
        if name in tensors and source in tensors and not _equal(tensors[name], tensors[source]):
            owner, _, attribute = name.rpartition(".")
            old = model.get_parameter(name)
            setattr(model.get_submodule(owner), attribute, nn.Parameter(torch.empty_like(old), requires_grad=False))
            del tied[name]
            reason = (
                "config.json ties the two, but the files hold different values, which were kept, as in transformers"
            )
            rejections.append(Rejection("capture", f"{name} = {source}", reason))
    return tuple(rejections)


def _equal(first: LazyTensor, second: LazyTensor) -> bool:
    if first.shape != second.shape:
        return False
    pairs = zip(first.cast(torch.float32).chunks(), second.cast(torch.float32).chunks(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def _plans(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, _Plan]:
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = model.state_dict()
    plans: dict[str, _Plan] = {}
    for key in sorted(checkpoint.tensors, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = loading.rename_source_key(
                key, [], [], base_model_prefix=model.base_model_prefix, meta_state_dict=state
            )
        if name not in state:
            continue  # such as the weights of a vision tower or of a multi-token prediction head
        plan = plans.setdefault(name, _Plan(by_pattern.get(pattern) if pattern else None))
        plan.sources[pattern or key].append(checkpoint.tensors[key])
        plan.names.append(key)
    return plans


def _lazy(name: str, plan: _Plan, model: _Shapes) -> dict[str, LazyTensor]:
    if not isinstance(plan.rule, loading.WeightConverter):
        (entries,) = plan.sources.values()
        return {name: _float(entries[0])}
    sources = {pattern: tuple(_float(entry) for entry in entries) for pattern, entries in plan.sources.items()}
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for each in sources.values() for tensor in each))
    targets = [name]
    if len(plan.rule.target_patterns) > 1:
        first = plan.rule.target_patterns[0]
        targets = [name.replace(first, target) for target in plan.rule.target_patterns]
    return {
        target: Converted(target, name, plan.rule, sources, model.shapes[target], dtype, model)
        for target in targets
        if target in model.shapes
    }


def _float(tensor: LazyTensor) -> LazyTensor:
    """Return `tensor` after checking that it can be used as a weight.

    Raises:
        CheckpointError: It has a dtype that moec does not read, or holds codes without their scales.
    """
    if isinstance(tensor, Stored) and not readable(tensor):
        raise tensor.entry.unreadable()
    return tensor


def _check(
    checkpoint: Checkpoint,
    wanted: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, LazyTensor],
    aliases: Mapping[str, str],
) -> None:
    missing = sorted(name for name in wanted if aliases.get(name, name) not in tensors)
    if missing:
        raise CheckpointError(
            f"{checkpoint.directory}: the files lack {len(missing)} tensors that config.json asks for: "
            + ", ".join(missing[:4])
            + (" ..." if len(missing) > 4 else ""),
            hint="config and weights disagree: config.json is wrong, or the checkpoint is incomplete",
        )
    for name, shape in wanted.items():
        tensor = tensors[aliases.get(name, name)]
        found = _converted_shape(checkpoint, tensor)
        if found != shape:
            raise CheckpointError(
                f"{checkpoint.directory}: tensor {name} has shape {list(found)} but config.json asks for {list(shape)}",
                hint="config and weights disagree: does this config.json belong to these weights?",
            )


def _converted_shape(checkpoint: Checkpoint, tensor: LazyTensor) -> tuple[int, ...]:
    """Shape that a conversion yields, found on the meta device: no weight is read."""
    if not isinstance(tensor, Converted):
        return tensor.shape
    converter: Any = copy.copy(tensor.converter)
    converter.collected_tensors = defaultdict(list)
    for pattern, stored in tensor.sources.items():
        converter.collected_tensors[pattern] = [
            torch.empty(source.shape, dtype=source.dtype, device="meta") for source in stored
        ]
    try:
        value = converter.convert(tensor.first_name, model=tensor.model, config=tensor.model.config)[tensor.name]
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint.directory}: the tensors of {tensor.name} do not fit together: {first_line(error)}",
            hint="config and weights disagree, or the checkpoint is incomplete",
        ) from error
    return tuple((value[0] if isinstance(value, list) else value).shape)
