"""The contract of a pass: Program in, Program out, and the truth about what was done."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moec.compiler.common.rejections import Rejection

if TYPE_CHECKING:
    from moec.compiler.ir.program import Program


@dataclass(frozen=True)
class PassResult:
    """The program after a pass, whether the pass changed it, and what it left alone although it is made for it."""

    program: Program
    modified: bool
    rejections: tuple[Rejection, ...] = ()


@dataclass(frozen=True)
class Pass(ABC):
    """A named rewrite. Its dataclass fields are its options.

    `requires` names passes that must have run before; the pipeline checks that before it runs anything.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """Return the rewritten program. `program` itself stays as it is: rewrite a copy of its graph."""
