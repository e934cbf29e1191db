"""Puts faults into artifacts, one at a time, and writes a table of the gates that find them.

    python benchmarks/gate_power.py [--target onnx,tflite] [--kind mask] [--resume rows.jsonl] [-o docs/gates.md]

Each fault (`benchmarks/faults/`) is put into a tiny model between the last pass and lowering, into the files of the
artifact, or into the runtime, and the gates keep the Program as it should be. Every model is also judged without a
fault, where no gate may fail. Exits with 1 if a fault is found by no gate, or a gate fails without a fault.

`--resume` keeps finished rows, so that a run can be stopped and continued.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from faults.fault import TARGETS, Fault
from faults.judge import LOWERING, Outcome, judge
from faults.models import Workshop
from faults.table import FAULTS
from machine import describe
from pages import put

Row = tuple[Fault, dict[str, Outcome]]
"""A fault, and its outcome on each target that it applies to."""


def key(fault: Fault, target: str) -> str:
    return f"{fault.model}: {fault.kind}: {fault.name}: {target}"


def controls(faults: Sequence[Fault]) -> list[Fault]:
    """Every model that gets a fault, without one."""
    return [Fault("no fault", model, model) for model in dict.fromkeys(fault.model for fault in faults)]


def run(faults: Sequence[Fault], targets: Sequence[str], directory: Path, resume: Path | None) -> list[Row]:
    """Judge every fault on every target; rows that `resume` holds are not judged again."""
    known: dict[str, Outcome] = {}
    if resume is not None and resume.is_file():
        for line in resume.read_text().splitlines():
            entry = json.loads(line)
            known[entry["key"]] = Outcome(tuple(entry["caught"]), entry["said"], entry["refused"])
    workshop, rows = Workshop(directory / "models"), list[Row]()
    for fault in faults:
        outcomes = {}
        for target in (target for target in targets if target in fault.targets):
            name = key(fault, target)
            if name not in known:
                known[name] = judge(fault, target, workshop, directory / "artifact")
                if resume is not None:
                    with resume.open("a") as file:
                        file.write(json.dumps({"key": name, **asdict(known[name])}) + "\n")
            outcomes[target] = known[name]
            print(f"{name}: {cell(outcomes[target])}", flush=True)
        rows.append((fault, outcomes))
    return rows


def cell(outcome: Outcome | None) -> str:
    """The gates that find a fault, in a few words."""
    if outcome is None or outcome.refused:
        return "-"
    return ", ".join(gate.removesuffix(": artifact") for gate in outcome.caught) or "**none**"


def survivors(rows: Sequence[Row]) -> Iterator[str]:
    """The faults that no gate finds."""
    for fault, outcomes in rows:
        yield from (key(fault, name) for name, item in outcomes.items() if not item.caught and not item.refused)


def alarms(rows: Sequence[Row]) -> Iterator[str]:
    """The models without a fault for which a gate fails."""
    for fault, outcomes in rows:
        yield from (f"{key(fault, name)}: {item.said}" for name, item in outcomes.items() if item.caught)


def counts(rows: Sequence[Row], targets: Sequence[str]) -> str:
    """A table with the number of faults, and of those that each gate finds, by target."""
    gates = [*dict.fromkeys(gate for _, outcomes in rows for item in outcomes.values() for gate in item.caught)]
    lines = [f"| target | faults | found | {' | '.join(map(short, gates))} |", "|---" * (len(gates) + 3) + "|"]
    for target in targets:
        own = [outcomes[target] for _, outcomes in rows if target in outcomes and not outcomes[target].refused]
        numbers = [len(own), sum(bool(item.caught) for item in own)]
        numbers += [sum(gate in item.caught for item in own) for gate in gates]
        lines.append(f"| {target} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)


def short(gate: str) -> str:
    return "refused when it is lowered" if gate == LOWERING else gate.removesuffix(": artifact")


def page(rows: Sequence[Row], unspoiled: Sequence[Row], targets: Sequence[str]) -> str:
    """The tables, and what they were made on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    judged = sum(not item.refused for _, outcomes in unspoiled for item in outcomes.values())
    text = [
        f"{len(rows)} faults; made on commit {commit.stdout.strip()}, {describe()}.",
        counts(rows, targets),
        f"Without a fault, {judged} artifacts of {len(unspoiled)} models: {len(list(alarms(unspoiled)))} failed.",
    ]
    for kind in dict.fromkeys(fault.kind for fault, _ in rows):
        text.append(f"### {kind.capitalize()}")
        lines = [f"| fault | model | {' | '.join(targets)} |", "|---" * (len(targets) + 2) + "|"]
        for fault, outcomes in (row for row in rows if row[0].kind == kind):
            cells = " | ".join(cell(outcomes.get(target)) for target in targets)
            lines.append(f"| {fault.name} | {fault.model} | {cells} |")
        text.append("\n".join(lines))
    return "\n\n".join(text)


def chosen(options: Mapping[str, str]) -> list[Fault]:
    kinds = [kind.strip() for kind in options["kind"].split(",") if kind.strip()]
    return [fault for fault in FAULTS if not kinds or fault.kind in kinds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default=",".join(TARGETS))
    parser.add_argument("--kind", default="")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    targets, faults = options.target.split(","), chosen(vars(options))
    torch.set_num_threads(1)  # the models are too small for more
    with tempfile.TemporaryDirectory() as folder:
        unspoiled = run(controls(faults), targets, Path(folder), options.resume)
        rows = run(faults, targets, Path(folder), options.resume)
    if options.output is not None:
        put(page(rows, unspoiled, targets), options.output)
    problems = [
        *(f"no gate finds {name}" for name in survivors(rows)),
        *(f"false alarm: {name}" for name in alarms(unspoiled)),
    ]
    print("\n".join(problems) or f"{len(rows)} faults: every one is found, and no artifact without a fault fails")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
