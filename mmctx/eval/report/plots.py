"""Plots of the report, drawn by hand so that they take the page's colours in light and dark and need no library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

_WIDTH, _HEIGHT = 280, 165
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 6, 8, 22
_MAX_POINTS = 400


def line_chart(
    label: str,
    steps: Sequence[float],
    values: Sequence[float],
    reference: float | None = None,
    *,
    smooth: bool = True,
) -> str:
    """Values over steps as SVG, with `reference` as a dashed line.

    Values that are not finite are left out, long series are averaged down to 400 points, and `smooth` draws the values
    faintly and their moving average strongly. The page's style sheet colours the classes.
    """
    x, y = np.asarray(steps, float), np.asarray(values, float)
    x, y = _thin(x[np.isfinite(y)]), _thin(y[np.isfinite(y)])
    if not len(y):
        return ""
    seen = [*y.tolist(), reference] if reference is not None and math.isfinite(reference) else y.tolist()
    low, high = _limits(min(seen), max(seen))
    x0, x1 = (float(x[0]), float(x[-1])) if x[-1] > x[0] else (float(x[0]) - 1, float(x[0]) + 1)

    def at_x(value):
        return _LEFT + (value - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)

    def at_y(value):
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in nice_ticks(low, high, 4):
        top = at_y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{top + 3.5:.1f}" text-anchor="end">{short_number(tick)}</text>')
    for tick in nice_ticks(x0, x1, 4):
        # a label centred on the last tick would stick out of the picture
        anchor = "end" if at_x(tick) > _WIDTH - 20 else "middle"
        parts.append(f'<text x="{at_x(tick):.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{short_number(tick)}</text>')
    window = len(y) // 20 if smooth else 0
    if window > 1:
        parts.append(f'<polyline class="raw" points="{_points(at_x(x), at_y(y))}"/>')
        y = moving_average(y, window)
    parts.append(f'<polyline class="line" points="{_points(at_x(x), at_y(y))}"/>')
    if reference is not None and math.isfinite(reference):
        top = at_y(reference)
        parts.append(f'<line class="reference" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{top:.1f}" y2="{top:.1f}"/>')
    title = f"{label}, steps {short_number(x0)} to {short_number(x1)}"
    opening = f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
    return opening + "".join(parts) + "</svg>"


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between `low` and `high`."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def short_number(value: float) -> str:
    """A number of about three digits: 1.5e-3, 0.25, 480, 12k, 3.4M."""
    if value == 0:
        return "0"
    size = abs(value)
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if size >= 10**power:
            return f"{value / 10**power:.3g}{unit}"
    if size >= 0.01:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` values around each one, over fewer at both ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _thin(values: np.ndarray) -> np.ndarray:
    if len(values) <= _MAX_POINTS:
        return values
    return np.array([part.mean() for part in np.array_split(values, _MAX_POINTS)])


def _limits(low: float, high: float) -> tuple[float, float]:
    """The range of the y axis: from zero, unless the values are all far from it."""
    if 0 <= low < 0.6 * high:
        low = 0.0
    if high == low:
        return (low - 1, high + 1) if low == 0 else (low - abs(low) * 0.1, high + abs(high) * 0.1)
    room = (high - low) * 0.05
    return (low if low == 0 else low - room), high + room


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
