"""Examples of the report: a picture or a clip, its own text and the model's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from mmctx.datasets.assemble import RunData
from mmctx.datasets.decode import decode_audio
from mmctx.datasets.shards.contents import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS
from mmctx.datasets.view.media import MIME_TYPES, data_uri, spectrogram_png
from mmctx.errors import MmctxError

_EXTENSIONS = {"image": IMAGE_EXTENSIONS, "audio": AUDIO_EXTENSIONS}

# Words, or single characters of scripts that put no spaces between words.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORDS = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|\s+|.", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One generated text beside its picture or clip.

    Attributes:
        kind: `image` or `audio`.
        key: the sample.
        source: its source.
        reference: HTML of its own text, words that the model missed marked.
        prediction: HTML of the model's text, wrong words marked.
        exact: both texts are equal, letter case and spacing aside.
        media: data URI, empty where the media could not be read.
        spectrogram: data URI of a clip's spectrogram.
        seconds: length of a clip.
        problem: why the media is not shown.
    """

    kind: str
    key: str
    source: str
    reference: str
    prediction: str
    exact: bool
    media: str = ""
    spectrogram: str = ""
    seconds: float | None = None
    problem: str = field(default="")


def load_examples(entries: Sequence[Mapping[str, Any]], data: RunData) -> list[Example]:
    """Reads the media of the caption suite's `examples`. One that cannot be read keeps its texts and says why."""
    return [_load(entry, data) for entry in entries]


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
    text = escape("".join(words))
    return text if tag == "equal" or not text else f"<{element}>{text}</{element}>"


def _load(entry: Mapping[str, Any], data: RunData) -> Example:
    source, sample_id = entry["location"]
    reference, prediction = mark_differences(entry["reference"], entry["prediction"])
    exact = _plain(entry["reference"]) == _plain(entry["prediction"])
    try:
        media: dict[str, Any] = dict(_media(entry["kind"], source, sample_id, data))
    except MmctxError as error:
        media = {"problem": str(error)}
    return Example(
        kind=entry["kind"],
        key=entry["key"],
        source=source,
        reference=reference,
        prediction=prediction,
        exact=exact,
        **media,
    )


def _media(kind: str, source_name: str, sample_id: int, data: RunData) -> Iterator[tuple[str, Any]]:
    """Fields of `Example` that show the media of a sample."""
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
