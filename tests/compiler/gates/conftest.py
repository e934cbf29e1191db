"""Programs captured once, and the ways in which an artifact can be wrong."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.cases import Prompts
from moec.compiler.gates.parity import ParityOptions
from moec.compiler.ir.interpreter import Interpreter, ProgramRunner
from moec.compiler.ir.program import EXPERTS, Program
from moec.compiler.ir.weights import Constant
from moec.targets.base import ExpertsRunner


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only get in each other's way at the size of these models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


OPTIONS = ParityOptions(greedy_tokens=12, long_prompt=130)


@pytest.fixture(scope="session")
def mixtral(tiny_checkpoint: Callable[[str], Path], capture_of: Callable[[str], Program]) -> tuple[Checkpoint, Program]:
    return Checkpoint.open(tiny_checkpoint("mixtral")), capture_of("mixtral")


@pytest.fixture(scope="session")
def gpt_oss(tiny_checkpoint: Callable[[str], Path], capture_of: Callable[[str], Program]) -> tuple[Checkpoint, Program]:
    """Alternating sliding windows, sinks and biases."""
    return Checkpoint.open(tiny_checkpoint("gpt_oss")), capture_of("gpt_oss")


def prompts(program: Program) -> Prompts:
    return Prompts(program.vocab_size, seed=3)


def changed(program: Program, name: str, change: Callable[[torch.Tensor], object]) -> Program:
    """`program` with the weight `name` changed in place."""
    value = program.weights.read(name).clone()
    change(value)
    return program.replace(weights=program.weights.with_tensors({program.weights.resolve(name): Constant(value)}))


def zero_4kb(program: Program, layer: int, expert: int) -> Program:
    """`program` with 4 KB of one expert's first projection zeroed."""

    def zero(stack: torch.Tensor) -> None:
        stack[expert].view(-1)[1024:2048] = 0

    return changed(program, program.layers[layer].gate_up_proj, zero)


def program_experts(program: Program) -> ExpertsRunner:
    """The experts of a Program by themselves, as if it were an artifact."""
    interpreter, nodes = Interpreter(program), program.nodes(EXPERTS)

    def run(layer: int, hidden: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
        tensors = (torch.from_numpy(np.ascontiguousarray(value)) for value in (hidden, indices, weights))
        result: np.ndarray = interpreter.experts(nodes[layer], *tensors).float().numpy()
        return result

    return run


class Wrapped:
    """A runner whose logits go through `spoil`, called with the logits and the number of the step."""

    def __init__(self, program: Program, spoil: Callable[[np.ndarray, int], np.ndarray]) -> None:
        self._inner, self._spoil, self._step = ProgramRunner(program), spoil, 0

    def reset(self) -> None:
        self._inner.reset()

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        return self._through(self._inner.prefill(input_ids, attention_mask))

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        return self._through(self._inner.decode(input_ids, attention_mask))

    def facts(self) -> dict[str, object]:
        return {"runtime": "wrapped"}

    def _through(self, logits: np.ndarray) -> np.ndarray:
        self._step += 1
        return self._spoil(logits.copy(), self._step)
