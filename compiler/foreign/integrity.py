"""Integrity of a foreign file: is every matrix of the checkpoint in it, in its place, and as near as its bits allow?

This sees experts that no text reaches, and in a quantized file it is what tells a wrong weight from rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.foreign.weights import FileRows, Located, Piece, own_rows
from moec.compiler.gates.integrity import EXIT_CODE, GATE
from moec.compiler.ir.program import Program
from moec.targets.model_files import StoredTensor

LISTED = 4

FLOAT_LIMITS: Mapping[str, float] = {"fp64": 1e-5, "fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}
"""Largest error of a matrix, |difference| over |checkpoint| in the Frobenius norm: a few times the rounding step."""

CODE_LIMIT, LARGEST = 4.0, 0.6
"""The same for b bits is CODE_LIMIT * 2^-b, at most LARGEST. Rounding normal values to nearest in blocks of 32 costs
1.6 * 2^-b (0.10 for four bits); scales for a whole row cost twice as much."""

SCALED = 0.05
"""Largest deviation of the mean factor from 1, which rounding does not change."""

ENOUGH = 0.5
"""Share of the pieces that must be found; else the file arranges its weights in a way that is not understood."""


@dataclass(frozen=True)
class Findings:
    """What is wrong with the pieces of a file.

    Attributes:
        missing: Pieces of experts that no tensor holds.
        moved: Pieces of experts that are where another expert belongs, with its index.
        far: Pieces that differ by more than their precision explains, with the error.
        scaled: Pieces that are multiplied by a factor, with the factor.
        worst: Largest error of a piece that is none of these.
    """

    missing: tuple[str, ...]
    moved: tuple[str, ...]
    far: tuple[str, ...]
    scaled: tuple[str, ...]
    worst: float


def compare(program: Program, held: FileRows, found: Located) -> Findings:
    """Compare every piece that was found with the checkpoint."""
    far, scaled, worst = list[str](), list[str](), 0.0
    for piece, place in found.places.items():
        want, got = own_rows(program, piece), held.values(place)
        factor = float((want * got).sum() / max(float((want * want).sum()), 1e-30))
        error = float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-30))
        if abs(factor - 1) > SCALED:
            scaled.append(f"{_text(piece)} by {factor:.3g}")
        elif not error <= limit_of(held.tensors[place.tensor]):
            far.append(f"{_text(piece)} by {error:.2g}")
        else:
            worst = max(worst, error)
    missing = [_text(piece) for piece in found.missing if piece.expert is not None]
    # The two projections of a gate are pieces of one matrix.
    lost, moved, off, multiplied = (tuple(dict.fromkeys(each)) for each in (missing, _moved(found), far, scaled))
    return Findings(lost, moved, off, multiplied, worst)


def limit_of(tensor: StoredTensor) -> float:
    """Largest error of a matrix in a tensor."""
    if tensor.quantized:
        return min(LARGEST, float(CODE_LIMIT * 2**-tensor.bits))
    return FLOAT_LIMITS.get(tensor.precision.lower(), 1e-2)


def _moved(found: Located) -> list[str]:
    """Pieces of experts in the place of another: in a stack, or in tensors whose names do not have their order."""
    moved, tensors = list[str](), dict[tuple[str, int], list[tuple[Piece, int]]]()
    for piece, place in found.places.items():
        if piece.expert is None:
            continue
        if place.slab is not None and place.slab != piece.expert:
            moved.append(f"{_text(piece)} is in the place of {place.slab}")
        elif place.slab is None:
            tensors.setdefault((piece.weight, piece.start), []).append(
                (piece, place.tensor * (1 << 40) + int(place.rows[0]))
            )
    for pairs in tensors.values():
        order = [at for _, at in pairs]
        if order not in (sorted(order), sorted(order, reverse=True)):
            moved += [f"{_text(piece)}" for (piece, at), right in zip(pairs, sorted(order), strict=True) if at != right]
    return moved


def _text(piece: Piece) -> str:
    return piece.weight if piece.expert is None else f"{piece.weight}[{piece.expert}]"


def judge(findings: Findings, found: Located, *, proven: bool, quantized: bool) -> Verdict:
    """The verdict.

    Args:
        findings: What `compare` found.
        found: The search.
        proven: Whether parity and coverage have proven every expert by its logits.
        quantized: Whether the file holds codes: its logits then only prove that it computes with what it holds.
    """
    total = len(found.places) + len(found.missing) + found.left
    if len(found.places) < ENOUGH * total:
        reason = f"{len(found.places)} of {total} matrices were found: the file arranges its weights otherwise"
        return Verdict(GATE, Status.NOT_RUN, reason, EXIT_CODE)
    problems = {
        "no tensor holds": findings.missing,
        "in another place": findings.moved,
        "too far from the checkpoint": findings.far,
        "multiplied": findings.scaled,
    }
    wrong = {what for what, names in problems.items() if names}
    if proven:
        # Logits are right with these weights where they are, so they are arranged or folded in a way of their own.
        wrong -= {"in another place"} if quantized else set(problems)
    parts = [f"{len(found.places)} of {total} matrices found by their values, largest error {findings.worst:.1e}"]
    parts += [f"{what}: {_listing(names)}" for what, names in problems.items() if names]
    if any(problems.values()) and not wrong:
        parts.append("the logits are right with that")
    if found.left:
        parts.append(f"{found.left} were not searched, since the time was up")
    status = Status.FAIL if wrong else Status.NOT_RUN if any(problems.values()) or found.left else Status.PASS
    figures = {
        "found": len(found.places),
        "matrices": total,
        "max_error": findings.worst,
        **{k: list(v) for k, v in problems.items()},
    }
    return Verdict(GATE, status, "; ".join(parts), EXIT_CODE, figures)


def _listing(names: tuple[str, ...]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
