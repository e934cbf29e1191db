"""Turns the indexer of sparse attention (DeepSeek-V3.2, GLM-5 and others) into `moec::indexer` while a model is traced.

The modeling files of transformers score the keys of the cache by plain tensor operations, whose shapes depend on the
past:

```
k = cache.update_indexer(k, layer_idx)                                          [B, T, D]
scores = relu(matmul(q, k.transpose(-1, -2).unsqueeze(1)) * scale)              [B, S, H, T]
index_scores = matmul(weights.unsqueeze(-2), scores).squeeze(-2)                [B, S, T]
indices = index_scores.masked_fill(~mask, -inf).topk(min(index_topk, T)).indices
attention_function(..., mask, indices=indices)
```

During a trace, the cache returns an `IndexedKeys` in place of `k`. It supports exactly these operations in this order,
and records their operands. Any other operation on it is an error that names the module.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.frontend.masks import InvertedMask, Mask
from moec.compiler.frontend.recording import Recording
from moec.compiler.ir.indexer import INDEXER

KIND = "index_key"
"""Kind of the state with the keys of an indexer, as in `moec.compiler.ir.program.StateSpec`."""


@dataclass(frozen=True)
class _StandIn:
    """Base class of the stand-ins: an operation that a stand-in does not support is an error."""

    record: Recording

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python and torch look up such names
            raise AttributeError(name)
        raise self._unknown(name)

    def _unknown(self, operation: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.record.where()}: its indexer scores tokens in a way that moec does not know ({operation})",
            hint="to support it, extend compiler/frontend/indexers.py",
        )

    def _check(self, holds: bool, operation: str) -> None:
        if not holds:
            raise self._unknown(operation)


@dataclass(frozen=True)
class IndexedKeys(_StandIn):
    """Stands for the keys of the cache, [B, T, D].

    Attributes:
        layer: Index of the layer.
        key: Keys of the new tokens, [B, S, D].
        axes: The axes of the tensor after the operations so far.
    """

    layer: int
    key: Tensor
    axes: str = "BTD"

    def transpose(self, first: int, second: int) -> IndexedKeys:
        """[B, D, T]."""
        self._check(self.axes == "BTD" and {first, second} == {-1, -2}, "transpose")
        return dataclasses.replace(self, axes="BDT")

    def float(self) -> IndexedKeys:
        """Unchanged, since scores are computed in float32 anyway."""
        return self

    def unsqueeze(self, axis: int) -> IndexedKeys:
        """[B, 1, D, T]."""
        self._check(self.axes == "BDT" and axis == 1, "unsqueeze")
        return dataclasses.replace(self, axes="B1DT")

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], _: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """`torch.matmul(query, keys)`."""
        keys = next(item for item in args if isinstance(item, IndexedKeys))
        known = function in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and len(args) == 2 and args[1] is keys
        keys._check(known and not kwargs and keys.axes == "B1DT", getattr(function, "__name__", "a function"))
        return IndexerScores(keys.record, keys, args[0])


@dataclass(frozen=True)
class IndexerScores(_StandIn):
    """Stands for the scores of the tokens: [B, S, H, T] per head, and [B, S, T] after they are weighted.

    Attributes:
        keys: The keys.
        query: [B, S, H, D].
        scale: Factor on the products.
        rectified: Whether ReLU was applied to the products.
        weights: Weight of each head, [B, S, 1, H]; None before they are applied.
        squeezed: Whether the axis of size 1 was removed.
        mask: The mask of visible tokens; None before it is applied.
    """

    keys: IndexedKeys
    query: Tensor
    scale: float = 1.0
    rectified: bool = False
    weights: Tensor | None = None
    squeezed: bool = False
    mask: Mask | None = None

    def __mul__(self, factor: Any) -> IndexerScores:
        """Multiply by a positive number, before the weights are applied."""
        self._check(isinstance(factor, int | float) and factor > 0 and self.weights is None, "multiplication")
        return dataclasses.replace(self, scale=self.scale * factor)

    def squeeze(self, axis: int) -> IndexerScores:
        """[B, S, 1, T] -> [B, S, T]."""
        self._check(self.weights is not None and axis == -2, "squeeze")
        return dataclasses.replace(self, squeezed=True)

    def masked_fill(self, mask: Any, value: float) -> IndexerScores:
        """Apply the inverted mask, so that tokens that are not visible are never selected."""
        self._check(self.squeezed and isinstance(mask, InvertedMask) and value == -torch.inf, "masked_fill")
        return dataclasses.replace(self, mask=mask.mask)

    @property
    def shape(self) -> tuple[Any, ...]:
        """[B, S, T] with a T above any number of tokens to select, since `moec::indexer` handles a smaller T itself."""
        return (*self.query.shape[:2], sys.maxsize)

    def topk(self, k: int, dim: int = -1) -> SelectedTokens:
        """Emit `moec::indexer` with the recorded operands."""
        mask, weights = self.mask, self.weights
        if mask is None or weights is None or not (self.rectified and dim == -1 and isinstance(k, int)):
            raise self._unknown("topk")
        record, keys = self.record, self.keys
        if record.past is None:
            return SelectedTokens(record, None)
        pattern, past = mask.pattern(), record.past[keys.layer, KIND]
        selected, present = INDEXER(
            self.query,
            # A norm in float32 may make keys in float32 (dots3); the cache has the dtype of the graph.
            keys.key.unsqueeze(1).to(past.dtype),
            weights.squeeze(-2),
            past,
            record.cache_position,
            record.attention_mask,
            self.scale,
            pattern.kind,
            pattern.window,
            k,
        )
        record.present[keys.layer, KIND] = present
        return SelectedTokens(record, selected)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], _: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """`relu(scores)` and `torch.matmul(weights, scores)`."""
        scores = next(item for item in args if isinstance(item, IndexerScores))
        if function in (F.relu, torch.relu) and scores.weights is None:
            return dataclasses.replace(scores, rectified=True)
        known = function in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and len(args) == 2 and args[1] is scores
        known = known and scores.rectified and scores.weights is None and not kwargs
        scores._check(known, getattr(function, "__name__", "a function"))
        return dataclasses.replace(scores, weights=args[0])


@dataclass(frozen=True)
class SelectedTokens(_StandIn):
    """Stands for the indices of the selected tokens, which a layer passes to its attention function or the next layer.

    Attributes:
        mask: [B, S, T] bool, true for selected tokens; None in the first pass, which finds the shapes of the states.
    """

    mask: Tensor | None

    @property
    def indices(self) -> SelectedTokens:
        """The second result of `topk`."""
        return self

    def to(self, dtype: torch.dtype) -> SelectedTokens:
        """Unchanged by a cast to another integer type."""
        self._check(not dtype.is_floating_point, "to")
        return self


def update_indexer(record: Recording, layer: int, key: Tensor) -> IndexedKeys:
    """The stand-in for the keys of the cache, for an indexer that adds the keys `key` [B, S, D] of the new tokens."""
    if record.past is None:
        record.states.setdefault((layer, KIND), (("batch", 1, "past_sequence", int(key.shape[-1])), key.dtype))
    return IndexedKeys(record, layer, key)
