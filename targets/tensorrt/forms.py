"""How experts are computed on TensorRT, and the choice of the form that moves the fewest bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moec.compiler.common.choices import Choice


class Form(Choice):
    """How the experts of a layer are computed."""

    GATHER = "gather", "gathers the weights for each token, for few tokens"
    LOOP_IF = "loop-if", "loops over experts and skips those without tokens"
    DENSE = "dense", "computes every expert for every token"
    AUTO = "auto", "gather or loop-if, whichever moves fewer bytes"


ITERATION_BYTES = 64 * 1024
"""Overhead of one iteration of `loop-if` (a branch and kernel launches), expressed in bytes.

This value is assumed, not measured. It only matters where both forms move similar numbers of bytes.
"""


@dataclass(frozen=True)
class ExpertShape:
    """A MoE layer: number of experts, experts per token, and stored bytes of one expert's weights."""

    experts: int
    top_k: int
    expert_bytes: int


def moved_bytes(form: Form, shape: ExpertShape, tokens: int) -> int:
    """Upper bound of the weight bytes that one step of `tokens` tokens moves, with the overhead of iterations.

    For every token and selected expert, `gather` reads the weights, writes a copy and reads the copy. `loop-if` reads
    each used expert once; `dense` reads all experts.
    """
    slots = tokens * shape.top_k
    match form:
        case Form.GATHER:
            return 3 * slots * shape.expert_bytes
        case Form.LOOP_IF:
            used = min(shape.experts, slots)
            return used * shape.expert_bytes + shape.experts * ITERATION_BYTES
        case _:
            return shape.experts * shape.expert_bytes


def choose(wanted: Form, shapes: Sequence[ExpertShape], decode: int, prefill: int, *, dynamic: bool) -> Form:
    """The form to build.

    One network serves both profiles, so `gather` is chosen only if it moves fewer bytes than `loop-if` in both. With
    dynamic routing, only `loop-if` saves anything. `dense` is never chosen automatically.

    Args:
        wanted: The option; any form other than "auto" is returned unchanged.
        shapes: The MoE layers.
        decode: Number of tokens of a typical decode step.
        prefill: Number of tokens of a typical prefill.
        dynamic: Whether a routing policy drops slots.
    """
    if wanted is not Form.AUTO:
        return wanted
    if dynamic:
        return Form.LOOP_IF

    def moved(form: Form, tokens: int) -> int:
        return sum(moved_bytes(form, shape, tokens) for shape in shapes)

    fewer = all(moved(Form.GATHER, tokens) < moved(Form.LOOP_IF, tokens) for tokens in (decode, prefill))
    return Form.GATHER if fewer else Form.LOOP_IF
