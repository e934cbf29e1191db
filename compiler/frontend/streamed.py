"""A model of transformers whose large weights are read from the checkpoint when they are used, and not kept.

A large parameter is a tensor without values. When a function of torch gets it, the values are read and given to the
function in its place; `parameter[expert]` reads one expert of a stack. So the code of transformers runs unchanged, and
memory holds one weight, or one expert, at a time.

`moec.compiler.frontend.turns` lets several sequences run through the model together: each weight is read once for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from moec.compiler.frontend.turns import Request, ask
from moec.compiler.ir.weights import LazyTensor, WeightStore

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel

SMALLEST = 1 << 20
"""Bytes from which a parameter is read when it is used; smaller ones are kept."""

_WITHOUT_VALUES = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_meta")),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__),
    }
)
"""What can be asked of a tensor without its values."""


class Streamed(Tensor):
    """A parameter whose values are read when they are used."""

    weight: LazyTensor
    place: tuple[int, int]
    """Places of the module in the model and of the parameter in the module, which give the order of requests."""

    @staticmethod
    def of(parameter: Tensor, weight: LazyTensor, place: tuple[int, int]) -> Streamed:
        """The parameter in place of `parameter`, whose dtype it has, with the values of `weight`."""
        # Code that gets by without __torch_function__ would compute NaN.
        nothing = torch.full((), torch.nan, dtype=parameter.dtype).expand(parameter.shape)
        made: Streamed = Tensor._make_subclass(Streamed, nothing)
        made.weight, made.place = weight, place
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call `func` with values; see the module."""
        with torch._C.DisableTorchFunctionSubclass():
            if func not in _WITHOUT_VALUES:
                if func is Tensor.__getitem__ and (row := args[0]._row(args[1])) is not None:
                    return row
                args, kwargs = tree_map_only(Streamed, Streamed._values, (tuple(args), dict(kwargs or {})))
            return func(*args, **(kwargs or {}))

    def _values(self) -> Tensor:
        module, own = self.place
        return ask(Request((module, -1, own), lambda: self.weight.read().to(self.dtype)))

    def _row(self, index: Any) -> Tensor | None:
        """Entry `index` along axis 0; None if `index` is not one number."""
        if isinstance(index, bool) or not isinstance(index, int | Tensor):
            return None
        if isinstance(index, Tensor) and (index.ndim or index.dtype not in {torch.int32, torch.int64}):
            return None
        number = range(self.shape[0])[int(index)]
        module, own = self.place
        return ask(Request((module, number, own), lambda: self.weight.rows(number, number + 1)[0].to(self.dtype)))


def stream_weights(model: PreTrainedModel, weights: WeightStore) -> None:
    """Give `model`, which is on the meta device, the values of `weights`: large parameters when they are used.

    Args:
        model: The model; its non-persistent buffers have values.
        weights: A tensor for every parameter and persistent buffer.
    """
    for place, (path, module) in enumerate(model.named_modules()):
        prefix = f"{path}." if path else ""
        for own, (name, parameter) in enumerate(list(module._parameters.items())):
            if parameter is not None:
                module._parameters[name] = _parameter(parameter, weights[prefix + name], (place, own))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = weights[prefix + name].read().to(buffer.dtype)


def _parameter(parameter: Tensor, weight: LazyTensor, place: tuple[int, int]) -> Any:
    if parameter.numel() * parameter.element_size() >= SMALLEST and parameter.is_floating_point() and parameter.ndim:
        return Streamed.of(parameter, weight, place)
    return nn.Parameter(weight.read().to(parameter.dtype), requires_grad=False)
