"""Small plots as inline SVG, coloured by the style of the page, with title and description for screen readers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 84, 20, 14, 66
_INSET = 12
"""Space at both ends of an axis along which points stand, so that none covers the labels of the other axis."""
_BELOW = 24
"""Distance of the labels below an axis, which clears those beside it on phones too."""
_TICKS = 5
_CHARACTER = 11.0
"""Largest width of a letter in units of the plot; it is reached on phones, where the font is larger."""


@dataclass(frozen=True)
class Labels:
    """Texts of a plot for screen readers.

    Attributes:
        key: Prefix of the ids, unique on the page.
        title: Title of the plot.
        description: What the plot shows, in a sentence.
    """

    key: str
    title: str
    description: str


def bars(labels: Labels, names: Sequence[str], values: Sequence[float], label: str) -> str:
    """A bar chart.

    Args:
        labels: Texts for screen readers.
        names: One per bar; if there are many, some are left out below the axis.
        values: Heights of the bars.
        label: Label of the vertical axis.

    Returns:
        The SVG source.
    """
    scale = _Scale.of([0.0, *values])
    svg = _canvas(labels)
    _vertical(svg, scale, label)
    step = _inner_width() / max(len(names), 1)
    room = max(1, int(step * 0.95 / _CHARACTER))
    every = max(1, math.ceil(max(map(len, names), default=1) / room)) if room < 4 else 1
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        left, top = LEFT + index * step, _y(scale.place(value))
        box = {"x": left + step * 0.1, "y": top, "width": step * 0.8, "height": _y(0.0) - top}
        _add(svg, "rect", box, "part")
        if index % every == 0:
            for row, words in enumerate(textwrap.wrap(name, max(room, 4))[:3]):
                _text(svg, left + step / 2, HEIGHT - BOTTOM + _BELOW + row * 16, words, "middle")
    return _source(svg)


def line(
    labels: Labels,
    points: Sequence[tuple[float, float]],
    axes: tuple[str, str],
    marked: tuple[float, float] | None = None,
) -> str:
    """A line chart of (x, y) points with a ring around `marked`; `axes` are the labels of x and y."""
    every = [*points, *([marked] if marked else [])]
    across, up = _Scale.of([x for x, _ in every]), _Scale.of([y for _, y in every])
    svg = _canvas(labels)
    _vertical(svg, up, axes[1])
    _horizontal(svg, across, axes[0], _INSET)
    places = [(_x(across.place(x), _INSET), _y(up.place(y))) for x, y in sorted(points)]
    _add(svg, "polyline", {"points": " ".join(f"{x:.1f},{y:.1f}" for x, y in places)}, "curve")
    for x, y in places:
        _add(svg, "circle", {"cx": x, "cy": y, "r": 3.5}, "point")
    if marked:
        _add(
            svg, "circle", {"cx": _x(across.place(marked[0]), _INSET), "cy": _y(up.place(marked[1])), "r": 8}, "marked"
        )
    return _source(svg)


@dataclass(frozen=True)
class Dot:
    """A point that says what it is where the mouse rests on it, and leads somewhere when it is clicked.

    Attributes:
        x: Across.
        y: Up.
        text: What it says.
        link: An id on the page; empty: none.
        low: Lower end of an interval of `y`; None: there is none.
        high: Upper end.
    """

    x: float
    y: float
    text: str
    link: str = ""
    low: float | None = None
    high: float | None = None


def scatter(labels: Labels, dots: Sequence[Dot], axes: tuple[str, str]) -> str:
    """Points that stand by themselves, with their intervals; `axes` labels across and up."""
    across = _Scale.of([dot.x for dot in dots])
    up = _Scale.of([value for dot in dots for value in (dot.y, dot.low, dot.high) if value is not None])
    svg = _canvas(labels)
    _vertical(svg, up, axes[1])
    _horizontal(svg, across, axes[0], _INSET)
    for dot in dots:
        x, y = _x(across.place(dot.x), _INSET), _y(up.place(dot.y))
        place = ElementTree.SubElement(svg, "a", {"href": f"#{dot.link}"}) if dot.link else svg
        if dot.low is not None and dot.high is not None:
            ends = {"y1": _y(up.place(dot.low)), "y2": _y(up.place(dot.high))}
            _add(place, "line", {"x1": x, "x2": x, **ends}, "curve")
        circle = ElementTree.SubElement(
            place, "circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "5", "class": "point"}
        )
        ElementTree.SubElement(circle, "title").text = dot.text
    return _source(svg)


BINS = 25


def histogram(labels: Labels, values: Sequence[float], label: str) -> str:
    """A histogram with equal bins; the last bin includes all values beyond the 99.5th percentile."""
    ordered = sorted(values)
    across = _Scale.of([ordered[0], ordered[math.ceil(len(ordered) * 0.995) - 1]])
    width = (across.high - across.low) / BINS
    counts = [0] * BINS
    for value in ordered:
        counts[min(int((value - across.low) / width), BINS - 1)] += 1
    up = _Scale.of([0, *counts])
    svg = _canvas(labels)
    _vertical(svg, up, "calls")
    _horizontal(svg, across, label)
    step = _inner_width() / BINS
    for index, count in enumerate(counts):
        top = _y(up.place(count))
        box = {"x": LEFT + index * step, "y": top, "width": step * 0.95, "height": _y(0.0) - top}
        _add(svg, "rect", box, "part")
    return _source(svg)


@dataclass(frozen=True)
class _Scale:
    """Maps values to places in 0..1 on an axis between two round numbers."""

    low: float
    high: float
    step: float

    @classmethod
    def of(cls, values: Sequence[float]) -> _Scale:
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        step = _nice((high - low) / _TICKS or abs(high) / _TICKS or 1.0)
        first, last = math.floor(low / step), math.ceil(high / step)
        return cls(first * step, max(last, first + 1) * step, step)

    def place(self, value: float) -> float:
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def ticks(self) -> list[float]:
        count = round((self.high - self.low) / self.step)
        return [round(self.low / self.step + index) * self.step for index in range(count + 1)]


def _nice(step: float) -> float:
    """The smallest of 1, 2, 2.5 or 5 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * 0.999)


def _inner_width() -> float:
    return WIDTH - LEFT - RIGHT


def _x(place: float, inset: float = 0) -> float:
    return LEFT + inset + place * (_inner_width() - 2 * inset)


def _y(place: float) -> float:
    return TOP + (1 - place) * (HEIGHT - TOP - BOTTOM)


def _canvas(labels: Labels) -> ElementTree.Element:
    svg = ElementTree.Element(
        "svg",
        {
            "viewBox": f"0 0 {WIDTH} {HEIGHT}",
            "role": "img",
            "aria-labelledby": f"{labels.key}-title {labels.key}-description",
        },
    )
    ElementTree.SubElement(svg, "title", {"id": f"{labels.key}-title"}).text = labels.title
    ElementTree.SubElement(svg, "desc", {"id": f"{labels.key}-description"}).text = labels.description
    return svg


def _vertical(svg: ElementTree.Element, scale: _Scale, label: str) -> None:
    for tick in scale.ticks():
        y = _y(scale.place(tick))
        _add(svg, "line", {"x1": LEFT, "x2": WIDTH - RIGHT, "y1": y, "y2": y}, "grid")
        _text(svg, LEFT - 6, y + 4, f"{tick:.4g}", "end")
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    _text(svg, 16, middle, label, "middle").set("transform", f"rotate(-90 16 {middle:.1f})")


def _horizontal(svg: ElementTree.Element, scale: _Scale, label: str, inset: float = 0) -> None:
    for tick in scale.ticks():
        _text(svg, _x(scale.place(tick), inset), HEIGHT - BOTTOM + _BELOW, f"{tick:.4g}", "middle")
    _text(svg, LEFT + _inner_width() / 2, HEIGHT - 8, label, "middle")


def _add(svg: ElementTree.Element, tag: str, attributes: Mapping[str, float | str], style: str) -> None:
    plain = {key: value if isinstance(value, str) else f"{value:.1f}" for key, value in attributes.items()}
    ElementTree.SubElement(svg, tag, {**plain, "class": style})


def _text(svg: ElementTree.Element, x: float, y: float, text: str, anchor: str) -> ElementTree.Element:
    element = ElementTree.SubElement(svg, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor})
    element.text = text
    return element


def _source(svg: ElementTree.Element) -> str:
    return ElementTree.tostring(svg, encoding="unicode")
