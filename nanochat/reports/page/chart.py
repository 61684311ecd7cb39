"""Charts as inline SVG: lines with bands, points with a Pareto front, and intervals beside zero.

Each is a whole picture without its script. The script of the document adds values under the pointer and logarithmic
axes, from the numbers that the elements carry as `data-` attributes. An element's `data-arm` is the number by which
the legend hides it and the style colours it.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 26, 40
COLOURS = 8
"""after which they repeat with another dash"""
LONGEST = 62
"""characters of a name inside of a picture"""


@dataclass(frozen=True)
class Series:
    """One arm's line.

    Args:
        arm: its number in the legend.
        points: (x, y), finite, by ascending x.
        band: (x, low, high) around it.
        marks: whether each point is drawn as well.
    """

    name: str
    arm: int
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    marks: bool = False


@dataclass(frozen=True)
class Dot:
    """One arm's point; `half` is half the height of the interval around y."""

    name: str
    arm: int
    x: float
    y: float
    half: float = 0.0


@dataclass(frozen=True)
class Interval:
    """One arm's difference to another, with half the width of its interval (infinite where it is unknown)."""

    name: str
    arm: int
    mean: float
    half: float


@dataclass(frozen=True)
class _Axis:
    """A range of values on a range of pixels, linear, and logarithmic where all values are positive."""

    low: float
    high: float
    log_low: float | None
    start: float
    end: float

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def place_log(self, value: float) -> float:
        assert self.log_low is not None
        share = (math.log(value) - math.log(self.log_low)) / (math.log(self.high) - math.log(self.log_low))
        return self.start + share * (self.end - self.start)

    def data(self) -> str:
        """For the script: low, high, the low of the logarithmic axis (or null), and the pixels of both ends."""
        return json.dumps([self.low, self.high, self.log_low, self.start, self.end])


def lines(title: str, x_label: str, y_label: str, series: Sequence[Series], note: str = "") -> str:
    """A figure of lines, each with its band; empty where there is nothing to draw.

    Args:
        note: below the figure.
    """
    series = [one for one in series if one.points]
    if not series:
        return ""
    x = _axis([p[0] for one in series for p in one.points], LEFT, WIDTH - RIGHT)
    values = [p[1] for one in series for p in one.points] + [v for one in series for p in one.band for v in p[1:]]
    y = _axis(values, HEIGHT - BOTTOM, TOP)
    bands = [_band(one, x, y) for one in series if one.band]
    return _figure(title, x_label, y_label, x, y, [*bands, *(_line(one, x, y) for one in series)], note)


def scatter(title: str, x_label: str, y_label: str, dots: Sequence[Dot], note: str = "") -> str:
    """A figure of points whose Pareto front (less of both is better) is a line; empty without points."""
    if not dots:
        return ""
    x = _axis([dot.x for dot in dots], LEFT, WIDTH - RIGHT, margin=0.08)
    y = _axis([v for dot in dots for v in (dot.y - dot.half, dot.y + dot.half)], HEIGHT - BOTTOM, TOP, margin=0.08)
    front = [(dot.x, dot.y) for dot in pareto(dots)]
    steps = [p for a, b in pairwise(front) for p in (a, (b[0], a[1]))] + front[-1:]
    path = f'<path class="front" data-points="{_points(steps)}" d="{_path(steps, x, y)}"/>'
    return _figure(title, x_label, y_label, x, y, [path, *(_dot(dot, x, y) for dot in dots)], note)


def pareto(dots: Iterable[Dot]) -> list[Dot]:
    """The points to which no other is at least as good in both and better in one, by ascending x."""
    front: list[Dot] = []
    for dot in sorted(dots, key=lambda dot: (dot.x, dot.y)):
        if not front or dot.y < front[-1].y:
            front.append(dot)
    return front


def intervals(title: str, x_label: str, rows: Sequence[Interval]) -> str:
    """A figure of differences beside zero, one above the other, each with its interval; empty without rows."""
    if not rows:
        return ""
    known = [row.half for row in rows if math.isfinite(row.half)]
    ends = [row.mean + sign * (row.half if math.isfinite(row.half) else 0.0) for row in rows for sign in (-1, 1)]
    reach = 1.08 * max(map(abs, ends)) or 1.0
    step = 40
    height = TOP + step * len(rows) + BOTTOM - 10
    x = _Axis(-reach, reach, None, 14, WIDTH - 14)
    bottom = height - BOTTOM + 4
    parts = [_vertical(x, bottom, TOP - 14)]
    parts.append(f'<line class="zero" x1="{x.place(0):.1f}" x2="{x.place(0):.1f}" y1="{TOP - 14}" y2="{bottom}"/>')
    for i, row in enumerate(rows):
        y = TOP + step * i + 24
        half = row.half if math.isfinite(row.half) else 0.0
        said = f"{row.name}: {row.mean:+.4f}" + (f" ± {half:.4f}" if half else "")
        parts.append(
            f'<g data-arm="{row.arm}" class="{_style(row.arm)}"><title>{html.escape(said)}</title>'
            f'<text class="name" x="14" y="{y - 9}">{html.escape(shorten(row.name))}</text>'
            f'<line class="bar" x1="{x.place(row.mean - half):.1f}" x2="{x.place(row.mean + half):.1f}" '
            f'y1="{y}" y2="{y}"/><circle cx="{x.place(row.mean):.1f}" cy="{y}" r="4.5"/></g>'
        )
    parts.append(
        f'<text class="label" x="{WIDTH - 14}" y="{height - 4}" text-anchor="end">{html.escape(x_label)}</text>'
    )
    parts.append(f'<text class="label" x="14" y="{height - 4}">← better</text>')
    note = "" if len(known) == len(rows) else " A point without a bar has one pair only."
    return _wrap(title, "", height, parts, note, "chart intervals")


def shorten(name: str) -> str:
    """A name with its middle left out where it is too long for a picture."""
    half = (LONGEST - 1) // 2
    return name if len(name) <= LONGEST else f"{name[:half]}…{name[-half:]}"


def compact(value: float) -> str:
    """A number for a tick: 1500000 -> "1.5M"."""
    size = abs(value)
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{suffix}"
    return f"{value:.4g}"


# ---- axes -----------------------------------------------------------------------------------------------------------


def _axis(values: Sequence[float], start: float, end: float, margin: float = 0.04) -> _Axis:
    low, high = min(values), max(values)
    room = margin * (high - low) or 0.05 * abs(high) or 1.0
    positive = [value for value in values if value > 0]
    log_low = min(positive) if len(positive) == len(values) or (low >= 0 and positive) else None
    if log_low is not None and log_low >= high:
        log_low = None
    return _Axis(max(0.0, low - room) if low >= 0 else low - room, high + room, log_low, start, end)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in a range, at most `most` of them."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    while (high - low) / step > most - 1e-9:
        step *= 2 if round(step / 10 ** math.floor(math.log10(step) + 1e-9)) in (1, 5) else 2.5
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """1, 2 and 5 times powers of ten in a range, or fewer; round numbers where that leaves less than two."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(found) <= most:
            return found if len(found) > 1 else ticks(low, high, most)
    found = [10.0**p for p in powers if low <= 10.0**p <= high]
    return found[:: -(-len(found) // most)]


def _vertical(axis: _Axis, bottom: float, top: float) -> str:
    """Grid lines and numbers of an x axis."""

    def draw(values: Sequence[float], place: Callable[[float], float]) -> str:
        return "".join(
            f'<line x1="{place(v):.1f}" x2="{place(v):.1f}" y1="{top}" y2="{bottom}"/>'
            f'<text x="{place(v):.1f}" y="{bottom + 15}" text-anchor="middle">{compact(v)}</text>'
            for v in values
        )

    return _both("x", axis, draw)


def _horizontal(axis: _Axis) -> str:
    """Grid lines and numbers of a y axis."""

    def draw(values: Sequence[float], place: Callable[[float], float]) -> str:
        return "".join(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place(v):.1f}" y2="{place(v):.1f}"/>'
            f'<text x="{LEFT - 6}" y="{place(v) + 4:.1f}" text-anchor="end">{compact(v)}</text>'
            for v in values
        )

    return _both("y", axis, draw)


def _both(name: str, axis: _Axis, draw: Callable[[Sequence[float], Callable[[float], float]], str]) -> str:
    """The linear ticks, and the logarithmic ones, which the script shows instead."""
    text = f'<g class="tick {name} linear">{draw(ticks(axis.low, axis.high), axis.place)}</g>'
    if axis.log_low is not None:
        text += f'<g class="tick {name} log" display="none">'
        text += draw(log_ticks(axis.log_low, axis.high), axis.place_log) + "</g>"
    return text


# ---- elements -------------------------------------------------------------------------------------------------------


def _figure(title: str, x_label: str, y_label: str, x: _Axis, y: _Axis, parts: Sequence[str], note: str) -> str:
    frame = [
        _vertical(x, HEIGHT - BOTTOM, TOP),
        _horizontal(y),
        f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{html.escape(x_label)}</text>',
        f'<text class="label" x="4" y="14">{html.escape(y_label)}</text>',
    ]
    data = f' data-x="{x.data()}" data-y="{y.data()}"'
    return _wrap(title, data, HEIGHT, [*frame, *parts], note)


def _wrap(title: str, data: str, height: float, parts: Sequence[str], note: str, kind: str = "chart") -> str:
    caption = f"<p>{html.escape(note.strip())}</p>" if note.strip() else ""
    return (
        f'<figure class="{kind}"{data}><figcaption>{html.escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
        f"{caption}</figure>"
    )


def _style(arm: int) -> str:
    return f"c{arm % COLOURS} d{arm // COLOURS % 3}"


def _line(series: Series, x: _Axis, y: _Axis) -> str:
    name = html.escape(series.name)
    marks = ""
    if series.marks:
        marks = "".join(
            f'<circle r="2.6" data-at="{_number(a)},{_number(b)}" cx="{x.place(a):.1f}" cy="{y.place(b):.1f}"/>'
            for a, b in series.points
        )
    return (
        f'<g data-arm="{series.arm}" class="{_style(series.arm)}"><title>{name}</title><path class="line" '
        f'data-name="{name}" data-points="{_points(series.points)}" d="{_path(series.points, x, y)}"/>{marks}</g>'
    )


def _band(series: Series, x: _Axis, y: _Axis) -> str:
    outline = [(a, high) for a, _, high in series.band] + [(a, low) for a, low, _ in reversed(series.band)]
    return (
        f'<path class="band {_style(series.arm)}" data-arm="{series.arm}" data-points="{_points(outline)}" '
        f'd="{_path(outline, x, y)}Z"/>'
    )


def _dot(dot: Dot, x: _Axis, y: _Axis) -> str:
    name = html.escape(dot.name)
    said = f"{name}: {compact(dot.x)}, {dot.y:.4f}" + (f" ± {dot.half:.4f}" if dot.half else "")
    bar = ""
    if dot.half:
        ends = [(dot.x, dot.y - dot.half), (dot.x, dot.y + dot.half)]
        bar = f'<path class="bar" data-points="{_points(ends)}" d="{_path(ends, x, y)}"/>'
    return (
        f'<g data-arm="{dot.arm}" class="{_style(dot.arm)}"><title>{said}</title>{bar}<circle class="dot" r="5" '
        f'data-name="{name}" data-at="{_number(dot.x)},{_number(dot.y)}" cx="{x.place(dot.x):.1f}" '
        f'cy="{y.place(dot.y):.1f}"/></g>'
    )


def _number(value: float) -> str:
    return f"{value:.6g}"


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{_number(a)},{_number(b)}" for a, b in points)


def _path(points: Iterable[tuple[float, float]], x: _Axis, y: _Axis) -> str:
    return "M" + "L".join(f"{x.place(a):.1f} {y.place(b):.1f}" for a, b in points)
