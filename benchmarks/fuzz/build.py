"""One random build: moec's verdict, the judge's, and what both together mean."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz.judge import judge
from fuzz.recipes import Traits
from fuzz.reference import Reference, knows_every_matrix
from moec.compiler.common.errors import MoecError
from moec.compiler.pipeline.captures import Captures
from moec.compiler.pipeline.export import compile_recipe
from moec.compiler.pipeline.recipe import make_recipe

RIGHT, REFUSED, UNDECIDED = "right", "refused", "undecided"
SILENT, ALARM, CAUGHT, INTERNAL, HANG = "silently wrong", "false alarm", "wrong, found by a gate", "exit 70", "hang"
UNJUDGED = "judge failed"
FAULTS = (SILENT, ALARM, CAUGHT, INTERNAL, HANG, UNJUDGED)
CLEAN = frozenset({2, 3, 4})
"""Exit codes of a refusal before anything is built: usage, model, lowering."""


@dataclass(frozen=True)
class Outcome:
    """How a build ended.

    Attributes:
        outcome: One of the constants of this module.
        cause: The failed gates with their summaries, the message of the error, or empty.
        code: Exit code.
        error: Largest difference that the judge found, relative to the largest logit.
        excess: The same over what the judge allows.
        sharp: Share of the positions that tell the judge something.
        seconds: CPU seconds of build, gates and judge.
    """

    outcome: str
    cause: str = ""
    code: int = 0
    error: float = 0.0
    excess: float = 0.0
    sharp: float = 0.0
    seconds: float = 0.0


def traits(checkpoint: Path) -> Traits:
    """What recipes have to know of a checkpoint, as transformers sees it."""
    reference = Reference(checkpoint)
    layers = [own for _, own in reference.layers]
    experts = tuple(int(getattr(own, "num_experts", own.down_proj.shape[0])) for own in layers)
    slots = _slots(reference.decoder.config.get_text_config()) if layers else 0
    known = knows_every_matrix(reference.decoder)
    return Traits(experts, slots, routed=bool(experts and slots), quantizable=known)


def _slots(config: Any) -> int:
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
    found = next((value for name in names if (value := getattr(config, name, None))), 0)
    return found if isinstance(found, int) else max(found)


def run(checkpoint: Path, recipe: Mapping[str, Any], captures: Captures, output: Path) -> Outcome:
    """Build, run the gates, judge and remove the artifact at `output`."""
    started = time.process_time()
    try:
        found = _run(checkpoint, recipe, captures, output)
    finally:
        shutil.rmtree(output, ignore_errors=True)
    outcome, cause, code, *figures = found
    return Outcome(outcome, cause, code, *figures, seconds=round(time.process_time() - started, 2))


def _run(checkpoint: Path, recipe: Mapping[str, Any], captures: Captures, output: Path) -> tuple[Any, ...]:
    try:
        result = compile_recipe(make_recipe({"checkpoint": str(checkpoint), **recipe}), output, captures=captures)
    except MoecError as error:
        told = error.message.replace(str(checkpoint), "CHECKPOINT")
        refused = error.exit_code in CLEAN and bool(error.hint)
        return REFUSED if refused else INTERNAL, told, error.exit_code, 0.0, 0.0, 0.0
    except Exception as error:  # noqa: BLE001 - what the command line would end with exit code 70 for
        place = traceback.extract_tb(error.__traceback__)[-1]
        cause = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        return INTERNAL, cause, 70, 0.0, 0.0, 0.0
    try:
        found = judge(checkpoint, output, recipe, _dtype(result.manifest))
    except Exception:  # noqa: BLE001 - a fault of the judge, told apart from those of moec
        return UNJUDGED, traceback.format_exc(limit=-4), result.exit_code, 0.0, 0.0, 0.0
    failed = [f"{verdict.gate}: {verdict.summary}" for verdict in result.failed]
    cause = "; ".join([*failed, *([f"judge: {found.failed}"] if found.failed else [])])
    if found.right is None:
        outcome = UNDECIDED
    elif found.right:
        outcome = ALARM if result.failed else RIGHT
    else:
        outcome = CAUGHT if result.failed else SILENT
    return outcome, cause, result.exit_code, found.error, found.excess, found.sharp


def _dtype(manifest: Mapping[str, Any]) -> str:
    found: str = manifest["recipe"]["dtype"]
    return found
