"""Rewrite complex arithmetic in real numbers, since most targets have no complex tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.ir.program import Program, module_of
from moec.passes.base import Pass, PassResult
from moec.passes.rewriting import Rewrite, aten, call, is_call, substitute

Pair = tuple[fx.Node, fx.Node]
"""Real and imaginary part of a complex tensor."""


@dataclass(frozen=True)
class RealRotary(Pass):
    """Replace complex tensors, which some rotary embeddings use, by pairs of real ones.

    ```
    %c = polar(ones_like(%t), %t); %z = view_as_complex(%x); %y = view_as_real(mul(%z, %c))
    ->
    %cos = cos(%t); %sin = sin(%t); %a = select(%x, -1, 0); %b = select(%x, -1, 1)
    %y = stack([sub(mul(%a, %cos), mul(%b, %sin)), add(mul(%a, %sin), mul(%b, %cos))], -1)
    ```
    """

    name: ClassVar[str] = "real-rotary"
    requires: ClassVar[tuple[str, ...]] = ("normalize",)

    def run(self, program: Program) -> PassResult:
        """See the class.

        Raises:
            UnsupportedModelError: An op on a complex tensor is not supported.
        """
        rewrite = Rewrite(program)
        graph = rewrite.graph
        writer = _Writer(graph)
        for node in list(graph.nodes):
            writer.visit(node)
        for node in reversed(graph.nodes):
            if _is_complex(node) and not node.users:
                graph.erase_node(node)
        return rewrite.result(modified=bool(writer.pairs))


class _Writer:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.pairs: dict[fx.Node, Pair] = {}

    def visit(self, node: fx.Node) -> None:
        """Emit real and imaginary part of a complex node, or replace a real node that reads parts of a complex one."""
        if node.op != "call_function":
            if _is_complex(node):
                raise _unsupported(node)
            return
        with self.graph.inserting_before(node):
            if _is_complex(node):
                self.pairs[node] = self._parts(node)
            elif any(source in self.pairs for source in node.all_input_nodes):
                substitute(node, self._real(node))

    def _emit(self, node: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
        return call(self.graph, target, *args, like=node)

    def _real(self, node: fx.Node) -> fx.Node:
        """Emit an op with a real result on complex tensors."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        real, imaginary = self.pairs[source]
        if node.target is aten.view_as_real.default:
            return self._emit(node, aten.stack.default, [real, imaginary], -1)
        if node.target is aten.real.default:
            return real
        if node.target is aten.imag.default:
            return imaginary
        raise _unsupported(node)

    def _parts(self, node: fx.Node) -> Pair:
        source = node.args[0]
        if node.target is aten.polar.default:
            return self._polar(node)
        if node.target is aten.view_as_complex.default:
            return self._emit(node, aten.select.int, source, -1, 0), self._emit(node, aten.select.int, source, -1, 1)
        if node.target is aten.complex.default:
            real, imaginary = node.args[:2]
            assert isinstance(real, fx.Node)
            assert isinstance(imaginary, fx.Node)
            return real, imaginary
        if node.target is aten.mul.Tensor:
            return self._product(node)
        if node.target is aten.where.self:
            return self._choice(node)
        if node.target in _SHAPE_OPS:
            assert isinstance(source, fx.Node)
            real, imaginary = self.pairs[source]
            return self._moved(node, real), self._moved(node, imaginary)
        raise _unsupported(node)

    def _choice(self, node: fx.Node) -> Pair:
        condition, first, second = node.args
        assert isinstance(first, fx.Node)
        assert isinstance(second, fx.Node)
        real, imaginary = zip(self.pairs[first], self.pairs[second], strict=True)
        return self._emit(node, aten.where.self, condition, *real), self._emit(
            node, aten.where.self, condition, *imaginary
        )

    def _moved(self, node: fx.Node, part: fx.Node) -> fx.Node:
        assert callable(node.target)
        return self._emit(node, node.target, part, *node.args[1:])

    def _polar(self, node: fx.Node) -> Pair:
        radius, angle = node.args[:2]
        cosine, sine = self._emit(node, aten.cos.default, angle), self._emit(node, aten.sin.default, angle)
        if is_call(radius, aten.ones_like.default):
            return cosine, sine
        return self._emit(node, aten.mul.Tensor, radius, cosine), self._emit(node, aten.mul.Tensor, radius, sine)

    def _product(self, node: fx.Node) -> Pair:
        def times(a: Any, b: Any) -> fx.Node:
            return self._emit(node, aten.mul.Tensor, a, b)

        first, second = node.args[:2]
        left = self.pairs.get(first) if isinstance(first, fx.Node) else None
        right = self.pairs.get(second) if isinstance(second, fx.Node) else None
        if left is None or right is None:
            pair, factor = (right, first) if left is None else (left, second)
            assert pair is not None
            return times(pair[0], factor), times(pair[1], factor)
        (a, b), (c, d) = left, right
        real = self._emit(node, aten.sub.Tensor, times(a, c), times(b, d))
        return real, self._emit(node, aten.add.Tensor, times(a, d), times(b, c))


_SHAPE_OPS = frozenset(
    {
        aten.unsqueeze.default,
        aten.reshape.default,
        aten.transpose.int,
        aten.permute.default,
        aten.slice.Tensor,
        aten.expand.default,
        aten.select.int,
        aten.index_select.default,
    }
)
"""Ops that only move elements, and so apply to both parts in the same way."""


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.is_complex


def _unsupported(node: fx.Node) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{module_of(node)}: {node.target} on complex tensors is not supported",
        hint="add the op to RealRotary in moec/passes/canonical/real_rotary.py",
    )
