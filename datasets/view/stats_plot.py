"""The picture of `mmctx data stats --plot`: one panel for each thing that was measured, one colour for each source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmctx.datasets.view.stats import SourceStats, bin_edges
from mmctx.errors import MmctxError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#2563c9", "#e8943a", "#2f9e7a", "#a066c9", "#d9577b", "#8f6b57", "#38a3b8", "#a89a2c")
_PANELS = (
    "picture width",
    "picture height",
    "clip seconds",
    "text tokens",
    "document text tokens",
    "document media",
    "sample tokens",
)
_INK, _SOFT, _RULE = "#1d2430", "#667085", "#e4e7ec"
_NUM_BINS = 32
_COLUMNS = 3
_STYLE: dict[Any, Any] = {  # of matplotlib's rc parameters
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _SOFT,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "text.color": _INK,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "ytick.left": False,
    "svg.fonttype": "none",
}


def plot_stats(path: Path, sources: Sequence[SourceStats], forecast: Mapping[str, Any] | None = None) -> None:
    """Draws the distributions of all sources into a `.png`, `.svg` or `.pdf`.

    Args:
        path: of the picture.
        sources: at least one.
        forecast: what `mmctx.datasets.planning.forecast.forecast` gives, to draw how full bins will be.

    Raises:
        MmctxError: matplotlib is not installed, or does not know the extension.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure  # not pyplot: nothing global, no display
    except ImportError:
        raise MmctxError("--plot needs matplotlib: pip install 'mmctx[plot]'") from None
    panels = [name for name in _PANELS if any(_matching(source, name) for source in sources)]
    count = 1 + len(panels) + (forecast is not None)
    rows = -(-count // _COLUMNS)
    with rc_context(_STYLE):
        figure = Figure(figsize=(4 * _COLUMNS, 2.9 * rows + 0.7), layout="constrained", dpi=150)
        axes = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr]
        _draw_modalities(axes[0], sources)
        for axis, name in zip(axes[1:], panels, strict=False):
            _draw_distribution(axis, name, sources)
        if forecast is not None:
            _draw_fill(axes[count - 1], forecast)
        for axis in axes[count:]:
            axis.set_visible(False)
        handles = [_swatch(number) for number in range(len(sources))]
        figure.legend(
            handles, [_caption(s) for s in sources], loc="outside upper left", ncols=len(sources), frameon=False
        )
        try:
            figure.savefig(path, facecolor="white")
        except ValueError as error:
            raise MmctxError(f"--plot {path}: {error}") from None


def _matching(source: SourceStats, panel: str) -> list[str]:
    return [name for name in source.distributions if name == panel or name.startswith(f"{panel}, ")]


def _caption(source: SourceStats) -> str:
    return f"{source.name}: {source.num_samples:,} samples, {source.num_bytes / 1e6:,.0f} MB"


def _swatch(number: int) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=_COLOURS[number % len(_COLOURS)])


def _draw_modalities(axis: Axes, sources: Sequence[SourceStats]) -> None:
    """Horizontal bars: usable samples of each source by what they are made of."""
    rows = [(n, kind, count) for n, source in enumerate(sources) for kind, count in source.modalities.items()]
    rows += [(n, reason, -count) for n, source in enumerate(sources) for reason, count in source.problems.items()]
    for place, (number, _, count) in enumerate(rows):
        broken = count < 0
        colour = _COLOURS[number % len(_COLOURS)]
        axis.barh(
            place, abs(count), color="white" if broken else colour, edgecolor=colour, hatch="///" if broken else None
        )
        axis.annotate(
            f"{abs(count):,}", (abs(count), place), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.set_yticks(range(len(rows)), [label for _, label, _ in rows])
    axis.invert_yaxis()
    axis.margins(x=0.18)
    axis.grid(visible=False)
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    axis.set_title("samples" + (" (hatched: unusable)" if any(count < 0 for *_, count in rows) else ""))


def _draw_distribution(axis: Axes, panel: str, sources: Sequence[SourceStats]) -> None:
    """Outlined histograms as shares of each source; several texts of one source differ in their line."""
    import numpy as np
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    found = [
        (n, source.distributions[name], name) for n, source in enumerate(sources) for name in _matching(source, panel)
    ]
    unit, scale = found[0][1].unit, found[0][1].scale
    least, most = min(d.bounds[0] for _, d, _ in found), max(d.bounds[1] for _, d, _ in found)
    edges = bin_edges(least, most, _NUM_BINS)
    if most > 30 * max(least, 1):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(lambda *_: "")
    else:
        edges = edges - 0.5  # a whole number stands in the middle of its bar
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=scale == 1))
        if most == least:
            axis.set_xlim((least - 5) * scale, (least + 5) * scale)
    lines: tuple[Any, ...] = ("-", "--", ":", "-.")
    texts: dict[str, Any] = {}
    for number, distribution, name in found:
        counts = np.histogram(distribution.values, edges, weights=distribution.counts)[0]
        colour = _COLOURS[number % len(_COLOURS)]
        line = lines[_matching(sources[number], panel).index(name) % len(lines)]
        texts[name.partition(", ")[2]] = line
        shares = counts / max(counts.sum(), 1)
        axis.stairs(shares, edges * scale, color=colour, linestyle=line, linewidth=1.3)
        axis.stairs(shares, edges * scale, color=colour, fill=True, alpha=0.14)
        median = distribution.quantile(0.5)
        axis.axvline(median, color=colour, linewidth=0.8, alpha=0.6, linestyle=line)
    if len(texts) > 1:
        keys = [Line2D([], [], color=_SOFT, linestyle=line) for line in texts.values()]
        axis.legend(keys, list(texts), frameon=False, fontsize=8, handlelength=1.8)
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axis.set_title(panel.removesuffix(" seconds") + (" length" if panel.endswith("seconds") else ""))
    axis.set_xlabel(f"{unit} (line: median)")


def _draw_fill(axis: Axes, forecast: Mapping[str, Any]) -> None:
    """Bars from 0 to the bin: mean and fullest."""
    found = forecast["tokens_per_bin"]
    size = found["limit"]
    for place, tokens in enumerate((found["mean"], found["max"])):
        axis.barh(place, tokens / size, color="#98a2b3" if place else _COLOURS[2], height=0.55)
        axis.annotate(
            f"{tokens / size:.1%}", (tokens / size, place), (-6, 0), textcoords="offset points", va="center", ha="right",
            color="white", fontweight="bold",
        )  # fmt: skip
    axis.axvline(1, color=_INK, linewidth=1, linestyle="--")
    axis.set_yticks([0, 1], ["mean bin", "fullest bin"])
    axis.set_ylim(1.8, -0.8)
    axis.grid(visible=False)
    axis.set_xticks([0, 0.5, 1], ["0", f"{size // 2:,}", f"{size:,}"])
    axis.set_xlabel(
        f"tokens; {forecast['samples_per_step']:,.0f} samples a step, {forecast['window']['steps']:,} steps packed together"
    )
    axis.set_title("packing")
