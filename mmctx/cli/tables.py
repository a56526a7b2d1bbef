"""Tables of the data commands, drawn by rich: coloured on a terminal, plain elsewhere."""

from __future__ import annotations

import io
import shutil
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mmctx.datasets.check import CheckResult

_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}
_PLAIN_WIDTH = 160


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
    levels = ", ".join(f"{result.total(level):,} {level}s" for level in ("error", "warning", "info"))
    total = f"{result.num_samples:,} samples in {result.num_shards:,} shards ({result.num_bytes / 1e6:,.1f} MB): "
    lines = [Text(total + (levels if result.counts else "nothing is wrong"), style="red" if not result.ok else "green")]
    if "quarantine" in answer:
        lines.append(Text(f"{answer['quarantined']:,} samples in quarantine: {answer['quarantine']}"))
    return rendered(*([table, ""] if result.counts else []), *lines)
