"""What lowering functions work with: the MIL builder, values by fx node, constants, sizes, weights and states."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from moec.compiler.common.digest import sha256_of_text
from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.program import Program, module_of
from moec.compiler.ir.weights import LazyTensor
from moec.targets.coreml.weights import WeightPool

if TYPE_CHECKING:
    from moec.targets.coreml.state import States

Var = Any
"""A value of the MIL builder; coremltools has no type annotations."""

MIL_NAMES: Mapping[torch.dtype, str] = {
    torch.float32: "fp32",
    torch.float64: "fp32",
    torch.float16: "fp16",
    torch.int64: "int32",
    torch.int32: "int32",
    torch.int16: "int32",
    torch.int8: "int32",
    torch.uint8: "int32",
    torch.bool: "bool",
}
NUMPY: Mapping[str, Any] = {"fp32": np.float32, "fp16": np.float16, "int32": np.int32, "bool": np.bool_}


@dataclass(frozen=True)
class Settings:
    """Settings of one function.

    Attributes:
        context: Tokens that the KV cache holds.
        chunk: Maximum number of tokens per call.
        skip_experts: Whether each expert is a branch, which is skipped where no token needs it.
    """

    context: int
    chunk: int
    skip_experts: bool


@dataclass(frozen=True)
class Cache:
    """The KV cache of one function, for attention.

    Attributes:
        names: Placeholder of a state -> name of the state in the Program.
        states: Reads and writes the states.
        first_slot: Slot of the token at position 0, int32 [1]; None: 0.
    """

    names: Mapping[fx.Node, str]
    states: States
    first_slot: Var | None


class Context:
    """State of the lowering of one function.

    Args:
        program: The Program to lower.
        mb: coremltools' MIL builder, inside the function.
        pool: Weights of all functions of the model, each stored once.
        settings: Settings of this function.

    Attributes:
            expert_tensors: Stack of experts -> name of their constants, with `{}` for the index of the expert.
    """

    def __init__(self, program: Program, mb: Any, pool: WeightPool, settings: Settings) -> None:
        self.program, self.mb, self.pool, self.settings = program, mb, pool, settings
        self.expert_tensors: dict[str, str] = {}
        self._cache: Cache | None = None
        self.rejections: list[Rejection] = []
        self.memo: dict[Any, Any] = {}
        self._values: dict[fx.Node, Any] = {}

    @property
    def cache(self) -> Cache:
        """The KV cache; `bind_cache` must have been called."""
        assert self._cache is not None, "attention is lowered before bind_cache was called"
        return self._cache

    def bind_cache(self, cache: Cache) -> None:
        """Set the KV cache. It consists of values of this context, so it cannot be given to the constructor."""
        self._cache = cache

    # Values -----------------------------------------------------------------------------------------------------

    def set(self, node: fx.Node, value: Any) -> None:
        """Record what `node` was lowered to."""
        self._values[node] = value

    def get(self, argument: Any) -> Any:
        """What an argument was lowered to: a Var for a tensor; numbers and lists unchanged."""
        if isinstance(argument, fx.Node):
            return self.weight(argument) if argument.op == "get_attr" else self._values[argument]
        if isinstance(argument, list | tuple):
            return [self.get(item) for item in argument]
        return argument

    def tensor(self, argument: Any, dtype: torch.dtype | None = None) -> Var:
        """`argument` as a Var, cast to `dtype` if it has another one."""
        if isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor):
            value, have = self.get(argument), MIL_NAMES[argument.meta["val"].dtype]
            return value if dtype is None or MIL_NAMES[dtype] == have else self.cast(value, MIL_NAMES[dtype])
        if isinstance(argument, fx.Node):
            size = self.size(argument)
            return size if dtype is None else self.cast(size, MIL_NAMES[dtype])
        if dtype is None:
            dtype = torch.float32 if isinstance(argument, float) else torch.int64
        return self.constant(number(argument, dtype))

    def cast(self, value: Var, name: str) -> Var:
        """`value` cast to the MIL type `name`; unchanged if it has that type."""
        have = self.type_name(value)
        return value if have == name else self.mb.cast(x=value, dtype=self.text(name))

    def type_name(self, value: Var) -> str:
        """MIL's name of the element type of `value`."""
        return {"float16": "fp16", "float32": "fp32", "int": "int32", "int64": "int32", "uint": "int32"}.get(
            name := str(np.dtype(self.pool.numpy_type(value)).name), name
        )

    # Operators: see `moec.targets.common.lowerings.Operators` -----------------------------------------------------

    def transpose(self, value: Var, axes: Sequence[int]) -> Var:
        """`value` with its axes in another order."""
        return self.mb.transpose(x=value, perm=self.ints(*axes))

    def unsqueeze(self, value: Var, axes: Sequence[int]) -> Var:
        """`value` with new axes of length 1; `axes` are their indices in the result."""
        return self.mb.expand_dims(x=value, axes=self.ints(*axes))

    def squeeze(self, value: Var, axes: Sequence[int]) -> Var:
        """`value` without these axes."""
        return self.mb.squeeze(x=value, axes=self.ints(*axes))

    def concat(self, parts: Sequence[Var], axis: int) -> Var:
        """`parts` concatenated along an axis."""
        return self.mb.concat(values=list(parts), axis=axis)

    def split(self, value: Var, sizes: Sequence[int], axis: int) -> Sequence[Var]:
        """`value` cut along an axis into pieces of `sizes`."""
        if len(sizes) == 1:
            return [value]
        parts: Sequence[Var] = self.mb.split(x=value, split_sizes=list(sizes), axis=axis)
        return parts

    def tile(self, value: Var, times: Sequence[Any]) -> Var:
        """`value` repeated along each axis; booleans are cast to integers and back, since `tile` does not take them."""
        if all(count == 1 for count in times):
            return value
        kind = self.type_name(value)
        carried = self.cast(value, "int32") if kind == "bool" else value
        return self.cast(self.mb.tile(x=carried, reps=self.dims(times)), kind)

    def size_arithmetic(self, name: str, *sizes: Var) -> Var:
        """Arithmetic on sizes; with a single operand (negation), 0 is the first."""
        left, right = (self.size(0), *sizes)[-2:]
        return getattr(self.mb, {"floordiv": "floor_div", "neg": "sub"}.get(name, name))(x=left, y=right)

    def take(self, source: fx.Node, places: fx.Node, axis: int) -> Var:
        """`source` at the indices `places` along an axis; negative indices count from the end."""
        index = self.mb.mod(x=self.tensor(places, torch.int32), y=self.axis_length(source, axis))
        return self.mb.gather(x=self.tensor(source), indices=index, axis=axis, validate_indices=self.constant(False))

    @contextlib.contextmanager
    def branch(self) -> Iterator[None]:
        """Enter a branch of `cond`: shared values that are made inside are not reused outside."""
        outer = self.memo
        self.memo = dict(outer)
        try:
            yield
        finally:
            self.memo = outer

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of `make()`, called once for each `key`: masks and sizes that all layers share."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    # Constants and weights --------------------------------------------------------------------------------------

    def constant(self, value: Any, dtype: Any = None) -> Var:
        """A small constant; equal constants of a block are one."""
        array = np.array(value, dtype=dtype, order="C")
        key = ("constant", array.dtype.str, array.shape, array.tobytes())
        scalar = array.item() if array.dtype == np.bool_ and not array.shape else array[()]

        def make() -> Var:
            made = self.mb.const(val=scalar)
            # Constants of the same id share one entry of the weight file across functions; large ones are stored there.
            made.op.weight_id = f"constant {sha256_of_text(repr(key))}"
            return made

        return self.shared(key, make)

    def text(self, value: str) -> Var:
        """A text constant."""
        return self.shared(("text", value), lambda: self.mb.const(val=value))

    def ints(self, *values: int) -> Var:
        """A 1-D int32 constant."""
        return self.constant(np.asarray(values, dtype=np.int32))

    def zeros(self, width: int, dtype: torch.dtype) -> Var:
        """A bias of zeros, shared: the builder would store another one for every `linear` without a bias."""
        name = MIL_NAMES[dtype]
        array = np.zeros(width, NUMPY[name])
        return self.shared(("zeros", width, name), lambda: self.pool.const(self.mb, f"zeros_{name}_{width}", array))

    def weight(self, node: fx.Node) -> Var:
        """The Program's tensor that a `get_attr` node names, in the dtype of the graph."""
        name = self.program.weights.resolve(str(node.target))
        dtype = node.meta["val"].dtype
        tensor = self.program.weights[name]
        return self.shared(("weight", name, dtype), lambda: self.pool.tensor(self.mb, name, tensor, MIL_NAMES[dtype]))

    def lazy(self, node: fx.Node) -> LazyTensor:
        """The lazy tensor behind a `get_attr` node."""
        return self.program.weights[str(node.target)]

    # Sizes ------------------------------------------------------------------------------------------------------

    def size(self, argument: Any) -> Var:
        """A size as an int32 scalar; its ops are made on first use."""
        if isinstance(argument, int):
            return self.constant(np.int32(min(argument, np.iinfo(np.int32).max)))
        value = self._values[argument]
        return value() if callable(value) else value

    def dims(self, sizes: Sequence[Any]) -> Any:
        """A list of sizes, each an integer or a node: a list if all are integers, else a 1-D int32 Var."""
        if all(isinstance(size, int) for size in sizes):
            return self.ints(*sizes)
        parts = [
            self.ints(size) if isinstance(size, int) else self.mb.expand_dims(x=self.size(size), axes=self.ints(0))
            for size in sizes
        ]
        return self.mb.concat(values=parts, axis=self.constant(np.int32(0)))

    def axis_length(self, node: fx.Node, axis: int) -> Var:
        """Length of one axis of a tensor, as an int32 scalar; equal lengths share one value."""
        size = node.meta["val"].shape[axis]
        if isinstance(size, int):
            return self.constant(np.int32(size))

        def make() -> Var:
            shape = self.mb.shape(x=self.get(node))
            index = axis % len(node.meta["val"].shape)
            return self.mb.gather(x=shape, indices=np.int32(index), axis=0, validate_indices=False)

        return self.shared(("size", str(size)), make)

    # Messages ---------------------------------------------------------------------------------------------------

    def reject(self, node: fx.Node, reason: str) -> None:
        """Record why `node` was not lowered to the fastest form."""
        self.rejections.append(Rejection("coreml", module_of(node), reason))


def number(value: Any, dtype: torch.dtype) -> Any:
    """A Python number or list as a numpy array; integers are clipped to the range of int32, MIL's widest type."""
    kind = NUMPY[MIL_NAMES[dtype]]
    if kind is np.int32:
        limits = np.iinfo(np.int32)
        return np.clip(np.asarray(value, np.int64), limits.min, limits.max).astype(np.int32)
    return np.asarray(value, dtype=kind)
