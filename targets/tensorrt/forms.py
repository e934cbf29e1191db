"""Forms of the experts, and which one moves the fewest bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moec.compiler.common.choices import Choice


class Form(Choice):
    """How the experts of a layer are computed."""

    GATHER = "gather", "weights of every slot, for few tokens"
    LOOP_IF = "loop-if", "skips idle experts"
    DENSE = "dense", "computes all"
    AUTO = "auto", "what moves the fewest bytes"


ITERATION_BYTES = 64 * 1024
"""What one iteration of `loop-if` costs besides its weights, as bytes: a branch and its launches.

It is assumed and not measured: it only decides between forms whose bytes are close.
"""


@dataclass(frozen=True)
class ExpertShape:
    """One layer: experts, slots of a token, and the bytes of one expert's weights as they are stored."""

    experts: int
    top_k: int
    expert_bytes: int


def moved_bytes(form: Form, shape: ExpertShape, tokens: int) -> int:
    """Weight bytes that one step of `tokens` tokens moves at most, with the overhead of iterations.

    `gather` reads the weights of every slot, writes a copy and reads that; `loop-if` reads each expert that some token
    uses once; `dense` reads all.
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

    One network serves both profiles, so `gather` is taken only where it moves fewer bytes than `loop-if` in both. With
    dynamic routing only `loop-if` saves anything. `dense` computes every expert for every token and is chosen by hand
    alone.

    Args:
        wanted: What the options say; anything but "auto" is taken.
        shapes: The MoE layers.
        decode: Tokens of a typical decode step.
        prefill: Tokens of a typical prefill.
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
