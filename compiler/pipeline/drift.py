"""`moec drift`: whether the routing of a new text still is what calibration saw, and what calibration would choose now.

The use of the experts on the text of calibration is in the artifact (`expert_use.json`) or is measured now. That on the
new text comes from the artifact itself where it returns its routing (`--routing-outputs`), and else from the
checkpoint, whose router is run with the policy of the artifact in the interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moec import passes
from moec.compiler.common.artifact import read_manifest
from moec.compiler.common.digest import sha256_of_text
from moec.compiler.common.errors import ArtifactError, CheckpointError, UsageError
from moec.compiler.common.files import in_json_types
from moec.compiler.common.progress import Progress
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.measure.drift import LayerDrift, layer_drifts
from moec.compiler.measure.expert_use import FILE, ExpertUse, Told
from moec.compiler.pipeline.calibration_data import LENGTH
from moec.compiler.pipeline.captures import Captures
from moec.compiler.pipeline.program import Built, build
from moec.compiler.pipeline.recipe import RoutingRecipe, make_recipe, target_of, with_target_defaults
from moec.compiler.pipeline.routing import ACCOUNTED_WINDOWS, plan_routing
from moec.compiler.pipeline.stages import Stages, silent
from moec.compiler.text.corpus import read_text, spread, tokenize, windows
from moec.passes.routing.calibrate.collect import collect
from moec.quantize.recorded import RecordedCalibration
from moec.targets import get_target
from moec.targets.runners import CountingRunner, limits_of

EXIT_CODE = 7
"""That of the quality gate: what it proved was about text of another kind."""
LEAST_WINDOWS = 4
"""Fewer windows cannot show any drift: there are too few ways to exchange them."""


@dataclass(frozen=True)
class Budget:
    """What calibration chose, and what it would choose on the new text by the same settings.

    Attributes:
        policy: Name of the policy.
        before: Share of the slots that it keeps, as it was calibrated.
        now: Share that calibration would choose on the new text: it differs if a quality loss was the limit.
        parameters_before: Parameters of the policy in the artifact.
        parameters: Parameters that calibration would choose.
    """

    policy: str
    before: float
    now: float
    parameters_before: Mapping[str, Any]
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Drift:
    """The result.

    Attributes:
        layers: One entry per MoE layer.
        kept_before: Share of all slots that the artifact executes on the text of calibration.
        kept: The same on the new text.
        measured_by: "artifact" or "checkpoint": what the new text was run through.
        windows: Number of windows of both texts, and tokens of a window.
        budget: None if the policy was not calibrated, or no checkpoint is given.
    """

    layers: tuple[LayerDrift, ...]
    kept_before: float
    kept: float
    measured_by: str
    windows: Mapping[str, int]
    budget: Budget | None = None

    @property
    def drifted(self) -> tuple[LayerDrift, ...]:
        """The layers that drifted."""
        return tuple(layer for layer in self.layers if layer.drifted)

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        kept = f"{self.kept:.1%} of the slots are executed, {self.kept_before:.1%} on the text of calibration"
        if not self.drifted:
            return f"No drift: the use of the experts differs by no more than chance in any layer; {kept}."
        named = ", ".join(str(layer.layer) for layer in self.drifted[:12])
        more = f" and {len(self.drifted) - 12} more" if len(self.drifted) > 12 else ""
        worst = max(self.drifted, key=lambda layer: layer.distance / max(layer.usual, 1e-9))
        return (
            f"Drift in {len(self.drifted)} of {len(self.layers)} layers ({named}{more}), most in layer {worst.layer}: "
            f"distance {worst.distance:.3f}, {worst.usual:.3f} by chance; {kept}."
        )

    def record(self) -> dict[str, Any]:
        """For JSON."""
        plain = {**asdict(self), "drifted": [layer.layer for layer in self.drifted], "sentence": self.sentence}
        return dict(in_json_types(plain))


def find_drift(
    directory: Path,
    text: str,
    *,
    against: str | None = None,
    calibration: str | None = None,
    count: int = 32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Drift:
    """Compare the routing of a new text with that of the text of calibration.

    Args:
        directory: The artifact.
        text: The new text, a file or a directory.
        against: The checkpoint of the artifact; needed if the artifact does not return its routing, and for `budget`.
        calibration: Text of calibration, if the artifact has recorded none; None: the text that comes with moec.
        count: Number of windows of the new text.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether to run modelling code of the checkpoint.
        progress: Called for every window.

    Raises:
        ArtifactError: The artifact is damaged.
        UsageError: It has no MoE layer, or does not return its routing and no checkpoint is given.
        CheckpointError: A text is missing or too short.
    """
    manifest, content = read_manifest(directory), read_text(text)
    recorded = None if calibration is not None else ExpertUse.read(directory)
    built = None if against is None else _built(manifest, against, revision, trust_remote_code)
    subject = _artifact(directory, manifest) if built is None else _checkpoint(built)
    wanted = LENGTH if recorded is None else recorded.length
    length = min(wanted, subject.longest or wanted)
    if recorded is not None and recorded.length != length:
        raise ArtifactError(
            f"{directory}: {FILE} has windows of {recorded.length} tokens, which it cannot run", hint="export it again"
        )

    def use(text: str, count: int, what: str) -> ExpertUse:
        chosen = _windows(subject.directory, text, length, count, what)
        return subject.run(chosen, sha256_of_text(text), lambda done, total: progress(what, done, total))

    now = use(content, count, "new text")
    if recorded is None:
        recorded = use(read_text(calibration), ACCOUNTED_WINDOWS, "text of calibration")
    if recorded.shapes != now.shapes:
        raise ArtifactError(f"{directory}: {FILE} is of another model", hint="export it again")
    sizes = {"calibration": len(recorded.layers[0].tokens), "new": len(now.layers[0].tokens), "length": length}
    budget = None if built is None else _budget(manifest, built, text, progress)
    layers = tuple(layer_drifts(recorded, now))
    return Drift(layers, recorded.kept, now.kept, subject.name, sizes, budget)


def _windows(directory: Path, text: str, length: int, count: int, what: str) -> np.ndarray:
    """Windows of a text, [n, length].

    Raises:
        CheckpointError: There are too few.
    """
    chosen = spread(windows(tokenize(directory, text), length), count)
    if len(chosen) < LEAST_WINDOWS:
        raise CheckpointError(
            f"the {what} has {len(chosen)} windows of {length} tokens, too few to see a drift",
            hint=f"give a text of at least {LEAST_WINDOWS * length} tokens",
        )
    return chosen


def _built(manifest: Mapping[str, Any], against: str, revision: str | None, trust_remote_code: bool) -> Built:
    """The Program with the routing of the artifact; formats of weights are left out, as when it was recorded.

    Raises:
        CheckpointError: The artifact was built from another checkpoint.
    """
    given = {"checkpoint": against, "revision": revision, "trust_remote_code": trust_remote_code, "quantize": None}
    recipe = make_recipe({**manifest.get("recipe", {}), **given}, where="recipe of the artifact")
    digests = Checkpoint.open(against, revision=revision, trust_remote_code=trust_remote_code).digests
    if digests != manifest.get("source", {}).get("digests"):
        raise CheckpointError(
            f"{against}: not the checkpoint that the artifact was built from",
            hint="give the checkpoint that the artifact was exported from",
        )
    target, options = target_of(recipe)
    return build(
        with_target_defaults(recipe, target), target, options, Stages(silent), Captures(), RecordedCalibration()
    )


@dataclass(frozen=True)
class _Subject:
    """What runs a text.

    Attributes:
        name: "artifact" or "checkpoint".
        directory: Where its tokenizer is.
        run: Token ids [n, length], digest of the text and a progress function -> the use of the experts.
        longest: Longest sequence in tokens; None: there is no limit.
    """

    name: str
    directory: Path
    run: Callable[[np.ndarray, str, Told], ExpertUse]
    longest: int | None = None


def _artifact(directory: Path, manifest: Mapping[str, Any]) -> _Subject:
    runner = get_target(str(manifest.get("recipe", {}).get("target"))).open(directory)
    if not isinstance(runner, CountingRunner) or not runner.expert_tokens:
        raise UsageError(
            f"{directory} does not return which experts it uses, and no checkpoint is given",
            hint="give --against CHECKPOINT, or export for ONNX with --routing-outputs",
        )
    model = manifest.get("model", {})
    modules = [(str(row["module"]), int(row["top_k"])) for row in model.get("source", model).get("moe_layers", ())]
    run = functools.partial(ExpertUse.of_runner, runner, modules)
    return _Subject("artifact", directory, run, limits_of(runner).max_sequence)


def _checkpoint(built: Built) -> _Subject:
    pairs = zip(built.captured.layers, built.program.layers, strict=True)
    modules = [(before.module, before.top_k, after.num_experts) for before, after in pairs]
    if not modules:
        raise UsageError("the model has no MoE layer", hint="moec drift is for Mixture-of-Experts models")

    def run(chosen: np.ndarray, sha256: str, told: Told) -> ExpertUse:
        return ExpertUse.of_traces(collect(built.program, chosen, told), modules, chosen, sha256)

    return _Subject("checkpoint", built.checkpoint.directory, run)


def _budget(manifest: Mapping[str, Any], built: Built, text: str, progress: Progress) -> Budget | None:
    """What calibration would choose on the new text, by the settings that the artifact has recorded."""
    facts = manifest.get("routing", {})
    settings = facts.get("calibration")
    if settings is None:
        return None
    limit = "max_quality_loss" if "max_quality_loss" in settings else "budget"
    removed = (manifest["recipe"].get("routing") or {}).get("removed")
    wanted = RoutingRecipe(policy=facts["policy"], text=text, removed=removed, **{limit: settings[limit]})
    common, _ = passes.run_passes(built.captured, passes.default_passes())
    found = plan_routing(wanted, built.checkpoint, common, progress).facts or {}
    kept, parameters = found["calibration"]["kept_share"], found["parameters"]
    return Budget(facts["policy"], settings["kept_share"], kept, facts["parameters"], parameters)
