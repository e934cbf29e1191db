"""The model to calibrate, and the text on which routing is calibrated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.compiler.common.digest import sha256_of_text
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.program import Program
from moec.compiler.text.corpus import read_text, tokenize, windows
from moec.passes.routing.calibrate.collect import MASSES, collect, measure_sensitivities
from moec.passes.routing.calibrate.compensation import fit_compensations
from moec.passes.routing.calibrate.sensitivities import Sensitivities
from moec.passes.routing.calibrate.traces import RoutingTrace
from moec.passes.routing.compensation import Compensation
from moec.passes.routing.policies.base import Policy
from moec.passes.routing.policies.table import policy_type

if TYPE_CHECKING:
    from moec.compiler.common.progress import Progress

LENGTH = 256
WINDOWS = 64
SENSITIVITY_WINDOWS = 8
STAGE = "calibrate routing"


@dataclass(frozen=True)
class CalibrationData:
    """The model to calibrate, and the calibration text as token windows [windows, length]."""

    checkpoint: Checkpoint
    program: Program
    text: str
    chosen: np.ndarray

    @classmethod
    def of(cls, checkpoint: Checkpoint, program: Program, location: str | None) -> CalibrationData:
        """Read a text file or a directory; None stands for the text that comes with moec."""
        text = read_text(location)
        every = windows(tokenize(checkpoint.directory, text), LENGTH)
        # Windows are spread over the whole text, since its parts may come from different sources.
        return cls(checkpoint, program, text, every[:: max(1, len(every) // WINDOWS)][:WINDOWS])

    def traces(self, progress: Progress) -> list[RoutingTrace]:
        """The routing of the model on the text."""
        return collect(self.program, self.chosen, lambda done, total: progress(STAGE, done, total))

    def sensitivities(self, name: str, progress: Progress) -> Sensitivities | None:
        """The losses that a policy's parameters depend on, or None if they depend on none."""
        wanted = policy_type(name).sensitivities
        if not wanted:
            return None
        step = max(1, len(self.chosen) // SENSITIVITY_WINDOWS)
        sample = self.chosen[::step][:SENSITIVITY_WINDOWS]
        return measure_sensitivities(
            self.program,
            sample,
            ks="k" in wanted,
            masses=MASSES if "mass" in wanted else (),
            told=lambda done, total: progress("routing sensitivities", done, total),
        )

    def compensations(self, policy: Policy, progress: Progress) -> tuple[Compensation | None, ...]:
        """What stands in for dropped experts, fitted for a policy; see `passes.routing.compensation`."""
        return fit_compensations(
            self.program,
            policy,
            self.chosen,
            lambda done, total: progress("compensation of dropped experts", done, total),
        )


def text_facts(material: CalibrationData) -> dict[str, Any]:
    """What moec.json and calibration files say of the text."""
    return {
        "sha256": sha256_of_text(material.text),
        "windows": len(material.chosen),
        "length": material.chosen.shape[1],
    }
