"""The cache that a model is traced with: it takes note of what layers ask it to keep, and gives them one step alone."""

from __future__ import annotations

import sys
from collections import defaultdict
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.frontend.indexers import IndexedKeys, update_indexer
from moec.compiler.frontend.recording import Recording


class StepLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of the cache: it hands over the new keys and values unchanged and remembers them.

    No layer says that it has a previous state, which is what leads recurrent layers into their form for one new token.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, record: Recording, index: int, length: Any) -> None:
        self.record, self.index, self.length = record, index, length
        self.is_initialized = True
        self.has_previous_state = defaultdict(bool, {0: False})

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Nothing to set up: the past is an input."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Remember the new tokens' keys and values; `moec::attention` appends them."""
        self.record.fresh[self.index] = (key_states, value_states)
        return key_states, value_states

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Hand the new inputs [B, C, S] of a convolution back: it joins them to the ones before by itself.

        Raises:
            UnsupportedModelError: It is one of several, or of no given length.
        """
        if state_idx or conv_kernel_size is None:
            raise UnsupportedModelError(
                f"{self.record.where()} keeps more than the inputs of one convolution of known length",
                hint="moec families lists what works and why the rest does not",
            )
        self.record.conv_inputs[self.index] = conv_kernel_size
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Take note that the scan of a layer is over, whose state it has handed on already.

        Raises:
            UnsupportedModelError: It was none of those that moec knows.
        """
        record = self.record
        if (self.index, "recurrent") not in (record.states if record.past is None else record.present):
            raise UnsupportedModelError(
                f"{record.where()} keeps a recurrent state that it makes in a way of its own",
                hint="a scan that is none of those in moec/compiler/frontend/scans.py needs an adapter",
            )
        return recurrent_states

    def update_indexer(self, indexer_key_states: Tensor) -> IndexedKeys:
        """Take the new keys [B, S, D] of an indexer; `moec::indexer` appends and scores them."""
        return update_indexer(self.record, self.index, indexer_key_states)

    def get_seq_length(self) -> Any:
        """Number of tokens in the past."""
        return self.length

    def get_mask_sizes(self, query_length: Any) -> tuple[Any, int]:
        """Length and offset of the mask, of which only the pattern is used."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


def step_cache(record: Recording, layers: int, length: Any, kind: type[Cache] = Cache) -> Cache:
    """A cache of `layers` StepLayers whose past has `length` tokens.

    Args:
        record: What the layers write to.
        layers: How many.
        length: Tokens in the past, a number or a symbol.
        kind: Class of the cache, where a family takes none but its own.
    """
    own: list[Any] = [StepLayer(record, index, length) for index in range(layers)]
    if kind is Cache:
        return Cache(layers=own)
    cache = kind()
    cache.layers = own
    return cache


def cache_class(model: nn.Module) -> type[Cache]:
    """The class of cache that the modeling file of `model` defines for it, or that of all others."""
    scope = vars(sys.modules[type(model).__module__])
    own = (item for item in scope.values() if isinstance(item, type) and issubclass(item, Cache))
    return next((item for item in own if item.__module__ == type(model).__module__), Cache)


def check_convolutions(model: nn.Module, record: Recording) -> None:
    """Check, after a pass, that every convolution whose inputs were to be kept was one that moec knows.

    Raises:
        UnsupportedModelError: One was not.
    """
    if record.conv_inputs:
        raise UnsupportedModelError(
            f"{type(model).__name__}: layer {min(record.conv_inputs)} convolves in a way of its own",
            hint="moec families lists what works and why the rest does not",
        )
