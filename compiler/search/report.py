"""report.html of a search: one self-contained page whose plot points are labelled and link to their recipes.

The front is interactive where plotly is installed, which is in the extra `search`; every plot is there without it too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from markupsafe import Markup

from moec.compiler.common.files import write_output
from moec.compiler.report import plots
from moec.compiler.report.page import Cell, Part, Section, Table, heat_map, page
from moec.compiler.report.plots import Dot, Labels
from moec.compiler.search.front_file import FILE, Front, Member
from moec.compiler.search.interactive import front_plot
from moec.compiler.search.objectives import OBJECTIVES, PERPLEXITY, Objective, axis, scaled, shown
from moec.compiler.search.settings import SPACE_HINT

REPORT = "report.html"
MOST_CELLS = 5000
"""Largest heat map of the use of the experts; those of larger models are in front.json alone."""


def write_report(directory: Path, front: Front) -> Path:
    """Write the page of a search.

    Raises:
        OutputError: The directory cannot be written.
    """
    path = directory / REPORT
    write_output(path, to_html(front), hint=SPACE_HINT)
    return path


def to_html(front: Front) -> str:
    """Render the page."""
    return page(
        "search.html.jinja", sections(front), name=Path(front.settings["checkpoint"]).name, summary=summary(front)
    )


def summary(front: Front) -> list[tuple[str, str]]:
    """Rows of the summary at the top of the page."""
    rows = [
        ("Objectives", ", ".join(OBJECTIVES[name].title for name in front.objectives)),
        ("Target", str(front.settings["target"])),
        (
            "Individuals",
            (
                f"{front.individuals}; {front.measured} were measured on text, {front.given_up} of them only in part; "
                f"{front.single_choices} runs measured single genes; {front.lost} could not be measured"
            ),
        ),
        ("Time", f"{front.seconds:.0f} s"),
        ("Hypervolume", ", ".join(f"{value:.4f} ({_ON[where]})" for where, value in front.hypervolume.items())),
        ("All figures", f"in {FILE}"),
    ]
    if front.surrogate.misleads:
        rows.append(
            (
                "Warning",
                "the surrogate misled this search: its predictions do not rank individuals as measurements do",
            )
        )
    return rows


_ON = {"search": "text of the search", "held_out": "held-out text"}


def sections(front: Front) -> list[Section]:
    """Every section, in order."""
    return [
        Section("front", "Front on held-out text", _front(front), "the front is empty"),
        Section(
            "apart",
            "Recipes with the same held-out loss",
            _apart(front),
            "all neighbours differ significantly",
        ),
        Section("artifacts", "Artifacts", _artifacts(front), "no member was built (--members)"),
        Section("generations", "Progress by generation", _generations(front), "there was only one generation"),
        Section("layers", "Routing and pruning by layer", _layers(front), "the front is empty"),
        Section("formats", "Formats", _formats(front), "formats were not varied"),
        Section("surrogate", "Predicted and measured loss", _surrogate(front), "no prediction was measured afterwards"),
        *(_member(front, member) for member in front.members),
    ]


def _front(front: Front) -> list[Part]:
    goals = [OBJECTIVES[name] for name in front.objectives]
    interactive = front_plot(front) if front.members else None
    parts = [] if interactive is None else [Part(plot=interactive)]
    for up, across in combinations(goals, 2):
        dots = [_dot(member, goals, across, up) for member in front.members]
        labels = Labels(
            f"front-{across.name}-{up.name}", f"{up.title} by {across.title}", f"{len(dots)} recipes, each a point."
        )
        parts.append(Part(plot=Markup(plots.scatter(labels, dots, (axis(across), axis(up))))))
    rows = [
        (
            Cell(member.name),
            *(Cell(shown(item, member.held_out.values[item.name]), True) for item in goals),
            Cell(_interval(member), True),
            *(Cell(shown(item, member.values[item.name]), True) for item in goals),
        )
        for member in front.members
    ]
    held = [f"{item.name}, held-out" for item in goals]
    seen = [f"{item.name}, search" for item in goals]
    caption = "Recipes that are not dominated on the text of the search, with their values on held-out text."
    return [*parts, Part(Table(caption, ("Recipe", *held, "perplexity, 95 %", *seen), rows))]


def _dot(member: Member, goals: Sequence[Objective], across: Objective, up: Objective) -> Dot:
    values = member.held_out.values
    text = f"{member.name}: " + ", ".join(f"{item.name} {shown(item, values[item.name])}" for item in goals)
    ends = (member.held_out.perplexity.low, member.held_out.perplexity.high) if up is PERPLEXITY else (None, None)
    low, high = (None if end is None else scaled(up, end) for end in ends)
    return Dot(
        scaled(across, values[across.name]), scaled(up, values[up.name]), text, f"member-{member.name}", low, high
    )


def _interval(member: Member) -> str:
    found = member.held_out.perplexity
    return f"{found.value:+.2%} [{found.low:+.2%}, {found.high:+.2%}]"


def _apart(front: Front) -> list[Part]:
    if not front.not_told_apart:
        return []
    rows = [(Cell(first), Cell(second)) for first, second in front.not_told_apart]
    caption = (
        "Neighbours by perplexity whose difference has a 95 % interval that contains zero. Choose by other objectives."
    )
    return [Part(Table(caption, ("Recipe", "Recipe"), rows))]


def _artifacts(front: Front) -> list[Part]:
    rows = [
        (
            Cell(member.name),
            Cell("proven" if built.exit_code == 0 else f"exit code {built.exit_code}", alarm=built.exit_code != 0),
            Cell(f"{built.bytes / 1e6:.2f} MB", True),
            Cell("" if built.held_out is None else f"{built.held_out.perplexity.value:+.2%}", True),
            Cell("" if built.decode_seconds is None else f"{built.decode_seconds * 1e3:.3g} ms", True),
            Cell(built.summary),
        )
        for member in front.members
        if (built := member.artifact) is not None
    ]
    header = ("Recipe", "Gates", "Size", "Perplexity change in the runtime", "Decode, measured", "Verdicts")
    return (
        [Part(Table("Built members, run on held-out text by the runtime of the target.", header, rows))] if rows else []
    )


def _generations(front: Front) -> list[Part]:
    points = [(float(item.number), item.volume) for item in front.generations]
    if len(points) < 2:
        return []
    labels = Labels("volume", "Hypervolume by generation", f"From {points[0][1]:.4f} to {points[-1][1]:.4f}.")
    rows = [
        (
            Cell(str(item.number)),
            *(
                Cell(text, True)
                for text in (str(item.individuals), str(item.measured), f"{item.volume:.5f}", str(item.front))
            ),
        )
        for item in front.generations
    ]
    worst = ", ".join(f"{name} {shown(OBJECTIVES[name], value)}" for name, value in front.worst.items())
    caption = f"Hypervolume of the measured front, as a share of the box between zero and ({worst})."
    table = Table(caption, ("Generation", "Individuals", "Measured", "Hypervolume", "Front"), rows)
    return [Part(table, Markup(plots.line(labels, points, ("generation", "hypervolume"))))]


def _layers(front: Front) -> list[Part]:
    if not front.members:
        return []
    count = len(front.members[0].layers)
    header = ("Recipe", *(f"layer {number}" for number in range(count)))
    kept = [
        (Cell(member.name), *(Cell(f"{layer.kept:.0%}", True, layer.kept) for layer in member.layers))
        for member in front.members
    ]
    gone = [
        (Cell(member.name), *(Cell(str(layer.removed), True, min(1.0, layer.removed / 16)) for layer in member.layers))
        for member in front.members
    ]
    parts = [Part(Table("Share of executed slots; the pretrained model executes all.", header, kept, dense=True))]
    if any(layer.removed for member in front.members for layer in member.layers):
        parts.append(Part(Table("Number of pruned experts.", header, gone, dense=True)))
    return parts


def _formats(front: Front) -> list[Part]:
    names = list(dict.fromkeys(name for member in front.members for name in member.formats))
    if not names:
        return []
    rows = [
        (Cell(member.name), *(Cell(member.formats.get(name, "none")) for name in names)) for member in front.members
    ]
    return [Part(Table("Format of each part of the model.", ("Recipe", *names), rows, dense=True))]


def _surrogate(front: Front) -> list[Part]:
    facts = front.surrogate
    if not facts.predicted:
        return []
    rank = "not defined" if facts.rank_correlation is None else f"{facts.rank_correlation:.3f}"
    dots = [
        Dot(1e3 * predicted, 1e3 * measured, f"predicted {predicted:.5f}, measured {measured:.5f} nats")
        for predicted, measured in zip(facts.predicted, facts.measured, strict=True)
    ]
    labels = Labels(
        "surrogate-plot", "Measured by predicted loss", f"{len(dots)} individuals, rank correlation {rank}."
    )
    errors = [abs(a - b) for a, b in zip(facts.predicted, facts.measured, strict=True)]
    rows = [
        (Cell("Rank correlation (Spearman)"), Cell(rank, True, alarm=facts.misleads)),
        (Cell("Individuals"), Cell(str(facts.individuals), True)),
        (
            Cell("Root mean square error, nats"),
            Cell(f"{math.sqrt(math.fsum(e * e for e in errors) / len(errors)):.2e}", True),
        ),
    ]
    caption = "Individuals that were predicted before they were measured."
    return [
        Part(Table(caption, ("", ""), rows), Markup(plots.scatter(labels, dots, ("predicted, 0.001 nats", "measured"))))
    ]


def _expert_use(front: Front, member: Member) -> list[Part]:
    """The use of the experts in the pretrained model and in a member, layer by layer."""
    pairs = list(zip(front.pretrained_tokens, (layer.tokens for layer in member.layers), strict=False))
    if not pairs or sum(len(before) + len(after) for before, after in pairs) > MOST_CELLS:
        return []
    rows = [
        {"layer": f"{number} {when}", "tokens": tokens}
        for number, (before, after) in enumerate(pairs)
        for when, tokens in (("before", before), ("after", after))
    ]
    caption = (
        "Tokens of held-out text that each expert computes, in the pretrained model (before) and in this recipe "
        "(after). A framed 0 marks an expert that computes none: it is pruned, or no token is routed to it."
    )
    return [heat_map(caption, rows)]


def _member(front: Front, member: Member) -> Section:
    values: Mapping[str, str] = {
        "Command": member.command,
        "Perplexity on held-out text": _interval(member),
        **{OBJECTIVES[name].title: shown(OBJECTIVES[name], member.held_out.values[name]) for name in front.objectives},
        "Found in generation": str(member.generation),
    }
    rows = [(Cell(name), Cell(text)) for name, text in values.items()]
    layers = [
        (
            Cell(str(number)),
            Cell(layer.rule or "all slots"),
            Cell(f"{layer.kept:.1%}", True),
            Cell(str(layer.removed), True),
        )
        for number, layer in enumerate(member.layers)
    ]
    parts = [
        Part(Table(f"Recipe {member.recipe}.", ("", ""), rows)),
        Part(Table("MoE layers.", ("Layer", "Rule", "Slots executed", "Experts pruned"), layers)),
        *_expert_use(front, member),
    ]
    return Section(f"member-{member.name}", f"Recipe {member.name}", parts)
