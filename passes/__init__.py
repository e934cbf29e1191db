"""Graph passes, one per file. Their order is defined in `default_passes`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint

from moec.compiler.common.errors import MoecError, UsageError
from moec.compiler.common.plugins import load_plugins
from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.invariants import check_invariants
from moec.compiler.ir.program import Program
from moec.passes.base import Pass, PassResult
from moec.passes.canonical.common_subexpressions import CommonSubexpressions
from moec.passes.canonical.dead_code import DeadCode
from moec.passes.canonical.fold_weights import FoldWeights
from moec.passes.canonical.masked_writes import MaskedWrites
from moec.passes.canonical.normalize import Normalize
from moec.passes.canonical.real_rotary import RealRotary
from moec.passes.canonical.slice_writes import SliceWrites
from moec.passes.canonical.unify_sizes import UnifySizes
from moec.passes.decompose.decompose import Decompose
from moec.passes.experts.canonical_experts import CanonicalExperts
from moec.passes.fuse.rms_norm import RmsNorm
from moec.passes.fuse.rotary import Rotary

GROUP = "moec.passes"


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What one pass did: an entry of the pass log."""

    name: str
    modified: bool
    rejections: tuple[Rejection, ...]


def default_passes(extra: Iterable[EntryPoint] | None = None) -> tuple[Pass, ...]:
    """The passes that run for every target, in order; those of third parties come last.

    Args:
        extra: Entry points of third parties; None: those installed in the group `moec.passes`.

    Raises:
        UsageError: Two passes have the same name, or an entry point is not a Pass.
    """
    own = (
        UnifySizes(),
        Normalize(),
        MaskedWrites(),
        SliceWrites(),
        FoldWeights(),
        RealRotary(),
        CanonicalExperts(),
        CommonSubexpressions(),
        RmsNorm(),
        Rotary(),
        # Clean up after the two passes above: adjacent transpositions, and tables that several layers compute.
        Normalize(),
        Decompose(),
        CommonSubexpressions(),
        DeadCode(),
    )
    added = load_plugins(GROUP, Pass, {item.name for item in own}, extra)  # type: ignore[type-abstract]
    return (*own, *(loaded() for loaded in added.values()))


def check_order(passes: Sequence[Pass], completed: Sequence[str] = ()) -> None:
    """Check, before any pass runs, that every pass comes after those that it requires.

    Args:
        passes: The passes to run.
        completed: Names of the passes that have already run on the program.

    Raises:
        UsageError: A required pass is missing; the message names all of them.
    """
    done: set[str] = set(completed)
    missing: list[str] = []
    for item in passes:
        missing += [f"{item.name} needs {name} before it" for name in item.requires if name not in done]
        done.add(item.name)
    if missing:
        raise UsageError(f"the passes cannot run in this order: {'; '.join(missing)}", hint="see moec.passes")


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    on_pass: Callable[[PassRecord], None] | None = None,
    *,
    completed: Sequence[str] = (),
) -> tuple[Program, tuple[PassRecord, ...]]:
    """Run `passes` in order, and check the invariants before the first and after each.

    Args:
        program: The program to start from.
        passes: The passes to run.
        on_pass: Called after each pass.
        completed: Names of the passes that have already run on `program`.

    Returns:
        The program after the last pass, and the pass log.

    Raises:
        UsageError: The order is wrong.
        MoecError: A pass failed or broke an invariant; the message names the pass.
    """
    check_order(passes, completed)
    check_invariants(program, completed)
    log: list[PassRecord] = []
    for item in passes:
        result = _run(item, program, [*completed, *(record.name for record in log)])
        program = result.program
        record = PassRecord(item.name, result.modified, result.rejections)
        log.append(record)
        if on_pass is not None:
            on_pass(record)
    return program, tuple(log)


def _run(item: Pass, program: Program, completed: Sequence[str]) -> PassResult:
    """Run one pass and check the invariants; errors name the pass."""
    try:
        result = item.run(program)
        check_invariants(result.program, [*completed, item.name])
    except MoecError as error:
        # Keep the error's class, which determines the exit code.
        error.message = f"pass {item.name}: {error.message}"
        error.args = (error.message,)
        raise
    except Exception as error:
        raise MoecError(
            f"pass {item.name} failed: {type(error).__name__}: {error}",
            hint="this is a bug in moec or in the package that provides the pass: please report it",
        ) from error
    return result
