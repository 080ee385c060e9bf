"""Plots as inline SVG: no library, nothing loaded, every text escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 460, 220, 48, 34, 12  # pixels
CHOSEN, REJECTED = "#2166ac", "#d6604d"
FLOOR = HEIGHT - BOTTOM


def histogram(chosen: Sequence[float], rejected: Sequence[float], bins: int = 30) -> str:
    """Rewards of chosen and rejected responses over common bins; share of each kind upwards."""
    low, high = _range([*chosen, *rejected])
    shares = []
    for values in (chosen, rejected):
        heights = [0.0] * bins
        for value in values:
            heights[min(int((value - low) / (high - low) * bins), bins - 1)] += 1 / len(values)
        shares.append(heights)
    top = max(max(heights) for heights in shares)
    width = (WIDTH - LEFT) / bins
    bars = []
    for heights, colour in zip(shares, (CHOSEN, REJECTED), strict=True):
        for index, share in enumerate(heights):
            if share:
                bars.append(_bar(LEFT + index * width, width, share / top, colour, 0.55))
    legend = "".join(
        f'<rect x="{LEFT + 8 + offset}" y="{TOP}" width="10" height="10" fill="{colour}" fill-opacity="0.55"/>'
        f'<text x="{LEFT + 22 + offset}" y="{TOP + 9}">{label}</text>'
        for offset, colour, label in ((0, CHOSEN, "chosen"), (70, REJECTED, "rejected"))
    )
    return _plot(
        "Histogram of chosen and rejected rewards", "".join(bars) + legend, (low, high), (0, top), "reward", "share"
    )


def scatter(points: Sequence[tuple[float, float]], x_label: str, y_label: str) -> str:
    """Points."""
    x_range, y_range = _range([x for x, _ in points]), _range([y for _, y in points])
    dots = "".join(_dot(x, y, x_range, y_range, 2.5, 0.5) for x, y in points)
    return _plot(f"{y_label} against {x_label}", dots, x_range, y_range, x_label, y_label)


def calibration_curve(points: Sequence[tuple[float, float, int]]) -> str:
    """Share right against claimed probability, (claimed, share, pairs) each; a calibrated model lies on the line."""
    x_range, y_range = (0.5, 1.0), (0.0, 1.0)
    y = [_height(value, y_range) for value in (0.5, 1.0)]
    line = f'<path d="M{LEFT} {y[0]:.1f}L{WIDTH} {y[1]:.1f}" stroke="#888" stroke-dasharray="4 3"/>'
    path = "".join(
        f"{'L' if index else 'M'}{_place(claim, x_range):.1f} {_height(share, y_range):.1f}"
        for index, (claim, share, _) in enumerate(points)
    )
    curve = f'<path d="{path}" fill="none" stroke="{CHOSEN}"/>'
    dots = "".join(_dot(claim, share, x_range, y_range, 3, 1, f"{count} pairs") for claim, share, count in points)
    return _plot("Calibration", line + curve + dots, x_range, y_range, "claimed probability", "share right")


def bar_chart(bars: Sequence[tuple[str, float | None, int]], x_label: str, y_label: str) -> str:
    """Shares from 0 to 1, (label, share, count) each, with a line at one half; no bar where there is nothing."""
    width = (WIDTH - LEFT) / len(bars)
    marks = []
    for index, (label, share, count) in enumerate(bars):
        middle = LEFT + (index + 0.5) * width
        if share is not None:
            marks.append(_bar(LEFT + (index + 0.15) * width, 0.7 * width, share, CHOSEN, 0.55))
            top = min(_height(share, (0, 1)) - 3, FLOOR - 17)  # above the count of a low bar
            marks.append(f'<text x="{middle:.1f}" y="{top:.1f}" text-anchor="middle">{share:.2f}</text>')
        for y, text in ((FLOOR - 5, f"n = {count}"), (FLOOR + 12, label)):
            marks.append(f'<text x="{middle:.1f}" y="{y}" text-anchor="middle">{escape(text)}</text>')
    half = _height(0.5, (0, 1))
    marks.append(f'<path d="M{LEFT} {half:.1f}H{WIDTH}" stroke="#888" stroke-dasharray="4 3"/>')
    return _plot(f"{y_label} by {x_label}", "".join(marks), None, (0, 1), x_label, y_label)


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """Up to three lines through their points, each labelled with its name; x on a logarithmic scale."""
    points = [point for line in lines.values() for point in line]
    x_range, y_range = _range([math.log(x) for x, _ in points]), _range([y for _, y in points])
    marks = []
    for (name, line), colour in zip(lines.items(), ("#888", CHOSEN, REJECTED), strict=False):
        places = [(_place(math.log(x), x_range), _height(y, y_range)) for x, y in line]
        path = "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(places))
        marks.append(f'<path d="{path}" fill="none" stroke="{colour}"/>')
        for (x, y), (at, value) in zip(places, line, strict=True):
            tip = f"<title>{escape(name)}: {value:.4g} at {at:g}</title>"
            marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}">{tip}</circle>')
        x, y = places[len(places) // 2]
        marks.append(f'<text x="{x:.1f}" y="{y - 6:.1f}" text-anchor="middle" fill="{colour}">{escape(name)}</text>')
    for x in sorted({x for x, _ in points}):
        place = _place(math.log(x), x_range)
        marks.append(f'<text x="{place:.1f}" y="{FLOOR + 14}" text-anchor="middle">{x:g}</text>')
    return _plot(f"{y_label} against {x_label}", "".join(marks), None, y_range, x_label, y_label)


def _plot(
    title: str,
    marks: str,
    x_range: tuple[float, float] | None,
    y_range: tuple[float, float],
    x_label: str,
    y_label: str,
) -> str:
    low, high = x_range or ("", "")
    labels = [
        (LEFT, FLOOR + 14, "start", f"{low:.3g}" if x_range else ""),
        (WIDTH, FLOOR + 14, "end", f"{high:.3g}" if x_range else ""),
        ((LEFT + WIDTH) / 2, FLOOR + 28, "middle", x_label),
        (LEFT - 4, FLOOR, "end", f"{y_range[0]:.3g}"),
        (LEFT - 4, TOP + 8, "end", f"{y_range[1]:.3g}"),
    ]
    texts = "".join(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(t)}</text>' for x, y, anchor, t in labels)
    middle = (TOP + FLOOR) / 2
    upright = (
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_label)}</text>'
    )
    axes = f'<path d="M{LEFT} {TOP}V{FLOOR}H{WIDTH}" fill="none" stroke="#888"/>'
    return (
        f'<svg viewBox="0 0 {WIDTH + 8} {HEIGHT}" width="{WIDTH + 8}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">'
        f"{marks}{axes}{texts}{upright}</svg>"
    )


def _bar(x: float, width: float, share: float, colour: str, opacity: float) -> str:
    height = share * (FLOOR - TOP)
    return (
        f'<rect x="{x:.1f}" y="{FLOOR - height:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}" '
        f'fill-opacity="{opacity}"/>'
    )


def _dot(
    x: float,
    y: float,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    radius: float,
    opacity: float,
    title: str = "",
) -> str:
    place = f'cx="{_place(x, x_range):.1f}" cy="{_height(y, y_range):.1f}" r="{radius}"'
    tip = f"<title>{escape(title)}</title>" if title else ""
    return f'<circle {place} fill="{CHOSEN}" fill-opacity="{opacity}">{tip}</circle>'


def _place(x: float, x_range: tuple[float, float]) -> float:
    return LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT)


def _height(y: float, y_range: tuple[float, float]) -> float:
    return TOP + (y_range[1] - y) / (y_range[1] - y_range[0]) * (FLOOR - TOP)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest value; a single value gets room on both sides."""
    low, high = min(values), max(values)
    if low == high:
        room = max(abs(low), 1.0) * 0.5
        return low - room, high + room
    return low, high
