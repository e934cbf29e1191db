"""The model card of an artifact: README.md of a repository on the Hugging Face Hub.

Its metadata are those of the Hub's documentation ("Model Cards", huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from moec.compiler.common.markdown import table
from moec.compiler.report.schema import Report
from moec.compiler.report.summary import command_lines, opening, summarise, summary_rows

FOLDER = "model"
"""The directory into which the commands of the card download the artifact."""


@dataclass(frozen=True)
class CardMetadata:
    """What only the publisher knows.

    Attributes:
        base_model: Hub id of the model that was compiled.
        license: Identifier of the license.
    """

    base_model: str | None = None
    license: str | None = None


def model_card(manifest: Mapping[str, Any], report: Report, name: str, given: CardMetadata) -> str:
    """The text of the card.

    Args:
        manifest: The content of moec.json.
        report: The content of report.json.
        name: The repository, OWNER/NAME.
        given: What only the publisher knows.
    """
    base_model = given.base_model
    verdicts = [verdict.model_dump(mode="json") for verdict in report.verdicts]
    summary = summarise(manifest, report.files, verdicts, directory=FOLDER, checkpoint=base_model or "CHECKPOINT")
    target = summary["target"]
    known = {
        "license": given.license,
        "base_model": base_model,
        "base_model_relation": "quantized" if base_model and summary["formats"] else None,
        "pipeline_tag": "text-generation",
        "library_name": "moec",
        "tags": ["moec", "mixture-of-experts", *([target] if target else [])],
    }
    head = yaml.safe_dump({key: value for key, value in known.items() if value}, sort_keys=False)
    lines = [
        f"---\n{head}---",
        "",
        *opening(summary, manifest, summary_rows(summary)),
        "## Use",
        "",
        "```",
        f"hf download {name} --local-dir {FOLDER}",
        *command_lines(summary),
        "```",
        "",
        "## Verdicts of the gates",
        "",
        table(("gate", "verdict", ""), [(row["gate"], row["status"], row["summary"]) for row in verdicts]),
        "",
        "`report.html` has everything that was measured; `moec.json` has the recipe, the digests of the files and the",
        "versions of the tools. `moec verify` checks the files.",
    ]
    return "\n".join(lines) + "\n"
