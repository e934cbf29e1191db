"""Coverage: every live expert of every layer is run, whether a prompt reaches it or not.

A trained router sends one token in ten thousand to some experts. So this gate needs no prompt: it runs the experts of
one layer of the artifact with hidden states that the reference saw there, and with a routing that sends each token to
one chosen expert. What runs are the nodes and weights of the artifact (`Target.open_experts`). A target that cannot do
this is not covered, and its verdict is "not run".

The reference runs them while the parity gate runs its cases (`ExpertCalls`), so that each expert is read once for both,
and memory is a batch of activations and one expert. The integrity gate gets these values too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, fx

from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.progress import Progress
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.gates.compare import relative_error
from moec.compiler.gates.reference import sampled
from moec.compiler.gates.tolerance import Precision, expert_limit
from moec.compiler.gates.usage import Usage
from moec.compiler.ir.experts import Routed
from moec.compiler.ir.interpreter import ActivationRounding, Interpreter, WeightObserver
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.program import EXPERTS, MoeLayer, Program
from moec.targets.base import ExpertsRunner

GATE = "coverage"
EXIT_CODE = 5
LISTED = 6

ROWS = 4
"""Tokens per expert: more than one, so that the runtime's kernels for several rows are used."""

AMPLIFIED = 4.0
"""Where the gate of experts has a limit, the last token of each expert is multiplied by this times the limit.

Outputs of the first projection are of order 1 and rarely reach limits such as 7 or 10. An artifact that lacks the limit
would be right for every other token.
"""

ZERO = 1e-5
"""Outputs below this times the largest hidden state count as so large: an expert of zeros computes zero, and kernels
that subtract two sums compute 1e-11."""

EXPERTS_PER_CALL = 16
"""Experts that are run in one call."""


@dataclass
class LayerResult:
    """The errors of the experts of one layer.

    Attributes:
        layer: The layer.
        errors: Expert -> largest difference in any graph, relative to its largest output; infinite for NaN.
    """

    layer: MoeLayer
    errors: dict[int, float] = field(default_factory=dict)

    def wrong(self, limit: float) -> list[int]:
        """Experts that are out of tolerance."""
        return [expert for expert, error in self.errors.items() if not error <= limit]


class ExpertCalls:
    """The reference's outputs of every expert, computed beside the cases of the parity gate.

    Hidden states are those of the longest sequence of the cases that run together.

    Args:
        program: The final Program.
        share: Share of the experts of a layer to run.
    """

    def __init__(self, program: Program, share: float = 1.0) -> None:
        self._rows = dict(zip(program.nodes(EXPERTS), program.layers, strict=True))
        self._share = share
        self.hidden: dict[int, Tensor] = {}
        """MoE layer -> hidden states that its experts got, [n, H]."""
        self.outputs: dict[int, list[np.ndarray]] = {}
        """MoE layer -> outputs of each batch of experts, [T, H] float32."""

    def calls(self, node: fx.Node, hosts: Sequence[Routed]) -> list[Routed]:
        """See `moec.compiler.ir.lockstep.Guests`; each layer is run once."""
        row = self._rows[node]
        if row.index in self.hidden:
            return []
        states = self.hidden[row.index] = sampled(max((host[0] for host in hosts), key=len))
        return [_operands(node, row, states, batch) for batch in _batches(row.num_experts, self._share)]

    def take(self, node: fx.Node, results: Sequence[Tensor]) -> None:
        """See `moec.compiler.ir.lockstep.Guests`."""
        self.outputs.setdefault(self._rows[node].index, [result.float().numpy() for result in results])


def run_every_expert(
    program: Program,
    runners: Mapping[str, ExpertsRunner],
    hidden: Mapping[int, Tensor],
    share: float = 1.0,
    progress: Progress = lambda *_: None,
    watch: WeightObserver | None = None,
    rounding: ActivationRounding | None = None,
    outputs: Mapping[int, Sequence[np.ndarray]] = MappingProxyType({}),
) -> list[LayerResult]:
    """Run the experts of every layer on the artifact and compare them with the reference.

    Args:
        program: The final Program.
        runners: Name of a graph -> its experts, from `Target.open_experts`.
        hidden: MoE layer -> hidden states that its experts got, [n, H].
        share: Share of the experts of a layer to run; they are spread evenly.
        progress: Called for every layer.
        watch: Called with the values of every expert that the reference reads, once each.
        rounding: How the artifact's kernels round activations, from `Target.activation_rounding`.
        outputs: `ExpertCalls.outputs`; the reference runs the layers that are not in it.

    Raises:
        ArtifactError: A runner returned an output that is not [T, H].
    """
    reference, results = Interpreter(program, cache_bytes=0, weight_observer=watch, rounding=rounding), []
    for done, (row, node) in enumerate(zip(program.layers, program.nodes(EXPERTS), strict=True)):
        progress(GATE, done, len(program.layers))
        result = LayerResult(row)
        known = outputs.get(row.index)
        for place, batch in enumerate(_batches(row.num_experts, share)):
            call = _operands(node, row, hidden[row.index], batch)
            want = reference.experts(node, *call).float().numpy() if known is None else known[place]
            result.errors |= _compared(node, row, runners, batch, call, want)
        results.append(result)
    progress(GATE, len(program.layers), len(program.layers))
    return results


def _batches(count: int, share: float) -> Iterator[list[int]]:
    """The experts of a layer to run, in batches of one call."""
    wanted = math.ceil(count * share)
    chosen = np.unique(np.linspace(0, count - 1, wanted).round().astype(np.int64)).tolist() if wanted else []
    for start in range(0, len(chosen), EXPERTS_PER_CALL):
        yield chosen[start : start + EXPERTS_PER_CALL]


def _compared(
    node: fx.Node,
    row: MoeLayer,
    runners: Mapping[str, ExpertsRunner],
    experts: Sequence[int],
    call: Routed,
    want: np.ndarray,
) -> dict[int, float]:
    """Expert -> largest relative difference from `want` over all graphs, for the `experts` of a call."""
    x, indices, weights = call
    given = (x.numpy(), indices.numpy(), weights.numpy())
    smallest = ZERO * float(x.abs().max())
    errors, limited = dict.fromkeys(experts, 0.0), Experts.of(node).limit > 0
    for name, runner in runners.items():
        got = runner(row.index, *given)
        if got.shape != want.shape:
            raise ArtifactError(f"{name}: the experts of layer {row.index} return {got.shape}, not {want.shape}")
        for place, expert in enumerate(experts):
            first, stop = place * ROWS, (place + 1) * ROWS
            # An amplified token has larger outputs and errors than the others, so it is judged by itself.
            for own in (slice(first, stop - 1), slice(stop - 1, stop)) if limited else (slice(first, stop),):
                errors[expert] = max(errors[expert], relative_error(got[own], want[own], smallest))
    return errors


def _operands(node: fx.Node, row: MoeLayer, states: Tensor, experts: Sequence[int]) -> Routed:
    """Operands of `moec::experts` in which each of `experts` gets `ROWS` tokens and no other expert gets any.

    The other slots of a token name other experts with weight 0, which drops them. The kept slot changes from token to
    token. The weights are exact in half precision. See `AMPLIFIED` for the last token of each expert.

    Returns:
        Hidden states [T, H], indices [T, k] and weights [T, k], in the dtypes of the graph.
    """
    tokens = torch.arange(len(experts) * ROWS)
    own = torch.tensor(experts, dtype=torch.int64).repeat_interleave(ROWS)
    slots = torch.arange(row.top_k)
    kept = tokens % row.top_k
    indices = (own[:, None] + slots[None, :] - kept[:, None]) % row.num_experts
    weights = torch.where(slots[None, :] == kept[:, None], (0.5 + 0.125 * (tokens % ROWS))[:, None], 0.0)
    dtypes = [argument.meta["val"].dtype for argument in node.args[:3]]  # type: ignore[union-attr]
    # A stride of 37 spreads the states of each expert over the whole sequence.
    x = states[(tokens * 37 + own) % len(states)]
    if limit := Experts.of(node).limit:
        x[ROWS - 1 :: ROWS] *= AMPLIFIED * limit
    return x.to(dtypes[0]), indices.to(dtypes[1]), weights.to(dtypes[2])


def judge_coverage(
    results: Sequence[LayerResult],
    graphs: Sequence[str],
    precision: Precision,
    minimum: float,
    usage: Usage,
    *,
    rounding_known: bool = False,
) -> Verdict:
    """Pass if enough experts were run and every one of them is within tolerance.

    Args:
        results: One for each layer.
        graphs: Names of the graphs that were run.
        precision: Precision of the artifact, which gives the limit.
        minimum: Share of the live experts that must have been run.
        usage: The experts that the text of the parity cases used; reported, but not part of the verdict.
        rounding_known: Whether the reference rounded activations as the kernels do.
    """
    limit = expert_limit(precision, rounding_known=rounding_known)
    run = sum(len(result.errors) for result in results)
    total = sum(result.layer.num_experts for result in results)
    errors = [(error, result.layer.module, expert) for result in results for expert, error in result.errors.items()]
    worst = max(errors, default=(0.0, "", 0))
    wrong = {result.layer.module: found for result in results if (found := result.wrong(limit))}
    parts = [f"{run} of {total} experts in {len(results)} layers run one by one on {' and '.join(graphs)}"]
    parts.append(f"max |difference| {worst[0]:.1e} of an expert's largest output (limit {limit:.0e}, {precision})")
    if wrong:
        parts.append(f"wrong: {_listing(wrong)}")
    unused = sum(map(len, usage.never().values()))
    parts.append(f"{usage.tokens} tokens of text used {total - unused} of them")
    status = Status.FAIL if wrong or run < minimum * total else Status.PASS
    figures = {
        "minimum": minimum,
        "graphs": list(graphs),
        "limit": limit,
        "max_error": worst[0],
        "experts": [
            {
                "layer": result.layer.index,
                "module": result.layer.module,
                "run": len(result.errors),
                "wrong": result.wrong(limit),
                "max_error": max(result.errors.values(), default=0.0),
            }
            for result in results
        ],
        "steps": {"parity: artifact": usage.figures()},
    }
    return Verdict(GATE, status, "; ".join(parts), EXIT_CODE, figures)


def _listing(experts: Mapping[str, list[int]]) -> str:
    """The experts of the first few layers; the figures of the report have all of them."""
    rows = [f"{module} {', '.join(map(str, found))}" for module, found in experts.items()]
    return "; ".join(rows[:LISTED]) + (f"; and {len(rows) - LISTED} more layers" if len(rows) > LISTED else "")
