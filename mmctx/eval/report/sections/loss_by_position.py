"""Section of the suite `loss_by_position`: does the loss fall with context, and does far context help at all?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmctx.eval.report.pieces import Lines, Part, Section, Series

_CURVES = {"truncation": "only the last tokens kept", "shuffle": "what lies before them shuffled"}


def loss_by_position_section(results: Mapping[str, Any]) -> Section | None:
    """A chart over positions for each modality, and one of what truncation and shuffling cost."""
    parts: list[Part] = [
        chart
        for name, found in (results.get("modalities") or {}).items()
        if (chart := _positions(name, found)) is not None
    ]
    series = [
        Series(
            label=label,
            x=found["kept"],
            y=found["excess"],
            low=found["excess_low"],
            high=found["excess_high"],
            dots=True,
        )
        for name, label in _CURVES.items()
        if (found := results.get(name) or {}).get("kept")
    ]
    if series:
        chart = Lines(
            name="excess",
            label="loss above that with the whole context, nats",
            series=tuple(series),
            x_label="tokens kept",
            reference=0.0,
            reference_label="whole context",
            log_x=True,
            wide=True,
        )
        parts.append(chart)
    if not parts:
        return None
    return Section(
        id="loss_by_position",
        title="Loss by position",
        about="Mean loss of the tokens at each place of the held-out documents, with 95% bands: a model that uses its context "
        "predicts better further on. Truncation and shuffling tell how much of that comes from far away: what the last tokens of a "
        "document cost more when only the nearest tokens before them are kept, or when what is farther is put out of order.",
        parts=tuple(parts),
    )


def _positions(modality: str, found: Mapping[str, Any]) -> Lines | None:
    keep = [n for n, value in enumerate(found.get("mean") or ()) if value is not None]
    if not keep:
        return None
    # the middle of each stretch, on a logarithmic axis, which has no 0
    x = [max((start * end) ** 0.5, end / 2) for start, end in (found["edges"][n] for n in keep)]
    y, low, high = ([found[name][n] for n in keep] for name in ("mean", "low", "high"))
    label = "all predicted tokens" if modality == "all" else f"tokens predicted in documents: {modality}"
    return Lines(
        name=f"positions {modality}",
        label=label,
        series=(Series(label="", x=x, y=y, low=low, high=high, dots=True),),
        x_label="position in the document",
        log_x=True,
        wide=modality == "all",
    )
