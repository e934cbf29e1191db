"""Options with a few values."""

from __future__ import annotations

import json

from pydantic import BaseModel

from moec.compiler.common.choices import Choice
from moec.compiler.common.validation import choices_of


class Size(Choice):
    """A size."""

    SMALL = "small", "fits into a pocket"
    LARGE = "large", "fits into a room"


class Options(BaseModel):
    size: Size = Size.SMALL


def test_a_member_is_its_value_and_says_what_it_means() -> None:
    assert Size("large") is Size.LARGE
    assert Size.LARGE == "large" == Size.LARGE.value == str(Size.LARGE) == json.loads(json.dumps(Size.LARGE))
    assert Size.meanings() == "small: fits into a pocket; large: fits into a room"


def test_options_are_read_and_written_by_value() -> None:
    assert Options.model_validate({"size": "large"}).size is Size.LARGE
    assert Options().model_dump(mode="json") == {"size": "small"}
    assert choices_of(Size) == ("small", "large")
