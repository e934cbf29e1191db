"""Aliases in MLflow's registry, with a stand-in of its client; `tests/interop/test_extras.py` has the real one."""

from __future__ import annotations

from collections import UserList
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from moec import cli
from moec.compiler.build.publish import registry_at
from tests.support.mlflow_stand_in import stand_in

URI = "http://127.0.0.1:1"


class Page(UserList[Any]):
    """A page of results, with the token of the next."""

    token: str | None = None


@dataclass
class Store:
    """What a tracking server holds of one model."""

    tags: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    failed: tuple[str, ...] = ("3",)

    def search_registered_models(self, page_token: str | None) -> Page:
        page = Page([SimpleNamespace(name="olmoe" if page_token else "other")])
        page.token = None if page_token else "more"
        return page

    def get_registered_model(self, name: str) -> Any:
        return SimpleNamespace(name=name, tags=self.tags, aliases=self.aliases)

    def search_model_versions(self, filter_string: str) -> list[Any]:
        assert filter_string == "name='olmoe'"
        gates = {number: "fail" if number in self.failed else "pass" for number in ("10", "3", "2", "1")}
        return [
            SimpleNamespace(version=number, tags={"moec.gate.quality": status, "moec.bytes": "7"})
            for number, status in gates.items()
        ]

    def set_registered_model_alias(self, _name: str, alias: str, version: str) -> None:
        self.aliases[alias] = version

    def set_registered_model_tag(self, _name: str, key: str, value: str) -> None:
        assert key not in self.tags
        self.tags[key] = value


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    found = Store()
    stand_in(found, monkeypatch)
    return found


def test_aliases_are_those_of_mlflow_and_their_history_is_kept_in_tags(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    for version in ("1", "2", "2", "10"):
        assert cli.dispatch(["publish", "promote", URI, f"olmoe@{version}", "--as", "prod"]) == 0
    assert store.aliases == {"prod": "10"}
    assert len(store.tags) == 3
    assert cli.dispatch(["publish", "rollback", URI, "olmoe", "--alias", "prod"]) == 0
    assert store.aliases == {"prod": "2"}
    capsys.readouterr()
    assert cli.dispatch(["publish", "list", URI, "olmoe", "--history"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[1] for line in shown.splitlines()[1:5]] == ["1", "2", "3", "10"]
    assert "10 -> 2" in shown


def test_an_alias_that_was_set_in_mlflow_itself_is_what_a_rollback_leaves(store: Store) -> None:
    place = registry_at(URI)
    place.promote("olmoe", "1", "prod", note="", allow_failed=False)
    store.aliases["prod"] = "2"
    store.tags["moec.alias.note"] = "of somebody else"
    event = place.rollback("olmoe", "prod", note="")
    assert (event.replaced, event.version, store.aliases["prod"]) == ("2", "1", "1")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["promote", URI, "olmoe@4", "--as", "prod"], 2, "unknown version '4'"),
        (["promote", URI, "olmoe@3", "--as", "prod"], 9, "not promoted: failed: quality"),
        (["promote", URI, "olm@1", "--as", "prod"], 2, "did you mean 'olmoe'?"),
        (["promote", URI, "olmoe@1", "--as", "2"], 2, "is the name of a version"),
        (["rollback", URI, "olmoe", "--alias", "prod"], 2, "olmoe has no alias 'prod'"),
    ],
)
def test_what_cannot_be_done_is_said(
    store: Store, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert cli.dispatch(["publish", *arguments]) == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert (store.aliases, store.tags) == ({}, {})
