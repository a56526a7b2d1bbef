"""Tables of the data commands, drawn by rich: coloured on a terminal, plain elsewhere."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mmctx.datasets.check.source import CheckResult
    from mmctx.datasets.view.stats import Distribution, SourceStats

_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}
_PLAIN_WIDTH = 160
_BARS = " ▁▂▃▄▅▆▇█"
_NUM_BARS = 24


def rendered(*parts: RenderableType) -> str:
    """What rich makes of `parts`, as one string for stdout."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else _PLAIN_WIDTH
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, no_color=not terminal)
    for part in parts:
        console.print(part)
    return out.getvalue().rstrip("\n")


def printable(text: str) -> str:
    """`text` with what no terminal should be sent (control characters, bytes that are no UTF-8) escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_table(result: CheckResult, answer: dict[str, Any]) -> str:
    """One row for each defect, with its first example, and a line that sums up."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", row_styles=["", ""])
    table.add_column("defect", no_wrap=True)
    table.add_column("level", no_wrap=True)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("first example", overflow="fold")
    for defect, found in answer["defects"].items():
        colour = _COLOURS[found["level"]]
        example = found["examples"][0] if found["examples"] else {"shard": "", "key": "", "detail": ""}
        place = " ".join(part for part in (example["shard"], example["key"]) if part)
        shown = Text(printable(place), style="bold") + Text("\n" + printable(example["detail"]), style="not bold dim")
        table.add_row(Text(defect, style=colour), Text(found["level"], style=colour), f"{found['count']:,}", shown)
    levels = ", ".join(_count(result.total(level), level) for level in ("error", "warning", "info"))
    total = f"{_count(result.num_samples, 'sample')} in {_count(result.num_shards, 'shard')} ({result.num_bytes / 1e6:,.1f} MB): "
    lines = [Text(total + (levels if result.counts else "nothing is wrong"), style="red" if not result.ok else "green")]
    if "quarantine" in answer:
        lines.append(Text(f"{_count(answer['quarantined'], 'sample')} in quarantine: {answer['quarantine']}"))
    return rendered(*([table, ""] if result.counts else []), *lines)


def stats_tables(sources: Sequence[SourceStats], forecast: Mapping[str, Any] | None) -> str:
    """A table for each source, one row for each distribution with its histogram, and the packing forecast."""
    parts: list[RenderableType] = []
    for source in sources:
        parts += [*_source_table(source), ""]
    if forecast is not None:
        per_bin = forecast["tokens_per_bin"]
        parts.append(
            f"packing: bins of {per_bin['limit']:,} tokens are filled to {forecast['fill']:.1%} "
            f"(fullest {per_bin['max'] / per_bin['limit']:.1%}), {forecast['samples_per_step']:,.1f} samples a step"
        )
        for name, source in forecast["sources"].items():
            left_out = ", ".join(f"{count} {reason}" for reason, count in source["left_out"].items())
            note = f", left out: {left_out}" if left_out else ""
            parts.append(f"{name}: {forecast['steps']:,} steps are {source['epochs']:.3g} epochs{note}")
    return rendered(*parts)


def _source_table(source: SourceStats) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    made_of = ", ".join(f"{count:,} {kind}" for kind, count in source.modalities.items())
    sound = f", {source.hours:,.2f} h of sound" if source.hours else ""
    counted = f"{_count(source.num_samples, 'sample')} in {_count(source.num_shards, 'shard')}"
    total = f": {counted}, {source.num_bytes / 1e6:,.1f} MB{sound}"
    lines: list[RenderableType] = [Text(printable(source.name), style="bold cyan") + Text(total), Text(f"  {made_of}")]
    if source.problems:
        found = ", ".join(f"{count:,} {reason}" for reason, count in source.problems.items())
        lines.append(Text(f"  unusable: {found}", style="red"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    for column in ("count", "min", "median", "mean", "p95", "max"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("min to max", no_wrap=True)
    for name, found in source.distributions.items():
        numbers = found.summary()
        shown = [f"{numbers.pop('count'):,.0f}", *(_number(value) for value in numbers.values())]
        table.add_row(Text(f"  {printable(name)}"), *shown, Text(bars(found), style="cyan"))
    return [*lines, table]


def bars(distribution: Distribution) -> str:
    """A histogram of 24 bins as one line of blocks; every bin that is not empty shows."""
    _, counts = distribution.histogram(_NUM_BARS)
    return "".join(_BARS[-(-int(count) * (len(_BARS) - 1) // int(counts.max()))] for count in counts)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
