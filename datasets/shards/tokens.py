"""Counts the tokens of a shard's texts. Imports no torch: index workers start fast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmctx.chat import ChatTemplate
from mmctx.datasets.remote.storage import Shard, open_shard
from mmctx.datasets.shards.contents import REASONS, Problem, parse_json, parse_segments, read_text, text_members
from mmctx.datasets.shards.measure import MemberReader
from mmctx.datasets.shards.tar import group_samples, scan_tar
from mmctx.errors import DataError, SampleError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from mmctx.tokenizer import TextTokenizer

SEGMENT_DTYPE = np.dtype(
    [
        ("sample", np.int32),  # ascending
        ("tokens", np.int32),  # of a text segment; MEDIA for a picture or a clip
    ]
)
MEDIA = -1
_PLAIN, _TEXT, _CONTROL = 0, 1, 2

_BATCH_TEXTS, _BATCH_CHARACTERS = 1024, 1 << 22


class TokenCounts(NamedTuple):
    """What `count_tokens` finds.

    Attributes:
        tokens: (n, max(1, number of texts)) int32 as `ShardIndex.tokens` describes.
        segments: (m,) `SEGMENT_DTYPE`, the segments of interleaved documents in reading order.
        problems: the samples whose texts cannot be used.
    """

    tokens: np.ndarray
    segments: np.ndarray
    problems: list[Problem]


class TokenCounter:
    """Counts tokens exactly as `TextTokenizer` does, from the Rust tokenizer alone; may be pickled.

    Args:
        definition: a ``tokenizer.json`` as text.
        fingerprint: of the tokenizer it came from.
        chat: its template of conversations.
    """

    def __init__(self, definition: str, fingerprint: str, chat: ChatTemplate | None = None) -> None:
        self.definition, self.fingerprint, self.chat = definition, fingerprint, chat
        self._tokenizer: Tokenizer | None = None

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> TokenCounter:
        """The counter of a tokenizer."""
        return cls(tokenizer.definition, tokenizer.fingerprint, tokenizer.chat)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokenizer": None}

    def count(self, texts: Sequence[str], control: bool = False) -> list[int]:
        """Number of tokens of each text; special tokens written out in it are plain characters, unless it is a template's own."""
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_str(self.definition)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = not control
        return [len(e) for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def count_tokens(path: Shard, samples: np.ndarray, counter: TokenCounter, texts: Sequence[str]) -> TokenCounts:
    """Counts the tokens of every declared text of a shard that has been measured.

    Raises:
        DataError: the shard changed since it was measured.
    """
    counts = np.zeros((len(samples), max(1, len(texts))), np.int32)
    present = np.zeros(counts.shape, bool)
    keys: list[str] = []
    problems: dict[int, Problem] = {}
    segments: list[tuple[int, int]] = []
    for cells, batch in _batches(_declared_texts(path, samples, texts, counter.chat, keys, problems)):
        rows, columns, is_segment = np.array(cells).T
        found = _count(counter, batch, is_segment == _CONTROL)
        is_media = is_segment == MEDIA
        found[is_media] = 0
        np.add.at(counts, (rows, columns), found)  # segments of one document share a cell
        present[rows[~is_media], columns[~is_media]] = True
        listed = is_segment != _PLAIN
        segments += zip(rows[listed].tolist(), np.where(is_media, MEDIA, found)[listed].tolist(), strict=True)
    no_text = present & (counts == 0)
    nothing = (counts.sum(1) == 0) & (samples["num_media"] == 0)
    empty = (samples["flag"] == 0) & (nothing | (no_text.any(1) & (samples["interleaved"] == 0)))
    for number in np.flatnonzero(empty).tolist():
        problems.setdefault(number, Problem(keys[number], "empty", f"no media and no tokens in {', '.join(texts)}"))
    tokens = np.where(present, counts, -1).astype(np.int32)
    for number, problem in problems.items():
        tokens[number] = -1
        tokens[number, 0] = -1 - REASONS.index(problem.reason)
    return TokenCounts(tokens, np.array(segments, SEGMENT_DTYPE), [problems[number] for number in sorted(problems)])


def _count(counter: TokenCounter, texts: Sequence[str], control: np.ndarray) -> np.ndarray:
    """(n,) tokens of n texts, of which those that `control` (n,) names are a chat template's."""
    found = np.zeros(len(texts), np.int64)
    for kind in {False, *control.tolist()}:
        mine = np.flatnonzero(control == kind)
        found[mine] = counter.count([texts[number] for number in mine.tolist()], kind)
    return found


def _declared_texts(
    path: Shard,
    samples: np.ndarray,
    texts: Sequence[str],
    chat: ChatTemplate | None,
    keys: list[str],
    problems: dict[int, Problem],
) -> Iterator[tuple[tuple[int, int, int], str]]:
    """Yields ((sample, column, kind), text), where kind is `_PLAIN` for a text of its own, `_TEXT` or `_CONTROL` for a text segment and
    `MEDIA` for a media segment, whose text is empty; fills `keys` of all samples and `problems` of unusable texts.
    """
    wanted = text_members(texts)
    offsets, flags = samples["offset"].tolist(), samples["flag"].tolist()
    with open_shard(path) as file:
        reader = MemberReader(file, str(path))
        for number, sample in enumerate(group_samples(scan_tar(path))):
            if number >= len(offsets) or sample.start != offsets[number]:
                raise DataError(f"{path}: changed while it was being indexed; index it again when it is complete")
            keys.append(sample.key)
            if flags[number]:
                continue
            members = {extension: reader.read(m) for extension, m in sample.members if extension in wanted}
            try:
                columns = list(_columns(members, texts, chat))
            except SampleError as error:
                problems[number] = Problem(sample.key, error.reason, error.detail)
                continue
            for column, kind, text in columns:
                yield (number, column, kind), text


def _columns(
    members: Mapping[str, bytes], texts: Sequence[str], chat: ChatTemplate | None
) -> Iterator[tuple[int, int, str]]:
    """(column, kind, text) of one sample."""
    document = parse_json(members)
    segments = parse_segments(document, chat)
    if segments is not None:
        for segment in segments:
            kind = _CONTROL if segment.control else _TEXT
            yield (0, kind, segment.value) if segment.kind == "text" else (0, MEDIA, "")
        return
    for column, entry in enumerate(texts):
        text = read_text(entry, members, document)
        if text is not None:
            yield column, _PLAIN, text


def _batches(
    cells: Iterator[tuple[tuple[int, int, int], str]],
) -> Iterator[tuple[list[tuple[int, int, int]], list[str]]]:
    """Bounds the number of texts and of characters that are tokenized at once."""
    places: list[tuple[int, int, int]] = []
    batch: list[str] = []
    characters = 0
    for place, text in cells:
        places.append(place)
        batch.append(text)
        characters += len(text)
        if len(batch) >= _BATCH_TEXTS or characters >= _BATCH_CHARACTERS:
            yield places, batch
            places, batch, characters = [], [], 0
    if batch:
        yield places, batch
