"""Puts an object of a test in the place of MLflow's client, so that no server is needed."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from moec.compiler.build import mlflow_server

if TYPE_CHECKING:
    import pytest


def stand_in(client: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `mlflow.MlflowClient(...)` be `client`, whether or not MLflow is installed."""
    mlflow, exceptions = ModuleType("mlflow"), ModuleType("mlflow.exceptions")
    mlflow.MlflowClient = lambda **_: client  # type: ignore[attr-defined]
    exceptions.MlflowException = RuntimeError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.exceptions", exceptions)
    monkeypatch.setattr(mlflow_server.importlib.util, "find_spec", lambda _: object())
