"""Optimisation profiles: the shapes that an engine is built for, one profile each for decode and prefill."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moec.targets.tensorrt.settings import Bounds, Profile


@dataclass(frozen=True)
class Sizes:
    """Sizes that determine the profiles.

    Attributes:
        batch: Maximum number of sequences at once.
        context: Tokens that the KV cache holds.
        prompt: Number of tokens of a typical prompt, for which prefill is optimised.
        piece: Maximum number of tokens of one prefill step.
    """

    batch: int
    context: int
    prompt: int
    piece: int

    def dims(self) -> Mapping[str, Mapping[str, tuple[int, int, int]]]:
        """Profile -> axis -> minimum, typical and maximum length.

        A decode step attends to the whole cache, with empty slots masked, so that its shapes never change.
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
    """The profiles for `tensorrt.json`; inputs with static shapes need no entry."""
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
    """The command line of classic TensorRT's trtexec that builds the same engine."""
    words = ["trtexec", f"--onnx={onnx}", f"--saveEngine={engine}", "--stronglyTyped"]
    for index, profile in enumerate(made):
        words.append(f"--profile={index}")
        for bound in Bounds.model_fields:
            shapes = {name: getattr(bounds, bound) for name, bounds in profile.inputs.items()}
            pairs = (f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
            words.append(f"--{bound}Shapes={','.join(pairs)}")
    return " ".join(words)
