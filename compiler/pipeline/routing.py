"""From the routing section of a recipe to passes: calibration, its file, and the search under a quality bound."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moec import passes
from moec.compiler.common.digest import sha256_of_text
from moec.compiler.common.errors import CheckpointError, LoweringError, OutputError, UsageError
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import Program
from moec.compiler.measure.accounting import account
from moec.compiler.measure.expert_use import ExpertUse
from moec.compiler.pipeline.calibration_data import CalibrationData, text_facts
from moec.compiler.pipeline.calibration_file import read_calibration_file
from moec.compiler.pipeline.compensation import check_text, compensation_pass, ranked
from moec.compiler.pipeline.input_checks import check_saving
from moec.compiler.text.corpus import read_text
from moec.compiler.text.perplexity import losses
from moec.passes.base import Pass
from moec.passes.canonical.common_subexpressions import CommonSubexpressions
from moec.passes.canonical.dead_code import DeadCode
from moec.passes.experts.prune_experts import PruneExperts, choose_removed
from moec.passes.routing.calibrate.collect import Collector, collect
from moec.passes.routing.calibrate.fit import fit
from moec.passes.routing.calibrate.search import Saving, largest_saving
from moec.passes.routing.calibrate.sensitivities import Sensitivities
from moec.passes.routing.calibrate.traces import RoutingTrace, kept_per_layer, kept_share, replay
from moec.passes.routing.compensation import CompensateDropped
from moec.passes.routing.dynamic_routing import DynamicRouting
from moec.passes.routing.policies.base import Policy
from moec.passes.routing.policies.table import parameters_of, policy, policy_type

if TYPE_CHECKING:
    from moec.compiler.common.progress import Progress
    from moec.compiler.pipeline.recipe import RoutingRecipe
    from moec.targets.base import Capabilities, Phase

SCHEMA_VERSION = 1
ACCOUNTED_WINDOWS = 16
"""Number of windows on which savings and the use of the experts are recorded; `moec drift` exchanges them by chance."""


@dataclass(frozen=True)
class RoutingPlan:
    """The passes and records that routing adds to an export.

    Attributes:
        passes: The passes that run after the common ones.
        recorded: The routing section for moec.json, with the parameters that calibration found.
        facts: Measurements for moec.json.
        use: The use of the experts on the text of calibration, for the artifact.
    """

    passes: tuple[Pass, ...] = ()
    recorded: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] | None = None
    use: ExpertUse | None = None

    @property
    def added_work(self) -> tuple[int, ...]:
        """Multiplications per token of what stands in for dropped experts, for each MoE layer; empty without it."""
        found = [item for item in self.passes if isinstance(item, CompensateDropped)]
        return tuple(0 if own is None else own.work for own in found[0].layers) if found else ()


def calibrate(
    checkpoint: Checkpoint,
    program: Program,
    name: str,
    budgets: Sequence[float],
    *,
    text: str | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Fit a policy to several budgets; the result is deterministic.

    Args:
        checkpoint: The checkpoint, for its tokenizer and digests.
        program: The checkpoint's Program after capture and the common passes.
        name: Name of the policy.
        budgets: Shares of the routing slots to keep, each in (0, 1].
        text: A text file or a directory of text files; None: the text that comes with moec.
        progress: Called during calibration.

    Returns:
        The content of a calibration file.

    Raises:
        UsageError: The policy is unknown or depends on the batch, or a budget is not valid or cannot be reached.
        CheckpointError: The text is missing, empty, binary or too short.
    """
    policy_type(name)
    for budget in budgets:
        _check_budget(budget)
    material = CalibrationData.of(checkpoint, program, text)
    traces = material.traces(progress)
    sensitivities = material.sensitivities(name, progress)
    entries = [_entry(budget, fit(name, traces, budget, sensitivities), traces) for budget in budgets]
    return {
        "schema_version": SCHEMA_VERSION,
        "policy": name,
        "checkpoint": dict(sorted(checkpoint.digests.items())),
        "text": text_facts(material),
        "entries": entries,
    }


def _check_budget(budget: float) -> None:
    if not 0 < budget <= 1:
        raise UsageError(
            f"an expert budget is the share of the pretrained top-k to keep, in (0, 1], not {budget:g}",
            hint="0.6 keeps 60 % of the slots",
        )


def _entry(budget: float, chosen: Policy, traces: Sequence[RoutingTrace]) -> dict[str, Any]:
    layers = replay(traces)
    return {
        "budget": budget,
        "kept_share": kept_share(chosen, layers),
        "kept_per_layer": list(kept_per_layer(chosen, layers)),
        "parameters": json.loads(json.dumps(parameters_of(chosen))),
    }


def read_calibration(path: Path, checkpoint: Checkpoint, name: str, budget: float | None) -> dict[str, Any]:
    """The entry of a calibration file for a budget; None stands for the only one.

    Raises:
        UsageError: It is not a calibration file, or it has another policy or no such budget.
        CheckpointError: It was made from another checkpoint.
    """
    content = read_calibration_file(path)
    if content.policy != name:
        raise UsageError(
            f"{path} is for the policy {content.policy}, not {name}", hint=f"give --routing {content.policy}"
        )
    own = checkpoint.digests
    if differing := sorted(key for key in {*content.checkpoint, *own} if content.checkpoint.get(key) != own.get(key)):
        raise CheckpointError(
            f"{path} was made from another checkpoint: {', '.join(differing[:4])} differ",
            hint="calibrate this checkpoint: moec calibrate CHECKPOINT --policy ... -o calibration.json",
        )
    if budget is None and len(content.entries) == 1:
        return content.entries[0].model_dump()
    for entry in content.entries:
        if budget is not None and abs(entry.budget - budget) < 1e-9:
            return entry.model_dump()
    known = ", ".join(f"{entry.budget:g}" for entry in content.entries)
    raise UsageError(
        f"{path} has no budget {budget:g}" if budget is not None else f"{path} has several budgets",
        hint=f"give --expert-budget, one of {known}",
    )


def check_routing(settings: RoutingRecipe) -> None:
    """Check the routing section as far as this is possible without the model.

    Raises:
        UsageError: The policy is unknown, a parameter is not valid, or neither parameters nor a saving are given.
        CheckpointError: The calibration text is missing, empty or binary.
    """
    check_saving(settings)
    if settings.policy == "off":
        return
    policy_type(settings.policy)
    if settings.parameters is not None:
        policy(settings.policy, **settings.parameters)


def plan_routing(
    settings: RoutingRecipe | None, checkpoint: Checkpoint, program: Program, progress: Progress
) -> RoutingPlan:
    """Decide a recipe's routing. Text is read and the model is run only if parameters must be found.

    Args:
        settings: The routing section of the recipe.
        checkpoint: The checkpoint, for its tokenizer and digests.
        program: The checkpoint's Program after capture and the common passes.
        progress: Called during calibration and search.

    Raises:
        UsageError: The section is not valid for this model, or no saving stays within the quality bound.
        LoweringError: Experts cannot be pruned.
        CheckpointError: The text is missing, empty, binary or too short, or the calibration file belongs to another
            checkpoint.
    """
    if settings is None:
        return RoutingPlan()
    check_routing(settings)
    added: list[Pass] = []
    facts: dict[str, Any] = {}
    pretrained = program
    removed: Sequence[Sequence[int]] | None = settings.removed
    if removed is None and settings.prune:
        removed, facts["pruning"] = _choose_removed(
            settings.prune, CalibrationData.of(checkpoint, program, settings.text), program, progress
        )
    if removed is not None:
        added.append(PruneExperts(tuple(tuple(layer) for layer in removed)))
        program = _pruned(added[0], program)
    if settings.policy != "off":
        chosen, measured = _policy(settings, checkpoint, program, progress)
        facts |= {"policy": chosen.name, "parameters": json.loads(json.dumps(parameters_of(chosen))), **measured}
        added.append(DynamicRouting(chosen, settings.runtime_input))
        if any(chosen.compensates(layer) for layer in range(len(program.layers))):
            material = CalibrationData.of(checkpoint, pretrained, settings.text)
            check_text(settings, material)
            facts["compensation"] = {"text": text_facts(material)}
            added.append(compensation_pass(material, chosen, removed, progress))
        added += [CommonSubexpressions(), DeadCode()]
    recorded = {
        "policy": settings.policy,
        "parameters": facts.get("parameters"),
        "runtime_input": settings.runtime_input,
        "removed": None if removed is None else [list(layer) for layer in removed],
    }
    if "compensation" in facts:
        # What stands in for dropped experts is fitted again when the artifact is validated, on the same text.
        recorded |= {"text": settings.text, "text_sha256": facts["compensation"]["text"]["sha256"]}
    return RoutingPlan(tuple(added), recorded, facts)


def _choose_removed(
    share: float, material: CalibrationData, program: Program, progress: Progress
) -> tuple[Sequence[Sequence[int]], dict[str, Any]]:
    """The share of each layer's experts that matter least on a text, and what moec.json says of the choice."""
    collector = Collector(program, outputs=True)
    collector.run(material.chosen, lambda done, total: progress("expert saliency", done, total))
    removed = choose_removed(program, collector.traces(), collector.peaks(), share)
    return removed, {"text": text_facts(material), "removed": [len(layer) for layer in removed]}


def _pruned(pruning: Pass, program: Program) -> Program:
    """The Program without the experts.

    Raises:
        LoweringError: The router of a layer is of a kind whose experts cannot be removed.
    """
    result = pruning.run(program)
    if result.rejections:
        raise LoweringError(
            "experts cannot be pruned: "
            + "; ".join(f"{rejection.where}: {rejection.reason}" for rejection in result.rejections[:4]),
            hint="export without --prune-experts; --routing lets tokens use fewer experts",
        )
    return result.program


def measure_savings(
    settings: RoutingRecipe,
    checkpoint: Checkpoint,
    captured: Program,
    program: Program,
    capabilities: Mapping[Phase, Capabilities],
    added: Sequence[int],
) -> tuple[dict[str, Any], ExpertUse | None]:
    """What the final Program executes on the calibration text, as `account` reports it, and the use of its experts.

    `added` are the multiplications per token that each layer executes in addition. Without a tokenizer, nothing is
    measured.
    """
    if not (checkpoint.directory / "tokenizer.json").is_file():
        return {}, None
    material = CalibrationData.of(checkpoint, program, settings.text)
    step = max(1, len(material.chosen) // ACCOUNTED_WINDOWS)
    chosen = material.chosen[::step][:ACCOUNTED_WINDOWS]
    traces = collect(program, chosen)
    pairs = zip(captured.layers, program.layers, strict=True)
    modules = [(before.module, before.top_k, after.num_experts) for before, after in pairs]
    use = ExpertUse.of_traces(traces, modules, chosen, sha256_of_text(material.text))
    return account(captured, program, traces, capabilities, added), use


def _policy(
    settings: RoutingRecipe, checkpoint: Checkpoint, program: Program, progress: Progress
) -> tuple[Policy, dict[str, Any]]:
    name = settings.policy
    if settings.parameters is not None:
        return policy(name, **settings.parameters), {}
    if settings.calibration is not None:
        entry = read_calibration(Path(settings.calibration), checkpoint, name, settings.budget)
        measured = {key: entry[key] for key in ("budget", "kept_share", "kept_per_layer")}
        chosen = policy(name, **entry["parameters"])
        return ranked(chosen, settings.compensation), {"calibration": measured}
    policy_type(name)
    material = CalibrationData.of(checkpoint, program, settings.text)
    traces, sensitivities = material.traces(progress), material.sensitivities(name, progress)
    if settings.max_quality_loss is not None:
        saving = _search(settings, material, traces, sensitivities, progress)
        tried = [{"budget": budget, "loss": loss} for budget, loss in saving.tried]
        if saving.policy is None:
            raise UsageError(
                f"the policy {name} saves nothing at a quality loss of at most {settings.max_quality_loss:.2%}:"
                f" even a budget of {max(budget for budget, _ in saving.tried):.2f} loses more",
                hint="allow a larger loss, choose another policy, or export with --routing off",
            )
        chosen, searched = saving.policy, {"max_quality_loss": settings.max_quality_loss, "tried": tried}
        budget = saving.budget
    else:
        assert settings.budget is not None, "check_routing"
        budget, searched = settings.budget, {}
        chosen = ranked(fit(name, traces, budget, sensitivities), settings.compensation)
    entry = _entry(budget, chosen, traces)
    del entry["parameters"]
    return chosen, {"calibration": {**entry, **searched, "text": text_facts(material)}}


def _search(
    settings: RoutingRecipe,
    material: CalibrationData,
    traces: Sequence[RoutingTrace],
    sensitivities: Sensitivities | None,
    progress: Progress,
) -> Saving:
    """The largest saving whose relative increase of perplexity on the calibration text stays within the bound."""
    assert settings.max_quality_loss is not None
    sample = material.chosen[1::2] if len(material.chosen) > 1 else material.chosen
    reference = losses(ProgramRunner(material.program), sample)

    def evaluate(candidate: Policy) -> float:
        added: list[Pass] = [DynamicRouting(candidate)]
        if settings.compensation:
            added.append(compensation_pass(material, candidate, None, progress))
        routed, _ = passes.run_passes(material.program, added)
        found = losses(ProgramRunner(routed), sample, told=lambda done, total: progress("quality search", done, total))
        return float(np.exp((found - reference).mean()) - 1)

    tops = [trace.weights.shape[1] for trace in traces]
    return largest_saving(
        lambda budget: ranked(fit(settings.policy, traces, budget, sensitivities), settings.compensation),
        evaluate,
        settings.max_quality_loss,
        least=min(len(tops) / sum(tops) + 0.02, 0.99),
    )


def parse_budgets(text: str) -> list[float]:
    """Parse budgets such as "0.5,0.6".

    Raises:
        UsageError: An item is not a number in (0, 1], or there is none.
    """
    try:
        budgets = [float(item) for item in text.split(",") if item.strip()]
    except ValueError as error:
        raise UsageError(f"--budget {text}: not a list of numbers", hint="give --budget 0.5,0.6,0.7, say") from error
    if not budgets:
        raise UsageError("--budget is empty", hint="give --budget 0.5,0.6,0.7, say")
    for budget in budgets:
        _check_budget(budget)
    return budgets


def calibrate_file(
    location: str,
    name: str,
    budgets: Sequence[float],
    output: Path,
    *,
    text: Path | None,
    revision: str | None = None,
    trust_remote_code: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Calibrate a checkpoint as `calibrate` does, write the file and return its content.

    Raises:
        OutputError: The file cannot be written.
        MoecError: As for `calibrate`, `Checkpoint.open` and `capture`.
    """
    policy_type(name)
    where = None if text is None else str(text)
    read_text(where)
    checkpoint = Checkpoint.open(location, revision=revision, trust_remote_code=trust_remote_code)
    progress("capture", 0, 1)
    program, _ = passes.run_passes(capture(checkpoint), passes.default_passes())
    found = calibrate(checkpoint, program, name, budgets, text=where, progress=progress)
    try:
        output.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror}", hint="give another file") from error
    return found
