"""The cache that a model is traced with: it records the states that layers ask it to keep, and holds no past."""

from __future__ import annotations

import sys
from collections import defaultdict
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.frontend.indexers import IndexedKeys, update_indexer
from moec.compiler.frontend.recording import Recording


class CacheUseError(AttributeError):
    """A layer asks its cache for something that moec does not know; `hasattr` answers no."""


class StepLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of the cache: it returns the new keys and values unchanged and records them.

    `has_previous_state` is always False: otherwise recurrent layers would take their branch for a single new token.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, record: Recording, index: int, length: Any) -> None:
        self.record, self.index, self.length = record, index, length
        self.is_initialized = True
        self.has_previous_state = defaultdict(bool, {0: False})

    def __getattr__(self, name: str) -> Any:
        raise CacheUseError(f"it keeps a state that moec does not know: its cache has no {name}")

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Nothing to set up: the past is an input."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Record the keys and values of the new tokens; `moec::attention` appends them to the past."""
        self.record.fresh[self.index] = (key_states, value_states)
        return key_states, value_states

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Return the new inputs [B, C, S] of a convolution; `moec::causal_conv` joins them to the past ones.

        Raises:
            UnsupportedModelError: The layer has several convolutions, or states no kernel size.
        """
        if state_idx or conv_kernel_size is None:
            raise UnsupportedModelError(
                f"{self.record.where()} keeps the inputs of several convolutions, or of one without a kernel size",
                hint="moec families lists what works and why the rest does not",
            )
        self.record.conv_inputs[self.index] = conv_kernel_size
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Check that a scan that moec knows has recorded the state already, and return it unchanged.

        Raises:
            UnsupportedModelError: The layer computed its state in another way.
        """
        record = self.record
        if (self.index, "recurrent") not in (record.states if record.past is None else record.present):
            raise UnsupportedModelError(
                f"{record.where()} keeps a recurrent state that no scan known to moec computed",
                hint="a scan that is not in compiler/frontend/scans.py needs an adapter",
            )
        return recurrent_states

    def update_indexer(self, indexer_key_states: Tensor) -> IndexedKeys:
        """Record the new keys [B, S, D] of an indexer; `moec::indexer` appends them to the past and scores them."""
        return update_indexer(self.record, self.index, indexer_key_states)

    def get_seq_length(self) -> Any:
        """Number of tokens in the past."""
        return self.length

    def get_mask_sizes(self, query_length: Any) -> tuple[Any, int]:
        """Length and offset of the mask; only the pattern of the mask is used."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


def step_cache(record: Recording, layers: int, length: Any, kind: type[Cache] = Cache) -> Cache:
    """A cache of `layers` StepLayers whose past has `length` tokens.

    Args:
        record: The recording that the layers write to.
        layers: Number of layers.
        length: Tokens in the past, a number or a symbol.
        kind: Class of the cache, for a family that accepts only its own class.
    """
    own: list[Any] = [StepLayer(record, index, length) for index in range(layers)]
    if kind is Cache:
        return Cache(layers=own)
    cache = kind()
    cache.layers = own
    return cache


def cache_class(model: nn.Module) -> type[Cache]:
    """The cache class that the modeling file of `model` defines, or else `Cache`."""
    scope = vars(sys.modules[type(model).__module__])
    own = (item for item in scope.values() if isinstance(item, type) and issubclass(item, Cache))
    return next((item for item in own if item.__module__ == type(model).__module__), Cache)


def check_convolutions(model: nn.Module, record: Recording) -> None:
    """Check after a forward pass that every convolution with inputs in the cache ran as `causal_conv1d_fn`.

    Raises:
        UnsupportedModelError: One did not.
    """
    if record.conv_inputs:
        raise UnsupportedModelError(
            f"{type(model).__name__}: layer {min(record.conv_inputs)} keeps the inputs of a convolution that moec does "
            "not know",
            hint="moec families lists what works and why the rest does not",
        )
