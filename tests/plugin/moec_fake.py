"""A target of another package, as small as can be: weights one after the other, and logits from a rule."""

# ruff: noqa: ARG002 - the arguments are those of the protocol

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from moec.compiler.common.progress import Progress
from moec.compiler.common.rejections import Rejection
from moec.targets.base import Capabilities, Lowered, Phase, Target, TargetOptions
from moec.targets.runners import Runner
from moec.targets.stored_weights import StoredWeight


class FakeOptions(TargetOptions):
    flavor: Literal["plain", "fancy"] = Field(default="plain", description="Which dialect is written.")
    block_size: int = Field(default=32, ge=1, description="Values per block.")
    compress: bool = Field(default=False, description="Write less.")
    devices: tuple[str, ...] = Field(default=(), description="What to build for.")
    delay: float = Field(default=0.0, description="Seconds to pause in the middle.")
    fault: Literal["", "refuse", "crash"] = Field(default="", description="How to fail.")


class FakeTarget(Target):
    name: ClassVar[str] = "fake"
    Options: ClassVar[type[TargetOptions]] = FakeOptions

    def capabilities(self, options: TargetOptions, phase: Phase) -> Capabilities:
        return Capabilities(skips_experts=False, reason="it is not real")

    def lint(self, program: object, options: TargetOptions) -> tuple[Rejection, ...]:
        assert isinstance(options, FakeOptions)
        return (Rejection("fake", "model.layers.0.mlp", "it was told to"),) if options.fault == "refuse" else ()

    def lower(self, program, options, directory, progress: Progress) -> Lowered:  # type: ignore[no-untyped-def]
        with (directory / "model.bin").open("wb") as file:
            for position, name in enumerate(program.weight_names()):
                progress("write weights", position, len(program.weight_names()))
                for chunk in program.weights[name].chunks():
                    file.write(chunk.numpy().tobytes())
                if not position:
                    file.flush()
                    self.pause(directory, options.delay)
                    if options.fault == "crash":
                        raise ZeroDivisionError("a fault that nobody foresaw")
        rejected = (Rejection("fake", "lm_head", "it likes another layout"),)
        return Lowered(("model.bin",), {"inputs": ["input_ids"]}, rejected, {"bytes": 3})

    def pause(self, directory: Path, seconds: float) -> None:
        if seconds:
            (directory.parent / "in-the-middle").touch()
            time.sleep(seconds)

    def open(self, directory: Path, *, threads: int = 0) -> Runner:
        return FakeRunner(json.loads((directory / "config.json").read_text())["vocab_size"])

    def stored_weights(self, directory: Path) -> Mapping[str, StoredWeight]:
        return {}


class FakeRunner:
    """The most likely token after t is t + 1, the next likely one t + 2, and so on."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def reset(self) -> None:
        pass

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        distance = (np.arange(self.vocab_size) - input_ids[..., None] - 1) % self.vocab_size
        return np.asarray(-distance, dtype=np.float32)

    decode = prefill

    def facts(self) -> Mapping[str, object]:
        return {"runtime": "fake"}
