"""Graph passes: one file, one pass, one job. The order is the one list in `default_passes`."""

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
    """What one pass did: an entry of the log."""

    name: str
    modified: bool
    rejections: tuple[Rejection, ...]


def default_passes(extra: Iterable[EntryPoint] | None = None) -> tuple[Pass, ...]:
    """The passes that every target starts from, in order; those of third parties come last.

    Args:
        extra: Entry points of third parties; None: those installed in the group `moec.passes`.

    Raises:
        UsageError: Two passes claim one name, or an entry point is no Pass.
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
        # What the last two leave: transpositions that meet, and tables that several layers derive alike.
        Normalize(),
        Decompose(),
        CommonSubexpressions(),
        DeadCode(),
    )
    added = load_plugins(GROUP, Pass, {item.name for item in own}, extra)  # type: ignore[type-abstract]
    return (*own, *(loaded() for loaded in added.values()))


def check_order(passes: Sequence[Pass], completed: Sequence[str] = ()) -> None:
    """Check, before anything runs, that every pass comes after those that it requires.

    Args:
        passes: What is to run.
        completed: Names of the passes that the program has had.

    Raises:
        UsageError: One does not; every missing requirement is named.
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
    """Run `passes` in order, with the invariants checked before the first and after each.

    Args:
        program: Where to start.
        passes: What to run.
        on_pass: Called after each pass.
        completed: Names of the passes that `program` has had.

    Returns:
        The program after the last pass, and the log.

    Raises:
        UsageError: The order is wrong.
        MoecError: A pass failed, or broke an invariant; the message names it.
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
    """Run one pass and check what it left; whatever fails names the pass."""
    try:
        result = item.run(program)
        check_invariants(result.program, [*completed, item.name])
    except MoecError as error:
        # The class stays, since it decides the exit code.
        error.message = f"pass {item.name}: {error.message}"
        error.args = (error.message,)
        raise
    except Exception as error:
        raise MoecError(
            f"pass {item.name} failed: {type(error).__name__}: {error}",
            hint="this is a fault of moec or of the package that brought the pass: please report it",
        ) from error
    return result
