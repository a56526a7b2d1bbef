"""What samples will be once they are documents, from the index alone: what a plan packs, before anything is decoded.

Shapes: n samples asked for, u units (a sample, or a part of one that was split).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mmctx.datasets.config import NO_LIMIT, DataConfig, SourceConfig
from mmctx.datasets.planning.split import cut, cut_stream, split_sample
from mmctx.datasets.shards.contents import REASONS
from mmctx.datasets.shards.measure import MEDIA_KINDS
from mmctx.datasets.shards.source import Source
from mmctx.encoders.audio_front_end import AudioPreprocessor
from mmctx.encoders.image import ImagePreprocessor
from mmctx.errors import ConfigError
from mmctx.flops import Work
from mmctx.objectives import DataHalf
from mmctx.sample import Sample, SampleSizes

LIMITED = ("tokens", "images", "audio_frames", "pairs")
"""Quantities that a bin is limited in, in the order of `Units.sizes`."""

_OVER_LONG, _MISSING, _OTHER_LENGTH = (REASONS.index(r) for r in ("over_long", "missing_member", "other_length"))


@dataclass(frozen=True, slots=True)
class Preprocessors:
    """How media become items, and how many tokens they will be; None for a modality that the model has no encoder for.

    Attributes:
        image: picture (3, H, W) uint8 -> item.
        audio: clip (n,) float32 and its sample rate -> item.
        image_tokens: widths, heights (n,) -> tokens (n,).
        audio_tokens: numbers of samples, sample rates (n,) -> tokens (n,).
        frames_per_token: log-mel frames behind one token of sound.
    """

    image: ImagePreprocessor | None
    audio: AudioPreprocessor | None
    image_tokens: Callable[[np.ndarray, np.ndarray], np.ndarray]
    audio_tokens: Callable[[np.ndarray, np.ndarray], np.ndarray]
    frames_per_token: int = 1


@dataclass(frozen=True, slots=True)
class Units:
    """What n samples come to.

    Attributes:
        reasons: (n,) uint8 codes of `contents.REASONS`, 0 for a sample that can be used.
        owner: (u,) which of the n each unit belongs to, ascending.
        part: (u,) number of the part within its sample, 0 for a whole one.
        sizes: (u, 4) int64, see `LIMITED`.
        costs: (u,) int64 estimated FLOPs.
    """

    reasons: np.ndarray
    owner: np.ndarray
    part: np.ndarray
    sizes: np.ndarray
    costs: np.ndarray


class Table(Protocol):
    """The samples of one source as a plan sees them."""

    num_samples: int

    def units(self, ids: np.ndarray) -> Units:
        """Units of the samples `ids` (n,), in any order."""
        ...


class SourceTable:
    """A source's samples under the objectives it serves; measured when asked for, so that a billion samples need no memory."""

    def __init__(
        self,
        source: Source,
        config: SourceConfig,
        preprocessors: Preprocessors,
        objectives: Mapping[str, DataHalf],
        work: Work,
        data: DataConfig,
    ) -> None:
        """Raises ConfigError where the source names an objective that is not defined."""
        for name in config.objectives:
            if name not in objectives:
                raise ConfigError(
                    f"data.sources.{source.name}.objectives: no objective {name!r}; there are {sorted(objectives)}"
                )
        self.source, self.config, self.data, self.work = source, config, data, work
        self.preprocessors, self.objectives = preprocessors, objectives
        self.halves = [objectives[name] for name in config.objectives]
        self.num_samples = source.num_samples
        self.limits = data.limits
        self.room = min(half.room(data.context_length) for half in self.halves)
        self.is_stream = config.long_documents == "stream"
        if self.room < 1 and config.long_documents != "drop":
            raise ConfigError(
                f"data.context_length={data.context_length} leaves no room for a token beside what the objectives "
                f"{', '.join(config.objectives)} of data.sources.{source.name} add to a document; raise it, or shorten their prompts"
            )

    def units(self, ids: np.ndarray) -> Units:
        """See `Table`."""
        ids = np.asarray(ids)
        pre = self.preprocessors
        whole, flags = self.source.sizes_and_flags(ids, pre.image_tokens, pre.audio_tokens)
        longest = self._longest(whole)
        low, high = self.config.lengths
        outside = (longest > 0) & ((longest < low) | (longest > (high or NO_LIMIT)))
        flags = np.where((flags == 0) & outside, _OTHER_LENGTH, flags)
        if self.is_stream:
            return self._pieces(ids, whole, flags)
        long = (flags == 0) & (longest > self.data.context_length)
        owner, part = np.arange(len(ids)), np.zeros(len(ids), np.int64)
        sizes = whole
        if self.config.long_documents != "drop" and long.any():
            sizes, owner, part = self._shorten(ids, whole, long)
        lengths = [half.lengths(sizes) for half in self.halves]
        tokens, costs = self._tokens_and_costs(sizes, lengths)
        found = np.stack(
            [
                tokens,
                sizes.num_images,
                sizes.audio_tokens * self.preprocessors.frames_per_token,
                np.sum([half.pairs(sizes) for half in self.halves], axis=0),
            ],
            axis=1,
        )
        nothing = np.stack([(made == 0).all(axis=1) for made in lengths])  # (objectives, u)
        is_part = np.bincount(owner, minlength=len(ids))[owner] > 1
        reasons = np.zeros(len(owner), np.uint8)
        # Media may leave no room for the text beside them: nothing is missing from a sample that was cut.
        reasons[nothing.any(axis=0) & ~is_part] = _MISSING
        reasons[nothing.any(axis=0) & ~is_part & long[owner]] = _OVER_LONG
        made_longest = np.max([made.max(axis=1) for made in lengths], axis=0)
        reasons[(made_longest > self.data.context_length) | (found > np.asarray(self.limits)).any(axis=1)] = _OVER_LONG
        of_sample = flags.copy()
        wrong = np.flatnonzero(reasons)
        wrong = wrong[flags[owner[wrong]] == 0]
        of_sample[owner[wrong]] = reasons[
            wrong
        ]  # one part that has no place rules the sample out: it is used whole or not at all
        kept = (of_sample[owner] == 0) & ~nothing.all(axis=0)  # a part of pictures alone may have nothing for masked LM
        return Units(of_sample, owner[kept], part[kept], found[kept], costs[kept])

    def parts(self, sample: Sample) -> list[Sample]:
        """The parts of a decoded sample that `units` counts: it is cut where a document of it would be too long, and nowhere else."""
        policy, context_length = self.config.long_documents, self.data.context_length
        if policy in ("drop", "stream") or self._longest(SampleSizes.of(sample))[0] <= context_length:
            return [sample]
        return split_sample(sample, policy, self.room)

    def only(self, objective: str) -> SourceTable:
        """The same samples under one objective alone."""
        config = self.config.model_copy(update={"objectives": (objective,)})
        return SourceTable(self.source, config, self.preprocessors, self.objectives, self.work, self.data)

    def explain(self, sample_id: int, code: int) -> str:
        """Why a sample that `units` gives the reason `code` cannot be used."""
        if self.source.flags(np.array([sample_id]))[0]:
            return self.source.problem(sample_id)
        sizes = self._sizes(np.array([sample_id]))
        lengths = np.concatenate([half.lengths(sizes) for half in self.halves], axis=1)[0]
        made = f"the objectives of this source would make documents of {lengths[lengths > 0].tolist()} tokens of this sample"
        if code == _OTHER_LENGTH:
            return f"{made}; data.sources.{self.source.name}.lengths is {list(self.config.lengths)}"
        if code == _MISSING:
            return f"{made}; each of {', '.join(self.config.objectives)} must find something to learn from"
        holds = f"{int(sizes.num_images[0])} pictures and {int(sizes.audio_tokens[0])} tokens of sound"
        limits = ", ".join(
            f"{limit} {name}" for name, limit in zip(LIMITED, self.limits, strict=True) if limit < NO_LIMIT
        )
        return f"{made}, with {holds}; allowed are data.context_length={self.data.context_length} a document, and in a bin {limits}"

    def _sizes(self, ids: np.ndarray) -> SampleSizes:
        return self.source.sizes(ids, self.preprocessors.image_tokens, self.preprocessors.audio_tokens)

    def _longest(self, sizes: SampleSizes) -> np.ndarray:
        return np.max([half.lengths(sizes).max(axis=1) for half in self.halves], axis=0)

    def _shorten(
        self, ids: np.ndarray, whole: SampleSizes, long: np.ndarray
    ) -> tuple[SampleSizes, np.ndarray, np.ndarray]:
        """Sizes, owners and part numbers of all units, long samples cut as `split_sample` will cut them."""
        room = self.room
        plain = long & ~whole.interleaved
        split_text = (self.config.long_documents == "split") & (whole.text_tokens.shape[1] == 1)
        split_text &= plain & (whole.image_tokens + whole.audio_tokens == 0)
        truncated = plain & ~split_text
        text = whole.text_tokens.copy()
        beside = np.maximum(room - np.maximum(whole.image_tokens, whole.audio_tokens), 0)
        text[truncated] = np.minimum(text[truncated], beside[truncated, None])
        owners, parts = [np.flatnonzero(~long | truncated)], []
        parts.append(np.zeros(len(owners[0]), np.int64))
        rows: list[tuple[int, int, int, int]] = []
        for number in np.flatnonzero(long & ~truncated).tolist():
            found = list(self._parts(int(ids[number]), int(text[number, 0]), bool(whole.interleaved[number]), room))
            owners.append(np.full(len(found), number))
            parts.append(np.arange(len(found)))
            rows += found
        owner, part = np.concatenate(owners), np.concatenate(parts)
        kept = owners[0]
        added = np.array(rows, np.int64).reshape(-1, 4)
        texts = np.full((len(added), text.shape[1]), -1, np.int64)
        texts[:, 0] = added[:, 0]
        sizes = SampleSizes(
            text_tokens=np.concatenate([text[kept], texts]),
            image_tokens=np.concatenate([whole.image_tokens[kept], added[:, 1]]),
            audio_tokens=np.concatenate([whole.audio_tokens[kept], added[:, 2]]),
            num_images=np.concatenate([whole.num_images[kept], added[:, 3]]),
            interleaved=np.concatenate([whole.interleaved[kept], np.ones(len(added), bool)]),
        )
        order = np.argsort(owner, kind="stable")
        return sizes.take(order), owner[order], part[order]

    def _parts(self, sample_id: int, text: int, interleaved: bool, room: int) -> Iterator[tuple[int, int, int, int]]:
        """(text tokens, image tokens, audio tokens, pictures) of each part of one long sample."""
        if not interleaved:
            yield from ((piece.stop - piece.start, 0, 0, 0) for (piece,) in cut([text], [False], room))
            return
        tokens, kinds = self.source.segments(
            sample_id, self.preprocessors.image_tokens, self.preprocessors.audio_tokens
        )
        parts = cut(tokens.tolist(), (kinds >= 0).tolist(), room)
        for part in parts[:1] if self.config.long_documents == "truncate" else parts:
            sums = dict.fromkeys((-1, *range(len(MEDIA_KINDS))), 0)
            pictures = 0
            for segment, start, stop in part:
                sums[int(kinds[segment])] += stop - start
                pictures += int(kinds[segment]) == MEDIA_KINDS.index("image")
            yield sums[-1], sums[0], sums[1], pictures

    def _pieces(self, ids: np.ndarray, whole: SampleSizes, flags: np.ndarray) -> Units:
        """Units of a source that is streamed: the pieces of the one document that each sample makes."""
        (half,), pre, room = self.halves, self.preprocessors, self.data.context_length
        made = half.lengths(whole)  # (n, c)
        lengths, labels = made.sum(axis=1), half.labels(whole)
        reasons = np.where((flags == 0) & (lengths == 0), _MISSING, flags).astype(np.uint8)
        reasons[(flags == 0) & ((made > 0).sum(axis=1) > 1)] = _OVER_LONG  # a picture and a clip: two documents
        rows: list[tuple[int, ...]] = []
        for number in np.flatnonzero(reasons == 0).tolist():
            media = int(whole.image_tokens[number] + whole.audio_tokens[number])
            kind = 0 if whole.image_tokens[number] else 1
            spans = [(half.lead, media, kind)] if media else []
            if whole.interleaved[number] and media:
                tokens, kinds = self.source.segments(int(ids[number]), pre.image_tokens, pre.audio_tokens)
                starts = half.lead + np.cumsum(tokens) - tokens
                columns = zip(starts.tolist(), tokens.tolist(), kinds.tolist(), strict=True)
                spans = [(offset, size, kind) for offset, size, kind in columns if kind >= 0]
            if any(size > room for _, size, _ in spans):
                reasons[number] = _OVER_LONG
                continue
            stops = cut_stream(int(lengths[number]), [(offset, size) for offset, size, _ in spans], room)
            rows += _rows(number, stops, spans)
        owner, part, start, tokens, pictures, audio = np.array(rows, np.int64).reshape(-1, 6).T
        share = labels[owner] * tokens // np.maximum(lengths[owner], 1)
        costs = tokens * self.work.token + pictures * self.work.image + audio * self.work.audio_token
        costs += self.work.attention(tokens, half.causal, start) + share * self.work.label
        sizes = np.stack([tokens, pictures, audio * pre.frames_per_token, np.zeros_like(tokens)], axis=1)
        return Units(reasons, owner, part, sizes, costs)

    def _tokens_and_costs(self, sizes: SampleSizes, lengths: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.sum([part.sum(axis=1) for part in lengths], axis=0)
        work = self.work
        costs = tokens * work.token + sizes.num_images * work.image + sizes.audio_tokens * work.audio_share
        costs = costs + sizes.image_tokens * work.image_token
        for half, part in zip(self.halves, lengths, strict=True):
            costs = costs + self.work.attention(part, half.causal).sum(axis=1) + half.labels(sizes) * self.work.label
        return tokens, costs


def _rows(owner: int, stops: Sequence[int], media: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """(owner, number, start, tokens, pictures, tokens of sound) of each piece of a stream, whose media are (offset, tokens, kind)."""
    start, at = 0, 0
    for number, stop in enumerate(stops):
        held = dict.fromkeys(range(len(MEDIA_KINDS)), 0)
        while at < len(media) and media[at][0] < stop:
            held[media[at][2]] += media[at][1] if media[at][2] else 1
            at += 1
        yield owner, number, start, stop - start, held[0], held[1]
        start = stop
