"""States: tensors that outlive a prediction, such as a key-value cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moec.compiler.common.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moec.targets.coreml.executor.dtypes import Array, TensorType


class State:
    """The states of one conversation, initially zero; sessions of several functions may share them.

    Args:
        types: Type of each state by name.

    Raises:
        ArtifactError: A state has no fixed shape.
    """

    def __init__(self, types: Mapping[str, TensorType]) -> None:
        self._types = dict(types)
        self._arrays: dict[str, Array] = {}
        self.reset()

    def reset(self) -> None:
        """Set every state to zero."""
        for name, declared in self._types.items():
            shape = tuple(size for size in declared.shape or () if size is not None)
            if declared.shape is None or len(shape) != len(declared.shape):
                raise ArtifactError(f"state {name} has no fixed shape: {declared}", hint="export the model again")
            self._arrays[name] = np.zeros(shape, declared.element.numpy)

    def __iter__(self) -> Iterator[str]:
        return iter(self._types)

    def type(self, name: str) -> TensorType:
        """Declared type of the state `name`. Raises UsageError if there is none."""
        if name not in self._types:
            raise UsageError(f"no state is called {name}", hint=f"its states: {', '.join(self._types) or 'none'}")
        return self._types[name]

    def read(self, name: str) -> Array:
        """Content of the state `name`, which must not be modified. Raises UsageError if there is none."""
        self.type(name)
        return self._arrays[name]

    def write(self, name: str, value: Array) -> None:
        """Replace the content of the state `name`, converting to its element type.

        Raises:
            UsageError: No such state, or `value` has another shape.
        """
        declared = self.type(name)
        if not declared.admits(value.shape):
            raise UsageError(f"state {name} is {declared}, not of shape {value.shape}")
        self._arrays[name] = value.astype(declared.element.numpy)
