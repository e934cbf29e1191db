"""front.json is what its schema says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moec.compiler.common.errors import ArtifactError, UsageError
from moec.compiler.search.front_file import Front, read_front

ROOT = Path(__file__).resolve().parents[3]


def test_the_published_schema_is_ours() -> None:
    assert json.loads((ROOT / "docs" / "front.schema.json").read_text()) == Front.model_json_schema()


def test_what_is_no_front_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"does not contain front\.json") as error:
        read_front(tmp_path)
    assert "--resume" in error.value.hint
    (tmp_path / "front.json").write_text('{"members": 3}')
    with pytest.raises(UsageError, match="members"):
        read_front(tmp_path)
