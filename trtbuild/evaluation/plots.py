"""Plots of the page as inline SVG: a few marks on two axes, whose colours and type are the page's (`page.html.jinja`).

Names are escaped here; the page takes a plot as it is.

No plotting library: their SVG has its colours in it, which neither a dark screen nor paper can change, and is 20 times
as large.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 260
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 26, 34  # margins
LETTER = 5.6  # about the width of one
Scale = Callable[[float], float]


@dataclass(frozen=True)
class Point:
    """A named mark, with an interval of `y` where that is known; `kind` is its class in the page."""

    name: str
    x: float
    y: float
    low: float | None
    high: float | None
    kind: str
    title: str


def linear_ticks(low: float, high: float) -> list[float]:
    """About five round numbers within."""
    raw = (high - low or abs(high) or 1) / 5
    size = 10 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= raw)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def wide_ticks(low: float, high: float) -> list[float]:
    """Zero, and 1 and 3 times powers of ten on both sides of it, from 0.1 on."""
    sizes = [factor * 10.0**power for power in range(-1, 7) for factor in (1, 3)]
    return [value for value in (*(-size for size in reversed(sizes)), 0.0, *sizes) if low <= value <= high]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within, or round numbers where these are too few."""
    powers = [10.0**i for i in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    powers = powers[:: 1 + len(powers) // 7]
    return powers if len(powers) > 1 else [tick for tick in linear_ticks(low, high) if tick > 0]


def wide(value: float) -> float:
    """A scale for per cents that are mostly small and sometimes huge: linear around 0, then logarithmic."""
    return math.asinh(2 * value)


def scatter(points: Sequence[Point], front: Sequence[str], x_label: str, y_label: str) -> str:
    """Points by two numbers of which less is better, `y` on the scale `wide`.

    Those of `front` are joined that are also on the front of these two: of the others the third number is good.
    """
    left, right = _padded([point.x for point in points])
    ends = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    low, high = min([0, *ends]), max([1, *ends])
    x = _scale(left, right, LEFT, WIDTH - RIGHT)
    pad = (wide(high) - wide(low)) * 0.06
    y_of = _scale(wide(low) - pad, wide(high) + pad, HEIGHT - BOTTOM, TOP)
    y: Scale = lambda value: y_of(wide(value))
    parts = _axes(x, linear_ticks(left, right), y, _apart(wide_ticks(low, high), y), x_label, y_label)
    parts.append(f'<path class="zero" d="M{LEFT} {y(0):.1f}H{WIDTH - RIGHT}"/>')
    ahead: list[Point] = []
    for point in sorted((point for point in points if point.name in front), key=lambda point: (point.x, point.y)):
        if not ahead or point.y < ahead[-1].y:
            ahead.append(point)
    if ahead:
        path = "L".join(f"{x(point.x):.1f} {y(point.y):.1f}" for point in ahead)
        parts.append(f'<path class="front" d="M{path}"/>')
    taken = [(x(p.x) - 5, y(p.y) - 5, x(p.x) + 5, y(p.y) + 5) for p in points]
    for point in sorted(points, key=lambda point: (point.kind != "recommended", point.name not in front)):
        px, py = x(point.x), y(point.y)
        mark = f'<g class="point {point.kind}"><title>{escape(point.title)}</title>'
        if point.low is not None and point.high is not None:
            mark += f'<path d="M{px:.1f} {y(point.low):.1f}V{y(point.high):.1f}"/>'
        if point.kind == "above":
            mark += f'<path class="cross" d="M{px - 4:.1f} {py - 4:.1f}l8 8m0 -8l-8 8"/>'
        else:
            mark += f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4"/>'
        if point.kind == "recommended":
            mark += f'<circle class="ring" cx="{px:.1f}" cy="{py:.1f}" r="7"/>'
        parts.append(mark + _label(point.name, px, py, taken, point.kind == "recommended") + "</g>")
    return _svg(parts, f"{y_label} by {x_label}")


def lines(series: Mapping[str, Sequence[float | None]], y_label: str, log: bool = False) -> str:
    """Numbers by layer, a line each with its name at its end; None, and on a logarithmic scale 0, is a gap."""
    values = [value for numbers in series.values() for value in numbers if value is not None and (value > 0 or not log)]
    if not values:
        return ""
    count = max(map(len, series.values()))
    right = RIGHT + LETTER * max(map(len, series))
    x = _scale(0, max(count - 1, 1), LEFT, WIDTH - right - 8)
    scale: Scale = math.log10 if log else lambda value: value
    low, high = (min(values), max(values)) if log else (0.0, max(*values, 0.0) or 1.0)
    y_of = _scale(scale(low), scale(high), HEIGHT - BOTTOM, TOP)
    y: Scale = lambda value: y_of(scale(value))
    ticks = log_ticks(low, high) if log else linear_ticks(low, high)
    parts = _axes(x, [tick for tick in linear_ticks(0, count - 1) if tick % 1 == 0], y, ticks, "layer", y_label)
    ends = []
    for number, (name, numbers) in enumerate(series.items()):
        known = [(i, v) for i, v in enumerate(numbers) if v is not None and (v > 0 or not log)]
        if not known:
            continue
        steps = [
            f"{'L' if n and known[n - 1][0] == i - 1 else 'M'}{x(i):.1f} {y(v):.1f}" for n, (i, v) in enumerate(known)
        ]
        worst = max(known, key=lambda pair: pair[1])
        parts.append(
            f'<g class="line s{number}"><title>{escape(name)}: {worst[1]:.4g} in layer {worst[0]}</title>'
            f'<path d="{"".join(steps)}"/><circle cx="{x(worst[0]):.1f}" cy="{y(worst[1]):.1f}" r="2.6"/></g>'
        )
        ends.append((y(known[-1][1]), number, name))
    for (_, number, name), at in zip(sorted(ends), _spread([end for end, *_ in sorted(ends)]), strict=True):
        parts.append(f'<text class="name s{number}" x="{WIDTH - right:.0f}" y="{at + 4:.1f}">{escape(name)}</text>')
    return _svg(parts, f"{y_label} by layer")


def diagonal(points: Iterable[Point], x_label: str, y_label: str) -> str:
    """Measured by predicted numbers, both logarithmic; on the line they are equal."""
    points = list(points)
    values = [value for point in points for value in (point.x, point.y)]
    low, high = min(values) / 1.3, max(values) * 1.3
    x = lambda value: _scale(math.log10(low), math.log10(high), LEFT, WIDTH - RIGHT)(math.log10(value))
    y = lambda value: _scale(math.log10(low), math.log10(high), HEIGHT - BOTTOM, TOP)(math.log10(value))
    ticks = log_ticks(low, high)
    parts = _axes(x, ticks, y, ticks, x_label, y_label)
    parts.append(f'<path class="front" d="M{x(low):.1f} {y(low):.1f}L{x(high):.1f} {y(high):.1f}"/>')
    taken: list[tuple[float, float, float, float]] = [(x(p.x) - 5, y(p.y) - 5, x(p.x) + 5, y(p.y) + 5) for p in points]
    for point in points:
        px, py = x(point.x), y(point.y)
        parts.append(
            f'<g class="point {point.kind}"><title>{escape(point.title)}</title>'
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4"/>{_label(point.name, px, py, taken)}</g>'
        )
    return _svg(parts, f"{y_label} by {x_label}")


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    width = high - low or 1
    return lambda value: start + (value - low) / width * (end - start)


def _padded(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * 0.08 or high * 0.1 or 1
    return max(0, low - pad), high + pad


def _apart(ticks: list[float], y: Scale) -> list[float]:
    """Those that have room for their numbers; 0 is one of them."""
    kept: list[float] = []
    for tick in sorted(ticks, key=abs):
        if all(abs(y(tick) - y(other)) >= 14 for other in kept):
            kept.append(tick)
    return kept


def _spread(positions: list[float]) -> list[float]:
    """Sorted positions of lines of text, moved so that none lies on another, nor below the plot."""
    placed: list[float] = []
    for position in positions:
        placed.append(max(position, placed[-1] + 12) if placed else position)
    bottom: float = HEIGHT - BOTTOM
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], bottom)
        bottom = placed[i] - 12
    return placed


def _label(name: str, x: float, y: float, taken: list[tuple[float, float, float, float]], ring: bool = False) -> str:
    """The name beside its point where there is room for it, else none; what it takes is added to `taken`.

    `ring`: there is one around the point, and the name is bold.
    """
    width, gap = LETTER * len(name) * (1.2 if ring else 1), 12 if ring else 9
    places = [(x + gap, y + 4), (x - gap - width, y + 4)]
    places += [(x - width / 2 + side, y + up) for up in (-10, 18) for side in (0, width / 2, -width / 2)]
    for left, base in places:
        box = left, base - 9, left + width, base + 2
        inside = left >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
        if inside and not any(
            box[0] < right and one < box[2] and box[1] < bottom and top < box[3] for one, top, right, bottom in taken
        ):
            taken.append(box)
            return f'<text x="{left:.1f}" y="{base:.1f}">{escape(name)}</text>'
    return ""


def _axes(x: Scale, x_ticks: list[float], y: Scale, y_ticks: list[float], x_label: str, y_label: str) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = [f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>' for tick in y_ticks]
    parts += [f'<text class="y" x="{LEFT - 6}" y="{y(tick) + 4:.1f}">{tick:g}</text>' for tick in y_ticks]
    parts += [f'<text class="x" x="{x(tick):.1f}" y="{bottom + 14}">{tick:g}</text>' for tick in x_ticks]
    parts.append(f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 5}">{escape(x_label)}</text>')
    parts.append(f'<text class="axis y-axis" x="0" y="10">{escape(y_label)}</text>')
    return parts


def _svg(parts: Iterable[str], title: str) -> str:
    start = f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    return f"{start}{''.join(parts)}</svg>"
