"""Optimisation profiles: the shapes that an engine is built for, one set for decode and one for prefill."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moec.targets.tensorrt.settings import Bounds, Profile


@dataclass(frozen=True)
class Sizes:
    """What the profiles are made of.

    Attributes:
        batch: Most sequences at once.
        context: Tokens that the cache holds.
        prompt: Tokens of a typical prompt, which prefill is tuned for.
        piece: Most tokens of one prefill step.
    """

    batch: int
    context: int
    prompt: int
    piece: int

    def dims(self) -> Mapping[str, Mapping[str, tuple[int, int, int]]]:
        """Profile -> axis -> smallest, typical and largest length.

        A decode step sees the whole cache, whose slots that hold nothing yet are masked: its shapes never change.
        """
        batch, whole = (1, 1, self.batch), self.context
        return {
            "decode": {
                "batch_size": batch,
                "sequence_length": (1, 1, 1),
                "past_sequence_length": (0, whole, whole),
                "total_sequence_length": (1, whole + 1, whole + 1),
            },
            "prefill": {
                "batch_size": batch,
                "sequence_length": (1, self.prompt, self.piece),
                "past_sequence_length": (0, 0, whole),
                "total_sequence_length": (1, self.prompt, whole + self.piece),
            },
        }


def _rows(signature: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from signature["inputs"]
    for state in signature["states"]:
        yield state["input"]


def profiles(signature: Mapping[str, Any], sizes: Sizes) -> tuple[Profile, ...]:
    """The profiles as `tensorrt.json` holds them: inputs whose shapes are known need no entry."""
    made = []
    for name, lengths in sizes.dims().items():
        inputs = {
            row["name"]: _bounds(row["shape"], lengths)
            for row in _rows(signature)
            if any(not isinstance(size, int) for size in row["shape"])
        }
        made.append(Profile(name=name, inputs=inputs))
    return tuple(made)


def _bounds(shape: Sequence[int | str], lengths: Mapping[str, tuple[int, int, int]]) -> Bounds:
    smallest, typical, largest = (
        tuple(size if isinstance(size, int) else lengths[size][place] for size in shape) for place in range(3)
    )
    return Bounds(min=smallest, opt=typical, max=largest)


def trtexec(onnx: str, engine: str, made: Sequence[Profile]) -> str:
    """The line that builds the same engine with classic TensorRT's command-line tool."""
    words = ["trtexec", f"--onnx={onnx}", f"--saveEngine={engine}", "--stronglyTyped"]
    for index, profile in enumerate(made):
        words.append(f"--profile={index}")
        for bound in Bounds.model_fields:
            shapes = {name: getattr(bounds, bound) for name, bounds in profile.inputs.items()}
            pairs = (f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
            words.append(f"--{bound}Shapes={','.join(pairs)}")
    return " ".join(words)
