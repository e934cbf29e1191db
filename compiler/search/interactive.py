"""The front as an interactive plot of plotly, with plotly's script in the page, so that it needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from markupsafe import Markup

from moec.compiler.search.front_file import Front, Member
from moec.compiler.search.objectives import OBJECTIVES, PERPLEXITY, Objective, axis, scaled, shown

PLOT = "front-interactive"
"""Identifier of the element that holds the plot."""
HEIGHT = 520
_FOLLOW = f"""
document.getElementById("{PLOT}").on("plotly_click", event => {{
  location.hash = "member-" + event.points[0].customdata;
}});
"""


def front_plot(front: Front) -> Markup | None:
    """The members by two objectives, which a menu chooses, with 95 % intervals of perplexity; None without plotly.

    A third objective is the colour, the pointer shows all values, and a click leads to the recipe.
    """
    try:
        import plotly.graph_objects as graph
        from plotly.io import to_html
    except ImportError:
        return None
    pairs = [(across, up) for up, across in combinations([OBJECTIVES[name] for name in front.objectives], 2)]
    traces = [graph.Scatter(**_trace(front, pair, visible=pair == pairs[0])) for pair in pairs]
    figure = graph.Figure(traces)
    buttons = [
        {
            "label": f"{up.name} by {across.name}",
            "method": "update",
            "args": [{"visible": [pair == other for other in pairs]}, _axes(pair)],
        }
        for pair in pairs
        for across, up in (pair,)
    ]
    figure.update_layout(
        height=HEIGHT,
        template="plotly_white",
        margin={"t": 60},
        updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.12}] if len(pairs) > 1 else [],
        **{key.removesuffix(".title.text"): {"title": {"text": text}} for key, text in _axes(pairs[0]).items()},
    )
    # The identifier is fixed, so that the same front gives the same page.
    page = to_html(figure, include_plotlyjs=True, full_html=False, div_id=PLOT, post_script=_FOLLOW)
    return Markup(page)


def _axes(pair: tuple[Objective, Objective]) -> dict[str, str]:
    across, up = pair
    return {"xaxis.title.text": axis(across), "yaxis.title.text": axis(up)}


def _trace(front: Front, pair: tuple[Objective, Objective], *, visible: bool) -> dict[str, Any]:
    across, up = pair
    goals, members = [OBJECTIVES[name] for name in front.objectives], front.members
    rest = [goal for goal in goals if goal not in pair]
    found: dict[str, Any] = {
        "x": [_value(member, across) for member in members],
        "y": [_value(member, up) for member in members],
        "text": [member.name for member in members],
        "customdata": [member.name for member in members],
        "hovertext": [_described(member, goals) for member in members],
        "hoverinfo": "text",
        "mode": "markers+text",
        "textposition": "top center",
        "marker": {"size": 10},
        "visible": visible,
        "showlegend": False,
    }
    if rest:
        colours = {"color": [_value(member, rest[0]) for member in members], "colorbar": {"title": axis(rest[0])}}
        found["marker"] = {"size": 10, "colorscale": "Viridis", **colours}
    if up is PERPLEXITY:
        found["error_y"] = _ends(members)
    return found


def _value(member: Member, goal: Objective) -> float:
    return scaled(goal, member.held_out.values[goal.name])


def _ends(members: Sequence[Member]) -> dict[str, Any]:
    """The intervals of perplexity as plotly's error bars, which are lengths."""
    intervals = [member.held_out.perplexity for member in members]
    upper = [scaled(PERPLEXITY, each.high - each.value) for each in intervals]
    lower = [scaled(PERPLEXITY, each.value - each.low) for each in intervals]
    return {"type": "data", "array": upper, "arrayminus": lower, "thickness": 1}


def _described(member: Member, goals: Sequence[Objective]) -> str:
    interval = member.held_out.perplexity
    values = [f"{goal.name} {shown(goal, member.held_out.values[goal.name])}" for goal in goals]
    return "<br>".join([f"recipe {member.name}", *values, f"95 % [{interval.low:+.2%}, {interval.high:+.2%}]"])
