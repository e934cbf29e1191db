"""`moec inspect --text`: every token of a text coloured by the share of its experts that it uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from moec.compiler.common.artifact import is_artifact, read_manifest
from moec.compiler.common.errors import UsageError
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.measure.accounting import token_view
from moec.compiler.pipeline.program import build_program
from moec.compiler.pipeline.recipe import make_recipe
from moec.compiler.text.corpus import tokenize
from moec.compiler.text.tokenizer import open_tokenizer

COLOURS = ("#1a9850", "#91cf60", "#d9ef8b", "#fee08b", "#fc8d59", "#d73027")
"""Colours from few experts to all experts."""


def experts_by_token(
    location: str, text: str, against: str | None, *, trust_remote_code: bool = False
) -> list[dict[str, Any]]:
    """Run a text through the Program of an artifact, or of a checkpoint without dynamic routing.

    Args:
        location: An artifact or a checkpoint.
        text: The text.
        against: The checkpoint that the artifact was built from.
        trust_remote_code: Whether to run modelling code of the checkpoint.

    Returns:
        For each token: `text`, `share` of the slots used, and number of used `slots` in each MoE layer.

    Raises:
        UsageError: An artifact is given without its checkpoint, or the text is empty.
    """
    directory = Path(location).expanduser()
    fields: dict[str, Any] = {"target": "onnx"}
    if is_artifact(directory):
        if against is None:
            raise UsageError(
                "--text runs the checkpoint, since an artifact has its weights in the format of its runtime",
                hint="give --against CHECKPOINT with the checkpoint that the artifact was built from",
            )
        fields, location = dict(read_manifest(directory)["recipe"]), against
    recipe = make_recipe({**fields, "checkpoint": location, "trust_remote_code": trust_remote_code})
    checkpoint = Checkpoint.open(location, trust_remote_code=trust_remote_code)
    ids = tokenize(checkpoint.directory, text)
    if not len(ids):
        raise UsageError("--text is empty", hint="give a few words")
    tokenizer = open_tokenizer(checkpoint.directory)
    return [
        {"text": tokenizer.decode([index]), "share": share, "slots": list(slots)}
        for index, share, slots in token_view(build_program(recipe), ids.tolist())
    ]


def coloured(view: Sequence[dict[str, Any]]) -> Text:
    """The text with a colour per token from green (few experts) to red (all), and the mean share below."""
    text = Text()
    for token in view:
        colour = COLOURS[min(int(token["share"] * len(COLOURS)), len(COLOURS) - 1)]
        text.append(token["text"], style=f"black on {colour}")
    mean = sum(token["share"] for token in view) / len(view)
    text.append(f"\n{mean:.1%} of the slots are used")
    return text
