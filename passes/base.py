"""The interface of a pass: it takes a Program and returns a Program, with a record of what it did."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moec.compiler.common.rejections import Rejection

if TYPE_CHECKING:
    from moec.compiler.ir.program import Program


@dataclass(frozen=True)
class PassResult:
    """The program after a pass, whether the pass changed it, and near-matches that it left unchanged, with reasons."""

    program: Program
    modified: bool
    rejections: tuple[Rejection, ...] = ()


@dataclass(frozen=True)
class Pass(ABC):
    """A named rewrite. Its dataclass fields are its options.

    `requires` names passes that must have run before; the pipeline checks this before it runs any pass.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """Return the rewritten program. `program` itself must not change: rewrite a copy of its graph."""
