"""`mmctx audit`: does any document see another?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmctx.cli.common import Json, Overrides, print_answer, progress_bars
from mmctx.cli.tables import printable, rendered

if TYPE_CHECKING:
    from mmctx.audit import AuditReport, Check, Place


def audit(
    where: Annotated[Path, typer.Argument(help="The run's YAML file, or a run or checkpoint folder for its weights.")],
    overrides: Overrides = None,
    step: Annotated[int | None, typer.Option(help="Whose batch to take, counted from 1.")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of the batch to take; 0 for all. By default all on a GPU, 1,536 on a CPU."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Perturb single documents of a packed batch and require that no other changes; exit 1 on a leak."""
    from mmctx import api

    with progress_bars() as show:
        report = api.audit(where, overrides or [], step=step, tokens=tokens, progress=show)
    print_answer(report.to_json(), as_json, audit_table(report))
    if not report.ok:
        raise typer.Exit(1)


def audit_table(report: AuditReport) -> str:
    """One row for each mode and perturbation, then each leak with both documents, then a line that sums up."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("backend", "precision", "checkpointed", "changed"):
        table.add_column(column, no_wrap=True)
    for column in ("checks", "leaks", "largest"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in _summed(report):
        mode = row.mode
        cells = (mode.backend, mode.precision, "yes" if mode.checkpointing else "no") if mode else ("", "", "")
        size = f"{row.largest:.3g}" if row.leaks else ""
        note = f"{row.blind} blind" if row.blind else ""
        style = "red" if row.leaks or row.blind else ""
        table.add_row(*cells, row.perturbation, f"{row.comparisons:,}", f"{row.leaks:,}", size, note, style=style)
    findings = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("mode", "changed", "of", "reaches", "of", "by"):
        findings.add_column(column, overflow="fold")
    for leak in report.leaks:
        cells = (str(leak.mode or ""), leak.perturbation, _name(leak.source), leak.observed, _name(leak.victim))
        findings.add_row(*cells, f"{leak.size:.3g}")
    lines = [Text(printable(f"blind: {blind}"), style="red") for blind in report.blind]
    lines += [Text(printable(note), style="dim") for note in report.notes]
    leaks = sum(row.leaks for row in report.rows.values())
    blind = sum(row.blind for row in report.rows.values())
    verdict = f"{report.num_checks:,} checks on {report.documents:,} documents ({report.tokens:,} tokens): "
    verdict += "no document sees another" if report.ok else f"{leaks:,} leaks, {blind:,} blind"
    parts = [table, *(["", findings] if report.leaks else []), *(["", *lines] if lines else []), ""]
    return rendered(*parts, Text(verdict, style="green" if report.ok else "red"))


def _summed(report: AuditReport) -> list[Check]:
    """Rows added up over what was observed."""
    from mmctx.audit import Check

    sums: dict[tuple[object, str], Check] = {}
    for row in report.rows.values():
        total = sums.setdefault((row.mode, row.perturbation), Check(row.mode, row.perturbation, ""))
        total.comparisons += row.comparisons
        total.leaks += row.leaks
        total.largest = max(total.largest, row.largest)
        total.blind += row.blind
    return list(sums.values())


def _name(place: Place | None) -> str:
    return printable(str(place)) if place else "several"
