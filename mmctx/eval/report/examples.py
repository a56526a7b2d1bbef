"""Examples of the report: a picture or a clip, its own text and what each run's model says of it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from mmctx.datasets.assemble import RunData
from mmctx.datasets.decode import decode_audio
from mmctx.datasets.shards.contents import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS
from mmctx.datasets.view.media import MIME_TYPES, data_uri, spectrogram_png
from mmctx.datasets.view.render import readable
from mmctx.errors import MmctxError
from mmctx.eval.report.pieces import Drawing, Section
from mmctx.eval.report.run import Run

_EXTENSIONS = {"image": IMAGE_EXTENSIONS, "audio": AUDIO_EXTENSIONS}

# Words, or single characters of scripts that put no spaces between words.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORDS = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|\s+|.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one run's model wrote.

    Attributes:
        run: its name, empty on the page of one run.
        html: the text, wrong words marked.
        exact: it is the reference, letter case and spacing aside.
    """

    run: str
    html: str
    exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One picture or clip with its texts.

    Attributes:
        kind: `image` or `audio`.
        key: the sample.
        source: its source.
        reference: HTML of its own text; where one run is shown, words that its model missed are marked.
        answers: of each run that shows this sample.
        media: data URI, empty where the media could not be read.
        spectrogram: data URI of a clip's spectrogram.
        seconds: length of a clip.
        problem: why the media is not shown.
    """

    kind: str
    key: str
    source: str
    reference: str
    answers: tuple[Answer, ...]
    media: str = ""
    spectrogram: str = ""
    seconds: float | None = None
    problem: str = ""


def example_sections(runs: Sequence[Run], data: Mapping[str, RunData | None]) -> list[Section]:
    """The sections on pictures and on sounds, each where there are any.

    Args:
        runs: whose suite `caption` kept `examples`.
        data: held-out data of each run by its name, to find the media; None where they are not at hand.
    """
    cards = load_cards(runs, data)
    about = "the first in order, not the best. <del>Missed words</del> are marked in the text, <ins>wrong words</ins> in the model's."
    titles = {
        "image": ("pictures", "Pictures and what the model says of them", f"Held-out pictures, {about}"),
        "audio": (
            "sounds",
            "Sounds and what the model hears",
            f"Held-out clips with the log-mel frames that the encoder reads (time to the right, pitch upwards), {about}",
        ),
    }
    sections = []
    for kind, (id, title, text) in titles.items():
        if found := [card for card in cards if card.kind == kind]:
            values = {"cards": found, "wide": kind == "audio", "about": text}
            drawing = Drawing(name=id, template="cards.html.jinja", values=values)
            sections.append(Section(id=id, title=title, parts=(drawing,)))
    return sections


def load_cards(runs: Sequence[Run], data: Mapping[str, RunData | None]) -> list[Card]:
    """Reads the media of the caption suites' examples, each once. One that cannot be read keeps its texts and says why."""
    places: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for run in runs:
        for entry in (run.results.get("caption") or {}).get("examples", ()):
            places.setdefault((entry["kind"], entry["location"][0], entry["key"]), {})[run.name] = entry
    return [_load(kind, source, key, entries, data, len(runs)) for (kind, source, key), entries in places.items()]


def _load(
    kind: str,
    source: str,
    key: str,
    entries: Mapping[str, Mapping[str, Any]],
    data: Mapping[str, RunData | None],
    num_runs: int,
) -> Card:
    answers = []
    reference = ""
    for run, entry in entries.items():
        marked, prediction = mark_differences(entry["reference"], entry["prediction"])
        exact = _plain(entry["reference"]) == _plain(entry["prediction"])
        reference = marked if num_runs == 1 else escape(readable(entry["reference"]))
        answers.append(Answer(run if num_runs > 1 else "", prediction, exact))
    media: dict[str, Any] = {}
    for run, entry in entries.items():
        try:
            media = dict(_media(kind, source, entry["location"][1], data.get(run)))
            break
        except MmctxError as error:
            media = {"problem": str(error)}
    return Card(kind=kind, key=key, source=source, reference=reference, answers=tuple(answers), **media)


def mark_differences(reference: str, prediction: str) -> tuple[str, str]:
    """Both texts as HTML, words that differ inside `<del>` (missed) and `<ins>` (wrong); letter case does not count."""
    a, b = _WORDS.findall(reference), _WORDS.findall(prediction)
    matcher = difflib.SequenceMatcher(None, [w.lower() for w in a], [w.lower() for w in b], autojunk=False)
    blocks = matcher.get_opcodes()
    return (
        "".join(_marked("del", tag, a[start:end]) for tag, start, end, _, _ in blocks),
        "".join(_marked("ins", tag, b[start:end]) for tag, _, _, start, end in blocks),
    )


def _marked(element: str, tag: str, words: Sequence[str]) -> str:
    text = escape(readable("".join(words)))
    return text if tag == "equal" or not text else f"<{element}>{text}</{element}>"


def _media(kind: str, source_name: str, sample_id: int, data: RunData | None) -> Iterator[tuple[str, Any]]:
    """Fields of `Card` that show the media of a sample."""
    if data is None:
        raise MmctxError("the held-out data are not at hand")
    if source_name not in data.tables:
        raise MmctxError(f"no held-out source {source_name!r}; there are {', '.join(data.tables)}")
    table = data.tables[source_name]
    members = table.source.read(sample_id).members
    extension = next((name for name in members if name in _EXTENSIONS[kind]), None)
    if extension is None:
        raise MmctxError(f"the sample has no {kind}; its members are {', '.join(members)}")
    yield "media", data_uri(MIME_TYPES[extension], members[extension])
    if kind == "audio":
        waveform, rate = decode_audio(members[extension])
        yield "seconds", len(waveform) / rate
        make_item = table.preprocessors.audio
        assert make_item is not None, "a model without a sound encoder has no captions of sound"
        frames = make_item(waveform, rate).values  # (F, M)
        yield "spectrogram", data_uri("image/png", spectrogram_png(frames.numpy()))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
