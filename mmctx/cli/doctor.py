"""`mmctx doctor`: which attention backends work on this machine, how exactly, how fast, and which one "auto" will take."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmctx.cli.common import Json, print_answer, progress_bars

if TYPE_CHECKING:
    from mmctx.attention.certify import Certificate, Report


def doctor(
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    record: Annotated[bool, typer.Option(help="Keep the result for `attention: auto` of later runs.")] = True,
    timing: Annotated[bool, typer.Option(help="Time what passes; without it nothing is kept.")] = True,
    as_json: Json = False,
) -> None:
    """Check every attention backend against a dense float64 reference, time it, and keep the result for `attention: auto`."""
    from mmctx.attention.certify import certify, choose
    from mmctx.attention.record import save_record
    from mmctx.errors import BackendError

    with progress_bars() as show:
        report = certify(device, timing=timing, progress=show)
    try:
        choice, why = choose(report.certificates), "passed every case, in the least time over all profiles"
    except BackendError as error:
        choice, why = None, str(error)
    path, unkept = None, None
    if record and timing:
        try:
            path = str(save_record(report.record(), report.device))
        except OSError as error:
            unkept = f"the certificate cannot be kept ({error}); set XDG_CACHE_HOME to a folder that is yours"
    answer = {
        "choice": choice,
        "why": why,
        "machine": report.record().machine,
        "crossover": report.crossover and asdict(report.crossover),
        "certificate": path,
        "backends": [certificate.to_json() for certificate in report.certificates],
    }
    print_answer(answer, as_json, _text(report, answer, unkept))
    if choice is None or any(certificate.usable and not certificate.passed for certificate in report.certificates):
        raise typer.Exit(1)


def _text(report: Report, answer: dict[str, Any], unkept: str | None) -> str:
    from rich.text import Text

    from mmctx.cli.tables import rendered

    lines = [f"fastest certified: {answer['choice']} ({answer['why']})" if answer["choice"] else answer["why"]]
    if report.crossover is not None:
        limits = {"causal": report.crossover.causal, "bidirectional": report.crossover.bidirectional}
        shown = ", ".join(f"{limit:,} tokens ({kind})" for kind, limit in limits.items() if limit is not None)
        lines.append(f"dense attention overtakes {report.crossover.short} from {shown}: `hybrid` splits there")
    if answer["certificate"]:
        lines.append(f"kept in {answer['certificate']}: `attention: auto` goes by it")
    if unkept:
        lines.append(unkept)
    reasons = {f"{c.backend} cannot run: {c.why_not}": None for c in report.certificates if not c.usable}
    notes = [Text(reason, style="dim") for reason in reasons]
    parts = [_table(report.certificates), "", *notes, *(Text(line) for line in lines)]
    return rendered(*parts)


def _table(certificates: tuple[Certificate, ...]) -> Any:
    from rich.table import Table
    from rich.text import Text

    profiles = list(dict.fromkeys(profile for c in certificates for profile in c.milliseconds))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("backend", "dtype"):
        table.add_column(name, no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for name in ("forward", "backward"):
        table.add_column(f"{name} error", overflow="fold")
    for profile in profiles:
        table.add_column(f"{profile} ms", justify="right", no_wrap=True)
    table.add_column("same bits", overflow="fold")
    for c in (c for c in certificates if c.usable):
        worst = [_worst(c, "forward"), _worst(c, "backward")] if c.results else ["", ""]
        times = [f"{c.milliseconds[profile]:,.4g}" if profile in c.milliseconds else "" for profile in profiles]
        table.add_row(Text(c.backend), Text(c.dtype), _verdict(c), *map(Text, worst), *map(Text, times), Text(_bits(c)))
    return table


def _verdict(c: Certificate) -> Any:
    from rich.text import Text

    if not c.passed:
        return Text(f"FAILED {c.why_not or 'wrong numbers'}", style="red")
    left_out = (
        f", but not: {'; '.join(f'{case} ({reason})' for case, reason in c.skipped.items())}" if c.skipped else ""
    )
    return Text(f"certified{left_out}", style="green")


def _worst(c: Certificate, which: str) -> str:
    """The largest error, what is allowed, and where it was."""
    result = {"forward": c.worst_forward, "backward": c.worst_backward}[which]
    error = getattr(result, which)
    shown = f"{error:.1e}" if math.isfinite(error) else "not finite"
    return f"{shown} of {c.tolerance:.0e} ({result.case})" if result else ""


def _bits(c: Certificate) -> str:
    if c.same_bits is None:
        return ""
    if not c.same_bits:
        return "no"
    return "yes" if c.why_not_deterministic is None else "not promised"
