"""Makes the recipes of `moec zoo`: `python benchmarks/zoo.py front SEARCH` and `python benchmarks/zoo.py released`.

`front` takes the front of a finished search of a model that is in this repository. `fast` is the member with the
fewest expert FLOPs, and `small` the smallest, of which the whole 95 % interval of perplexity on held-out text is within
1 %; the others have their numbers. `released` estimates recipes of released models from their config.json alone, for
every device profile; their quality stays open.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from machine import describe

import moec
from moec.compiler.build.estimate import EstimateRequest, count_program, predict
from moec.compiler.families.released_models import published_config, write_hollow_checkpoint
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.measure.estimate.devices import device_names
from moec.compiler.pipeline.captures import Captures
from moec.compiler.search.front_file import Front, Member, read_front
from moec.compiler.zoo.entries import Entry, Estimated, Measured, Model

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "compiler" / "zoo" / "recipes"
BOUND = 0.01
RELEASED = (
    "DeepSeek-V2-Lite",
    "gpt-oss-20b",
    "granite-3.1-1b-a400m",
    "LFM2-8B-A1B",
    "Mixtral-8x7B-v0.1",
    "OLMoE-1B-7B-0924",
    "Qwen1.5-MoE-A2.7B",
    "Qwen3-30B-A3B",
)
RECIPES: Mapping[str, dict[str, Any]] = {
    "int8": {"quantize": {"format": "int8"}},
    "int4": {"quantize": {"format": "int4"}},
    "int4-routed": {"quantize": {"format": "int4"}, "routing": {"policy": "threshold", "budget": 0.7}},
}
"""Recipes of released models, for ONNX."""
WITHOUT = ("checkpoint", "revision", "trust_remote_code")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    front = commands.add_parser("front")
    front.add_argument("search", type=Path, help="directory of the search")
    front.add_argument("--commit", required=True, help="commit of moec that searched")
    released = commands.add_parser("released")
    released.add_argument("models", nargs="*", default=RELEASED)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.command == "front":
        write(of_front(given.search, given.commit))
        return
    for name in given.models:
        write(of_release(name, RECIPES))
        print(name, flush=True)


def write(model: Model) -> None:
    """Write the file of a model."""
    content = model.model_dump(mode="json", exclude_none=True)
    text = yaml.safe_dump(content, sort_keys=False, width=120)
    head = "# Made by benchmarks/zoo.py; not to be edited.\n"
    (FOLDER / f"{model.model}.yaml").write_text(head + text, encoding="utf-8")


def of_front(directory: Path, commit: str) -> Model:
    """The front of a finished search."""
    front = read_front(directory)
    place = Path(front.settings["checkpoint"])
    command = search_command(front, place)
    names = named(front.members)
    recipes = {}
    for member in sorted(front.members, key=lambda one: (names[one.name].isdigit(), names[one.name])):
        fields = yaml.safe_load((directory / member.recipe).read_text(encoding="utf-8"))
        fields = {key: value for key, value in fields.items() if key not in WITHOUT}
        measured = Measured(
            perplexity=member.held_out.perplexity.model_dump(),
            divergence=member.held_out.divergence or 0.0,
            values=member.held_out.values,
            artifact_bytes=member.artifact.bytes if member.artifact else None,
            gates=member.artifact.verdicts if member.artifact else {},
        )
        recipes[names[member.name]] = Entry(recipe=fields, quality="measured", measure=command, measured=measured)
    made = {
        "command": command,
        "commit": commit,
        "moec": front.moec,
        "texts": front.texts,
        "windows": f"{front.settings['windows']} of the search, {front.settings['held_out_windows']} of held-out text",
        "individuals": front.individuals,
        "measured": front.measured,
        "hypervolume": front.hypervolume,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe().partition(", load")[0],
    }
    return Model(
        model=place.name, checkpoint=f"golden_models/{place.name}", source=front.source, made=made, recipes=recipes
    )


def named(members: Sequence[Member]) -> dict[str, str]:
    """Name of a member -> its name in the zoo."""
    within = [one for one in members if one.held_out.perplexity.high <= BOUND]
    names = {one.name: one.name for one in members}
    for title, objective in (("small", "size"), ("fast", "expert-flops")):
        if within and objective in within[0].held_out.values:
            best = min(within, key=lambda one: one.held_out.values[objective])
            names[best.name] = title
    return names


def search_command(front: Front, place: Path) -> str:
    """The command that repeats a search."""
    settings = front.settings
    words = ["moec search", f"golden_models/{place.name}", "-t", settings["target"]]
    words += ["--objectives", settings["objectives"]]
    for key in ("population", "generations", "windows", "held_out_windows", "members", "seed"):
        if settings[key] is not None:
            words += [f"--{key.replace('_', '-')}", str(settings[key])]
    return " ".join([*words, "-o search"])


class OneCheckpoint(Captures):
    """Captures of one checkpoint, which is not compared by digests: those of a hollow one take minutes to compute."""

    def _is_held(self, checkpoint: Checkpoint) -> bool:  # noqa: ARG002
        return self._checkpoint is not None


def of_release(name: str, wanted: Mapping[str, dict[str, Any]]) -> Model:
    """Estimates of recipes of a released model, from its config.json."""
    captures, recipes = OneCheckpoint(), {}
    with tempfile.TemporaryDirectory() as folder:
        write_hollow_checkpoint(name, Path(folder))
        for title, own in wanted.items():
            estimated = estimate(folder, own, captures)
            recipes[title] = Entry(
                recipe={"target": "onnx", **own},
                quality="not measured",
                measure=f"moec export CHECKPOINT --recipe zoo:{name}/{title} --max-quality-loss 1% -o out",
                estimated=estimated,
            )
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    made = {
        "command": f"python benchmarks/zoo.py released {name}",
        "commit": commit.stdout.strip(),
        "moec": moec.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "config": published_config(name)[1],
        "date": datetime.now(UTC).date().isoformat(),
    }
    return Model(model=name, checkpoint="golden_models/released.yaml, sizes as published", made=made, recipes=recipes)


def estimate(checkpoint: str, fields: Mapping[str, Any], captures: Captures) -> Estimated:
    """What `moec estimate` says of a recipe, for every device profile."""
    routing = fields.get("routing", {})
    request = {
        "checkpoint": checkpoint,
        "target": "onnx",
        "quantize": fields["quantize"]["format"],
        "routing": routing.get("policy"),
        "kept_share": routing.get("budget", 1.0),
    }
    counts, stored = count_program(EstimateRequest(**request), captures)
    found: dict[str, Any] = {}
    for device in device_names():
        one = predict(counts, stored, EstimateRequest(**request, device=device), lambda *_: None)
        found[device] = {"decode_seconds": one["decode"]["roofline"], "fits": one["memory"]["fits"]}
    memory = counts.size + counts.states_at(128)
    return Estimated(
        weights=counts.size, memory=memory, parameters=counts.parameters, active=counts.active, devices=found
    )


if __name__ == "__main__":
    main()
