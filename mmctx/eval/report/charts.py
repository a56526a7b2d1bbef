"""Charts of the page, drawn by hand so that they take the page's colours in light and dark and need no library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from mmctx.datasets.view.render import readable
from mmctx.eval.report.pieces import Lines, Series, Values

NUM_COLORS = 8
"""Classes `s0` to `s7` of the style sheet; a ninth series has the colour of the first."""
_SIZE, _WIDE = (280, 165), (420, 240)
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 8, 8, 22
_MAX_POINTS = 400


def draw_lines(chart: Lines) -> str:
    """A chart as SVG; nothing where no value is finite. The style sheet colours the classes.

    Values that are not finite are left out. Of long series, 400 means are drawn, and as a band the range that each stands for.
    """
    series = {number: found for number, one in enumerate(chart.series) if len((found := _Thinned(one)).y)}
    if not series:
        return ""
    axes = _Axes(chart, list(series.values()))
    parts = [*axes.grid(chart), *(part for number, one in series.items() for part in _draw_series(number, one, axes))]
    if chart.reference is not None and math.isfinite(chart.reference):
        y = axes.y(chart.reference)
        parts.append(f'<line class="reference" x1="{_LEFT}" x2="{axes.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
    title = f"{chart.label}, {chart.x_label or 'steps'} {short_number(axes.x0)} to {short_number(axes.x1)}"
    opening = f'<svg class="chart" viewBox="0 0 {axes.width} {axes.height}" role="img" aria-label="{_label(title)}">'
    return opening + "".join(parts) + "</svg>"


class _Thinned:
    """A series' finite values as arrays, averaged down to `_MAX_POINTS`; `low` and `high` may hold NaN, where there is no band."""

    def __init__(self, series: Series) -> None:
        self.series = series
        x, y = _floats(series.x), _floats(series.y)
        keep = np.isfinite(y) & np.isfinite(x)
        low, high = (
            _floats(bound)[keep] if len(bound) else np.full(keep.sum(), np.nan) for bound in (series.low, series.high)
        )
        self.x, self.y, self.low, self.high = x[keep], y[keep], low, high
        if len(self.y) > _MAX_POINTS:
            parts = np.array_split(self.y, _MAX_POINTS)
            self.low, self.high = (np.array([take(part) for part in parts]) for take in (np.min, np.max))
            self.x, self.y = (
                np.array([part.mean() for part in np.array_split(v, _MAX_POINTS)]) for v in (self.x, self.y)
            )

    def extremes(self) -> np.ndarray:
        """What must fit on the y axis. Ranges of thinned values count up to their 98th percentile: spikes must not flatten the rest."""
        if len(self.series.y) > _MAX_POINTS:
            return np.concatenate([self.y, np.percentile(self.low, [2, 98]), np.percentile(self.high, [2, 98])])
        return np.concatenate([self.y, self.low[np.isfinite(self.low)], self.high[np.isfinite(self.high)]])


class _Axes:
    """From values to places in the picture."""

    def __init__(self, chart: Lines, series: Sequence[_Thinned]) -> None:
        self.width, self.height = _WIDE if chart.wide else _SIZE
        self.right, self.bottom = self.width - _RIGHT, self.height - _BOTTOM - (12 if chart.x_label else 0)
        self.scale: Callable[[float], float] = math.log2 if chart.log_x else float
        self.x0, self.x1 = (pick(float(pick(s.x)) for s in series) for pick in (min, max))
        if chart.share:
            self.y0, self.y1 = 0.0, 1.0
        else:
            seen = np.concatenate([s.extremes() for s in series])
            reference = [chart.reference] if chart.reference is not None and math.isfinite(chart.reference) else []
            self.y0, self.y1 = _limits(min([*reference, float(seen.min())]), max([*reference, float(seen.max())]))

    def x(self, value: float) -> float:
        start, end = self.scale(self.x0), self.scale(self.x1)
        place = (self.scale(value) - start) / (end - start) if end > start else 0.5
        return _LEFT + place * (self.right - _LEFT)

    def y(self, value: float) -> float:
        place = (value - self.y0) / (self.y1 - self.y0)
        return self.bottom - min(max(place, 0.0), 1.0) * (self.bottom - _TOP)

    def points(self, x: np.ndarray, y: np.ndarray) -> str:
        return " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))

    def grid(self, chart: Lines) -> list[str]:
        """Lines and numbers of both axes."""
        parts = []
        for tick in nice_ticks(self.y0, self.y1, 4):
            top, text = self.y(tick), f"{tick:.0%}" if chart.share else short_number(tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{self.right}" y1="{top:.1f}" y2="{top:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{top + 3.5:.1f}" text-anchor="end">{text}</text>')
        for tick in self._x_ticks(chart):
            x = self.x(tick)
            # a label centred on the last tick would stick out of the picture
            anchor = "end" if x > self.width - 20 else "middle"
            x = min(x, self.right) if anchor == "end" else x
            parts.append(f'<text x="{x:.1f}" y="{self.bottom + 15}" text-anchor="{anchor}">{short_number(tick)}</text>')
        if chart.x_label:
            middle = (_LEFT + self.right) / 2
            parts.append(
                f'<text x="{middle:.0f}" y="{self.height - 4}" text-anchor="middle">{_label(chart.x_label)}</text>'
            )
        return parts

    def _x_ticks(self, chart: Lines) -> list[float]:
        if chart.log_x:
            powers = [2.0**n for n in range(math.floor(math.log2(self.x0)), math.ceil(math.log2(self.x1)) + 1)]
            inside = [power for power in powers if self.x0 <= power <= self.x1] or [self.x0]
            return inside[:: -(-len(inside) // 8)]
        if self.x1 <= self.x0:
            return [self.x0]
        return nice_ticks(self.x0, self.x1, 4)


def _draw_series(number: int, one: _Thinned, axes: _Axes) -> list[str]:
    parts, series, y = [f'<g class="s{number % NUM_COLORS}">'], one.series, one.y
    if series.label:
        parts.append(f"<title>{_label(series.label)}</title>")
    for start, stop in _stretches(np.isfinite(one.low) & np.isfinite(one.high)):
        x, low, high = one.x[start:stop], one.low[start:stop], one.high[start:stop]
        if stop - start > 1:
            parts.append(f'<polygon class="band" points="{axes.points(x, high)} {axes.points(x[::-1], low[::-1])}"/>')
        elif stop - start == 1:
            at = f'x1="{axes.x(x[0]):.1f}" x2="{axes.x(x[0]):.1f}"'
            parts.append(f'<line class="whisker" {at} y1="{axes.y(low[0]):.1f}" y2="{axes.y(high[0]):.1f}"/>')
    window = len(y) // 20 if series.smooth else 0
    if window > 1:
        parts.append(f'<polyline class="raw" points="{axes.points(one.x, y)}"/>')
        y = moving_average(y, window)
    parts.append(f'<polyline class="line" points="{axes.points(one.x, y)}"/>')
    if series.dots or len(y) == 1:
        for a, b in zip(one.x.tolist(), y.tolist(), strict=True):
            about = ": ".join(part for part in (series.label, f"{short_number(b)} at {short_number(a)}") if part)
            parts.append(
                f'<circle cx="{axes.x(a):.1f}" cy="{axes.y(b):.1f}" r="2.6"><title>{_label(about)}</title></circle>'
            )
    return [*parts, "</g>"]


def _stretches(inside: np.ndarray) -> list[tuple[int, int]]:
    """[start, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]]).astype(np.int8))).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


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
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if size >= 0.9995 * 10**power:
            return f"{value / 10**power:.3g}{unit}"
    if size >= 0.01:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` values around each one, over fewer at both ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _floats(values: Values) -> np.ndarray:
    if isinstance(values, np.ndarray):
        return values.astype(float)
    return np.array([math.nan if value is None else value for value in values], float)


def _limits(low: float, high: float) -> tuple[float, float]:
    """The range of the y axis: from zero, unless the values are all far from it."""
    if 0 <= low < 0.6 * high:
        low = 0.0
    if high == low:
        return (low - 1, high + 1) if low == 0 else (low - abs(low) * 0.1, high + abs(high) * 0.1)
    room = (high - low) * 0.05
    return (low if low == 0 else low - room), high + room


def _label(text: str) -> str:
    return escape(readable(text))
