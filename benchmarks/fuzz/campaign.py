"""Runs random builds, each group of one architecture in a forked process, and keeps a row for each."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fuzz import architectures, build, recipes
from fuzz.architectures import Architecture
from fuzz.build import Outcome
from moec.compiler.pipeline.captures import Captures

PER_GROUP = 10
"""Builds of one architecture, which share its checkpoint and its captures."""
SECONDS = 240
"""A build that takes longer is killed: wall time, since the machine may be busy."""
DRAWS = 8
"""How often another architecture is drawn because transformers does not take the last one."""


@dataclass(frozen=True)
class Row:
    """A build and how it ended; everything that is needed to repeat it."""

    index: int
    seed: int
    architecture: Architecture
    recipe: dict[str, Any]
    outcome: Outcome
    commit: str = ""

    def line(self) -> str:
        """The row as a line of JSON."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def read(cls, line: str) -> Row:
        """The inverse of `line`."""
        fields = json.loads(line)
        fields |= {"architecture": Architecture(**fields["architecture"]), "outcome": Outcome(**fields["outcome"])}
        return cls(**fields)


def read(path: Path) -> dict[int, Row]:
    """The rows of a file by index; later lines win."""
    if not path.is_file():
        return {}
    found = [Row.read(line) for line in path.read_text().splitlines() if line.strip()]
    return {row.index: row for row in found}


@dataclass
class Campaign:
    """Builds of one seed.

    Attributes:
        seed: Decides every draw.
        rows: File with a row per line.
        work: Directory for checkpoints and artifacts.
        commit: Commit of moec, for the rows.
        targets: Targets, which take turns.
    """

    seed: int
    rows: Path
    work: Path
    commit: str = ""
    targets: Sequence[str] = field(default=recipes.TARGETS)

    def run(self, indices: Sequence[int]) -> None:
        """Make the builds with these indices that the file does not hold."""
        groups: dict[int, list[int]] = {}
        for index in indices:
            groups.setdefault(index // PER_GROUP, []).append(index)
        for group, members in groups.items():
            while missing := [index for index in members if index not in read(self.rows)]:
                self._in_child(group, missing)

    def _in_child(self, group: int, missing: Sequence[int]) -> None:
        """Make builds in a child; if it ends before the last one, the first that is missing gets a row here."""
        child = os.fork()
        if child == 0:
            self._become(group, missing)
        code = self._wait(child)
        left = [index for index in missing if index not in read(self.rows)]
        if code and left:
            how = f"killed after {SECONDS} s" if code == -signal.SIGKILL else f"the process ended with {code}"
            kinds = {-signal.SIGKILL: build.HANG, 1: build.UNJUDGED}
            outcome = Outcome(kinds.get(code, build.INTERNAL), how, code)
            architecture = self.architecture(group, None)
            self._append(Row(left[0], self.seed, architecture, {}, outcome, self.commit))

    def _wait(self, child: int) -> int:
        """Wait for a child, and end it if no row was written for `SECONDS`."""
        size, since = -1, time.monotonic()
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            now = self.rows.stat().st_size if self.rows.is_file() else 0
            if now != size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > SECONDS:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.05)

    def _become(self, group: int, missing: Sequence[int]) -> None:
        code = 1
        try:
            for row in self.made(group, missing):
                self._append(row)
            code = 0
        except BaseException:  # noqa: BLE001 - told by the exit code
            traceback.print_exc()
        finally:
            shutil.rmtree(self.work / str(group), ignore_errors=True)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def made(self, group: int, indices: Sequence[int]) -> Iterator[Row]:
        """Make builds of one group in this process."""
        place = self.work / str(group)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        checkpoint, captures = place / "checkpoint", Captures()
        architecture = self.architecture(group, checkpoint)
        traits = build.traits(checkpoint)
        for index in indices:
            recipe = self.recipe(index, traits)
            outcome = build.run(checkpoint, recipe, captures, place / "artifact")
            yield Row(index, self.seed, architecture, recipe, outcome, self.commit)

    def architecture(self, group: int, checkpoint: Path | None) -> Architecture:
        """The architecture of a group, written to `checkpoint`; without one, the first that is drawn.

        Raises:
            RuntimeError: transformers takes none that is drawn.
        """
        chance = random.Random(f"{self.seed}/{group}")
        if checkpoint is None:
            return architectures.draw(chance)
        for _ in range(DRAWS):
            drawn = architectures.draw(chance)
            try:
                architectures.write(drawn, checkpoint)
            except Exception:  # noqa: BLE001 - transformers raises anything for values that do not fit each other
                shutil.rmtree(checkpoint, ignore_errors=True)
            else:
                return drawn
        raise RuntimeError(f"no valid architecture in {DRAWS} draws")

    def recipe(self, index: int, traits: recipes.Traits) -> dict[str, Any]:
        """The recipe of a build."""
        target = self.targets[index % len(self.targets)]
        return recipes.draw(traits, target, random.Random(f"{self.seed}/{index}/recipe"))

    def _append(self, row: Row) -> None:
        with self.rows.open("a") as file:
            file.write(row.line())
        found = row.outcome
        print(
            f"{row.index}: {found.outcome}: {row.architecture.base}: {row.recipe.get('target', '')}: "
            f"error {found.error:.1e}, {found.excess:.2f} of what is allowed, {found.seconds:.1f} s"
            + (f": {found.cause[:200]}" if found.outcome in build.FAULTS else ""),
            flush=True,
        )


def repeat(row: Row, work: Path) -> Row:
    """Make the build of a row again, in this process."""
    place = work / "again"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    architectures.write(row.architecture, place / "checkpoint")
    outcome = build.run(place / "checkpoint", row.recipe, Captures(), place / "artifact")
    return replace(row, outcome=outcome)
