"""Runs functions of a package: with Core ML on macOS, with moec's executor elsewhere."""

from __future__ import annotations

import copy
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from moec.compiler.common.errors import ArtifactError
from moec.targets.coreml.executor import MilModel, MilSession
from moec.targets.coreml.flavors import TOKENS, Feeds
from moec.targets.coreml.library import coremltools_module, quiet
from moec.targets.coreml.package import EXPERT_SCOPE


class Backend(Protocol):
    """Runs the functions of one package on one set of states."""

    def reset(self) -> None:
        """Set every state to zero."""

    def predict(self, function: str, feeds: Feeds) -> Mapping[str, np.ndarray]:
        """Run `function` once and update the states."""

    def fork(self) -> Self:
        """A second backend with its own states and the same weights."""

    def facts(self) -> Mapping[str, Any]:
        """Runtime and its counters, for the report."""


class ExecutorBackend:
    """moec's executor in numpy.

    Args:
        package: The `.mlpackage`.
    """

    def __init__(self, package: Path) -> None:
        self.model = MilModel.open(package)
        self._begin()

    def _begin(self) -> None:
        self._state = self.model.new_state()
        self._sessions: dict[str, MilSession] = {}
        self._tokens: dict[str, int] = {}

    def fork(self) -> Self:
        """A second backend with its own states and counters and the same weights."""
        twin = copy.copy(self)
        twin._begin()
        return twin

    def reset(self) -> None:
        """Set every state to zero."""
        self._state.reset()

    def predict(self, function: str, feeds: Feeds) -> Mapping[str, np.ndarray]:
        """Run `function` once."""
        if function not in self._sessions:
            self._sessions[function] = self.model.session(function, state=self._state)
        self._tokens[function] = self._tokens.get(function, 0) + next(
            int(feeds[name].shape[1]) for name in TOKENS if name in feeds
        )
        return self._sessions[function].predict(feeds)

    def facts(self) -> Mapping[str, Any]:
        """Runtime, and for each function the executed tokens, multiply-accumulates and weight bytes read."""
        executed = {}
        for name, session in self._sessions.items():
            whole, experts = session.counters.total(), session.counters.total(EXPERT_SCOPE)
            executed[name] = {
                "tokens": self._tokens[name],
                "macs": whole.macs,
                "weight_bytes": whole.weight_bytes,
                "expert_macs": experts.macs,
                "expert_weight_bytes": experts.weight_bytes,
            }
        return {
            "runtime": "moec executor for ML programs (numpy)",
            "latency": "not measured: needs macOS",
            "executed": executed,
        }


class CoreMLBackend:
    """Core ML itself.

    Args:
        package: The `.mlpackage`.
        units: Name of a `coremltools.ComputeUnit`.
    """

    def __init__(self, package: Path, units: str = "ALL") -> None:
        self._package, self._units = package, units
        self._models: dict[str, Any] = {}
        self._state: Any = None

    def fork(self) -> Self:
        """A second backend with its own state and the same models."""
        twin = copy.copy(self)
        twin.reset()
        return twin

    def reset(self) -> None:
        """Drop the state; a new one is made on next use."""
        self._state = None

    def predict(self, function: str, feeds: Feeds) -> Mapping[str, np.ndarray]:
        """Run `function` once.

        Raises:
            ArtifactError: Core ML cannot load the package or refuses the inputs.
        """
        try:
            model = self._models.get(function) or self._load(function)
            if self._state is None:
                self._state = model.make_state()
            results: Mapping[str, np.ndarray] = model.predict(dict(feeds), state=self._state)
        except RuntimeError as error:
            raise ArtifactError(
                f"{self._package}: Core ML cannot run function {function}: {str(error).splitlines()[0]}",
                hint="`moec verify` checks whether the files are still as they were built",
            ) from error
        return results

    def _load(self, function: str) -> Any:
        ct = coremltools_module()
        with quiet():
            model = ct.models.MLModel(
                str(self._package), function_name=function, compute_units=getattr(ct.ComputeUnit, self._units)
            )
        self._models[function] = model
        return model

    def facts(self) -> Mapping[str, Any]:
        """Runtime and compute units."""
        return {"runtime": f"Core ML on macOS {platform.mac_ver()[0]}", "compute_units": self._units}


def open_backend(package: Path) -> Backend:
    """Core ML on macOS, moec's executor elsewhere."""
    return CoreMLBackend(package) if sys.platform == "darwin" else ExecutorBackend(package)
