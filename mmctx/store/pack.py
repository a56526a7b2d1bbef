"""Documents behind their nearest neighbours, as shards: what a run reads in one context is decided here, before it is planned.

A build step and no option of the plan, so that the batch of step N stays a function of config, index, seed and N. With loss on everything
this is retrieval-ordered pretraining (after In-Context Pretraining, Shi et al. 2023, which chains each document once; here each comes once
as itself, behind its k nearest); with loss on the answer alone it is what a model that answers from a store is trained on (RAG, Lewis et
al. 2020; REALM, Guu et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmctx.datasets.build.members import LeftOut, Medium, Members, Rendered, encode_json, safe_key
from mmctx.datasets.build.rows import stamp
from mmctx.datasets.build.stream import Item
from mmctx.datasets.build.writer import BuildOptions, Source, build_shards
from mmctx.datasets.shards.index import expand_shards
from mmctx.errors import ConfigError, DataError, SampleError
from mmctx.store.encoders.base import Encoder
from mmctx.store.entries import Document, Part
from mmctx.store.ingest import chunks
from mmctx.store.read import Inputs
from mmctx.store.recall import segments_of
from mmctx.store.store import Store

Learned = Literal["all", "own", "answer"]
"""Texts that causal objectives predict: all, those of the document itself, or its last one."""
_AT_ONCE = 64


def pack_neighbours(
    store: Store,
    shards: str,
    out: Path,
    open_encoder: Callable[[], Encoder],
    *,
    neighbours: int = 3,
    learned: Learned = "all",
    among: str | None = None,
    texts: tuple[str, ...] = ("txt",),
    options: BuildOptions | None = None,
) -> dict[str, Any]:
    """Shards of interleaved documents: each sample of `shards` behind the documents of a store that are nearest to it.

    The search is exact, so that the same store gives the same bytes. A document that shows the same as the sample is not taken, whatever
    its id. With `learned="answer"` the last text of a sample, the answer, does not ask: it would find itself.

    Args:
        store: holds the neighbours.
        shards: the samples.
        out: folder of the shards; see `build_shards`.
        open_encoder: the store's encoder, opened if the store has no vector of something.
        neighbours: documents in front of each sample, the nearest next to it.
        learned: what is predicted.
        among: the input of the store that neighbours come from: what `mmctx memory build` was given. By default `shards` itself; give the
            training shards where held-out samples are packed, and never the other way round.
        texts: of the samples, see `read.Inputs`.
        options: how shards are cut.

    Returns:
        As `build_shards`.

    Raises:
        DataError: the store holds nothing of that input.
        ConfigError: fewer than one neighbour is asked for.
    """
    if neighbours < 1:
        raise ConfigError(f"--neighbours {neighbours} should be at least 1")
    still, among = store.snapshot(), among or shards
    sources = still.sources()
    if among not in sources:
        raise DataError(
            f"{store.path}: holds nothing of the input {among!r}; it has {', '.join(map(repr, sources)) or 'none'}; add it, or name "
            "another one by --among"
        )
    inputs = Inputs(shards, texts)
    searcher = _Searcher(still, open_encoder, among, neighbours, learned)
    paths = [Path(str(path)) for path in expand_shards(shards)]
    source = Source(
        kind="packed",
        origin=shards,
        recipe=[stamp(paths), still.provenance.fingerprint, still.version, among, neighbours, learned, list(texts)],
        items=lambda split, start: _items(inputs, searcher, start),
        render=lambda item: _render(item, learned),
        total=inputs.total,
        facts={"store_version": still.version, "neighbours": neighbours, "learned": learned},
    )
    return build_shards(source, out, options or BuildOptions(num_workers=1))


class _Searcher:
    """Finds the neighbours of documents."""

    def __init__(
        self, store: Store, open_encoder: Callable[[], Encoder], among: str, neighbours: int, learned: Learned
    ) -> None:
        self._store, self._open, self._encoder = store, open_encoder, None
        self._among, self._count = among, neighbours
        self._learned: Learned = learned

    def near(self, documents: Sequence[Document]) -> list[list[Document]]:
        """For each document its neighbours, the nearest last."""
        asking = [_asking(document, self._learned) for document in documents]
        known = self._store.vectors("content", [part.content for parts in asking for part in parts])
        queries: list[np.ndarray] = []
        owners: list[int] = []
        for number, parts in enumerate(asking):
            for part in parts:
                vectors = known.get(part.content)
                if vectors is None and (made := self._embed(part)) is not None:
                    vectors = made[None]
                if vectors is not None:
                    queries.append(vectors[0])
                    owners.append(number)
        best: list[dict[str, float]] = [{} for _ in documents]
        if queries:
            self._search(np.stack(queries), owners, [document.shown for document in documents], best)
        names = [sorted(found, key=lambda id, f=found: (f[id], id))[-self._count :] for found in best]
        there = self._store.documents([id for mine in names for id in mine])
        return [[there[id] for id in mine] for mine in names]

    def _search(self, queries: np.ndarray, owners: list[int], shown: list[str], best: list[dict[str, float]]) -> None:
        """Fills `best`, id -> score, with at least as many documents as are wanted, or all there are."""
        k = 4 * (self._count + 1)
        while True:
            found = self._store.search(queries, k, source=self._among, exact=True)
            for owner, hits in zip(owners, found, strict=True):
                for hit in hits:
                    if hit.shown != shown[owner]:
                        best[owner][hit.id] = max(hit.score, best[owner].get(hit.id, -1.0))
            more = any(
                len(best[owner]) < self._count and len(hits) == k for owner, hits in zip(owners, found, strict=True)
            )
            if not more:
                return
            k *= 4

    def _embed(self, part: Part) -> np.ndarray | None:
        if part.kind not in self._store.provenance.kinds:
            return None
        if self._encoder is None:
            self._encoder = self._open()
            self._store.provenance.check(self._encoder.provenance, self._store.path)
        value = part.text if part.kind == "text" else part.media
        assert value is not None
        return self._encoder.embed([self._encoder.prepare(part.kind, value)])[0]


def _asking(document: Document, learned: Learned) -> list[Part]:
    """The parts that look for neighbours: all, but not the answer."""
    if learned != "answer":
        return list(document.parts)
    last = _answer(document)
    return [part for number, part in enumerate(document.parts) if number != last]


def _answer(document: Document) -> int:
    """Number of the last text; -1 where there is none."""
    return max((number for number, part in enumerate(document.parts) if part.kind == "text"), default=-1)


def _items(inputs: Inputs, searcher: _Searcher, start: int) -> Iterator[Item]:
    numbered = ((number, entry) for number, entry in enumerate(inputs) if number >= start)
    for chunk in chunks(numbered, _AT_ONCE):
        documents = [entry for _, entry in chunk if isinstance(entry, Document)]
        near = iter(searcher.near(documents))
        for _, entry in chunk:
            if isinstance(entry, LeftOut):
                yield Item(entry.key, entry)
            else:
                yield Item(safe_key(entry.id), (entry, next(near)))


def _render(item: Item, learned: Learned) -> Rendered:
    """The members of one packed document.

    Raises:
        SampleError: nothing is near it, it has no answer, or a medium of it cannot be read.
    """
    document, near = item.payload
    if not near:
        raise SampleError("no_neighbour", "nothing in the store can be compared with it")
    answer = _answer(document)
    if learned == "answer" and answer < 0:
        raise SampleError("no_text", "it has no text to predict")
    members: Members = {"__key__": item.key}
    segments: list[dict[str, Any]] = []
    for place, shown in enumerate([*near, document]):
        own = place == len(near)
        for number, (kind, value) in enumerate(segments_of(shown)):
            if isinstance(value, str):
                wanted = learned == "all" or (own and (learned == "own" or number == answer))
                segments.append({"text": value} if wanted else {"text": value, "loss": False})
            else:
                extension, data = Medium(kind, f"{shown.id}.{number}", data=value).member()  # type: ignore[arg-type]
                name = f"{len(members) - 1}.{extension}"
                members[name] = data
                segments.append({kind: name})
        if not own:
            segments.append({"text": "\n"} if learned == "all" else {"text": "\n", "loss": False})
    facts = {**document.facts, "neighbours": [shown.id for shown in near]}
    members["json"] = encode_json({**facts, "segments": segments})
    return Rendered(members)
