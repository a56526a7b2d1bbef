"""Answers drawn on the documents that they rest on: words shaded, pictures under a grid of patches, sounds over a strip of time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmctx.datasets.assemble import RunData
from mmctx.datasets.shards.contents import media_of, parse_json, parse_segments
from mmctx.datasets.view.media import clip_uri, png_uri, spectrogram_uri
from mmctx.errors import MmctxError
from mmctx.eval.report.pieces import Cell, Drawing, Note, Row, Section, Table, side_by_side
from mmctx.eval.report.run import Run
from mmctx.eval.report.sections.cells import count_cell, number_cell, share_cell
from mmctx.eval.segments import Segment, segments_of, shares, sums
from mmctx.eval.suites.attribution import read_scores
from mmctx.pack import Document

_METHODS = {"integrated": "integrated gradients", "gradient": "gradient × input", "attention": "attention rollout"}
_LABELLED = 0.005  # of the shares, the smallest that a medium is labelled with


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One word, picture or clip of a document.

    Attributes:
        kind: `text`, `image` or `audio`.
        text: of a word.
        value: its score, -1 to 1 where 1 is the strongest mark of the document.
        share: of the absolute scores of all segments.
        cells: of a picture or clip, the value of each of its tokens.
        grid: patches in a row of a picture.
        id: names the medium in the page.
        picture: data URI of its pixels or spectrogram, where it is drawn first; empty where it is drawn again.
        size: (width, height) of that picture.
        sound: data URI of the recording, empty where it is not at hand.
    """

    kind: str
    text: str = ""
    value: float
    share: float
    cells: tuple[float, ...] = ()
    grid: int = 1
    id: str = ""
    picture: str = ""
    size: tuple[int, int] = (1, 1)
    sound: str = ""


def attribution_section(runs: Sequence[Run], data: Mapping[str, RunData | None]) -> Section | None:
    """The shares of media by kind of document, and every example on its document.

    Args:
        runs: of the page.
        data: held-out data by the name of the run, to make the documents again.
    """
    section = side_by_side({run.name: _table_section(run.results.get("attribution") or {}) for run in runs})
    if section is None:
        return None
    examples: dict[tuple[Any, ...], list[tuple[Run, Mapping[str, Any]]]] = {}
    for run in runs:
        for entry in run.results["attribution"]["examples"] if run.results.get("attribution") else ():
            examples.setdefault((*entry["location"], entry["objective"]), []).append((run, entry))
    cards = [
        _card(f"a{number}-{place}", run.name if len(runs) > 1 else "", entry, data.get(run.name))
        for number, found in enumerate(examples.values())
        for place, (run, entry) in enumerate(found)
    ]
    drawing = Drawing(name="documents", template="attribution.html.jinja", values={"cards": cards})
    return replace(section, parts=(*section.parts, drawing))


def _table_section(results: Mapping[str, Any]) -> Section | None:
    kinds: Mapping[str, Any] = results.get("by_kind") or {}
    if not kinds:
        return None
    told = {kind: found for kind, found in kinds.items() if 0 < found["media_tokens"] < 1}
    rows = [
        Row(kind, (*_share_cells(found), number_cell(found["gap"]), count_cell(found["n"])))
        for kind, found in told.items()
    ]
    columns = (*_METHODS.values(), "gap, nats", "n")
    table = Table(name="media", corner="share of media, of", columns=columns, rows=tuple(rows))
    gap = max(found["gap"] for found in kinds.values())
    note = f"Before these answers stand media alone, or words alone. The integrated gradients miss their sum by {gap:.2g} nats at most."
    return Section(
        id="attribution",
        title="What answers rest on",
        about="The model writes the last text of a document anew, and what it writes is explained by what stands before it. Blue "
        "speaks for the answer, red against it, the more the stronger. Where words and media stand before it, a table has the share of "
        "pictures and sounds in all scores, and as a tick their share of the tokens; the gap is what the integrated gradients miss of "
        "the change that they should add up to.",
        parts=(table if rows else Note(name="media", text=note),),
    )


def _share_cells(found: Mapping[str, Any]) -> list[Cell | None]:
    return [share_cell(found[method], found["media_tokens"]) for method in _METHODS]


def _card(id: str, run: str, entry: Mapping[str, Any], data: RunData | None) -> dict[str, Any]:
    """What the template shows of one example; without the document, its texts alone."""
    shown = {name: entry[name] for name in ("key", "prediction", "reference", "log_prob", "baseline")}
    card: dict[str, Any] = {"run": run, "source": entry["location"][0], **shown, "methods": [], "problem": ""}
    try:
        document, data = _find(entry, data)
        sounds = _recordings(entry, document, data)
    except MmctxError as error:
        return card | {"problem": str(error)}
    segments = segments_of(document, entry["cut"], data.tokenizer)
    for number, (method, label) in enumerate(_METHODS.items()):
        scores = read_scores(entry["scores"][method])
        marks = list(_marks(id, scores, segments, sounds if number == 0 else [], drawn=number > 0))
        card["methods"].append({"name": method, "label": label, "marks": marks, "rests": _rests(marks)})
    return card


def _find(entry: Mapping[str, Any], data: RunData | None) -> tuple[Document, RunData]:
    source, sample_id, place = entry["location"]
    if data is None:
        raise MmctxError("the held-out data are not at hand")
    if source not in data.tables:
        raise MmctxError(f"no held-out source {source!r}; there are {', '.join(data.tables)}")
    data = data.only(entry["objective"])
    documents = data.dataset.documents(list(data.tables).index(source), sample_id, 0)
    if place >= len(documents) or len(documents[place].input_ids) < entry["cut"]:
        raise MmctxError(f"sample {entry['key']!r} no longer makes the document that was explained")
    return documents[place], data


def _recordings(entry: Mapping[str, Any], document: Document, data: RunData) -> list[str]:
    """A player's data URI for each clip of a document, in order; none where they are not those of the sample."""
    members = data.tables[entry["location"][0]].source.read(entry["location"][1]).members
    clips = [part.value for part in media_of(members, parse_segments(parse_json(members))) if part.kind == "audio"]
    wanted = sum(item.kind == "audio" for _, item in document.media)
    return [clip_uri(name, members[name]) for name in clips] if len(clips) == wanted else []


def _marks(
    id: str, scores: np.ndarray, segments: Sequence[Segment], sounds: Sequence[str], *, drawn: bool
) -> Iterator[Mark]:
    """The segments with their scores; `drawn` says that the page holds their pictures already."""
    found, part = sums(scores, segments), shares(scores, segments)
    words = [abs(value) for value, segment in zip(found, segments, strict=True) if segment.kind == "text"]
    media = [np.abs(scores[s.start : s.end]).max(initial=0.0) for s in segments if s.kind != "text"]
    strongest = max([*words, *media, 1e-12])
    heard = 0
    for number, (segment, value, share) in enumerate(zip(segments, found, part, strict=True)):
        if segment.item is None:
            yield Mark(kind="text", text=segment.text, value=value / strongest, share=share)
            continue
        cells = tuple((scores[segment.start : segment.end] / strongest).tolist())
        picture, size, sound = "", (1, 1), ""
        values = segment.item.values
        if segment.kind == "image":
            size = (values.shape[2], values.shape[1])
            picture = "" if drawn else png_uri(values.permute(1, 2, 0).contiguous().numpy())
        else:
            size = (max(len(values), 1), values.shape[1])
            picture = "" if drawn else spectrogram_uri(values.numpy())
            sound = sounds[heard] if heard < len(sounds) else ""
            heard += 1
        yield Mark(
            kind=segment.kind,
            value=value / strongest,
            share=share,
            cells=cells,
            grid=round(len(cells) ** 0.5) if segment.kind == "image" else len(cells),
            id=f"{id}-{number}",
            picture=picture,
            size=size,
            sound=sound,
        )


def _rests(marks: Sequence[Mark]) -> list[tuple[str, float]]:
    """Shares of pictures, sounds and words, the greatest first."""
    kinds = {"image": "pictures", "audio": "sounds", "text": "words"}
    found = [(label, sum(mark.share for mark in marks if mark.kind == kind)) for kind, label in kinds.items()]
    return sorted(((label, share) for label, share in found if share > _LABELLED), key=lambda entry: -entry[1])
