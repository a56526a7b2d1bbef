"""From a planned bin to a `PackedBatch`: read byte ranges, decode, let each objective make its documents, pack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mmctx.datasets.augment.sample import Augmentation
from mmctx.datasets.config import DataConfig, SourceConfig
from mmctx.datasets.decode import decode_sample
from mmctx.datasets.planning.order import derive_key
from mmctx.datasets.planning.plan import Bin, Plan, share_out
from mmctx.datasets.planning.split import piece_of
from mmctx.datasets.planning.table import SourceTable
from mmctx.datasets.shards.contents import REASONS
from mmctx.datasets.shards.source import Source
from mmctx.datasets.workers import ReadingBoard, StartWorker, WatchedLoader
from mmctx.errors import ConfigError, SampleError
from mmctx.objectives import DataHalf
from mmctx.pack import IGNORE_INDEX, Document, PackedBatch, Skip, pack_documents
from mmctx.sample import Sample, make_uid
from mmctx.tokenizer import TextTokenizer


class PackedDataset(Dataset[PackedBatch]):
    """`dataset[bin]` is the packed batch of that bin.

    A sample that cannot be read or decoded is left out and travels along as a `Skip`; the rest of the bin is unchanged.

    Args:
        tables: of each source, in the plan's order.
        objectives: data halves by name.
        tokenizer: with the special tokens.
        seed: the run's.
        cache_mb: MiB of decoded samples to keep.
    """

    def __init__(
        self,
        tables: Sequence[SourceTable],
        objectives: Mapping[str, DataHalf],
        tokenizer: TextTokenizer,
        seed: int,
        cache_mb: int = 0,
    ) -> None:
        self.tables, self.objectives = list(tables), dict(objectives)
        self.tokenizer, self.seed, self.cache_mb = tokenizer, seed, cache_mb
        augment = [table.config.augment for table in self.tables]
        self._augmentations = [
            config and Augmentation(config, table.preprocessors, tokenizer)
            for config, table in zip(augment, self.tables, strict=True)
        ]
        self._cache: dict[tuple[object, ...], Sample] = {}  # by `_place`
        self._cache_room = cache_mb << 20
        self.undecodable: dict[tuple[str, str], Skip] = {}  # by shard and key: what this process came across
        self.note_reading: Callable[[int, int], None] = _nobody_asks  # loader processes say what they read

    @property
    def sources(self) -> list[tuple[Source, SourceConfig]]:
        """The sources, in the plan's order."""
        return [(table.source, table.config) for table in self.tables]

    def __getitem__(self, bin: Bin) -> PackedBatch:
        documents: list[Document] = []
        skips: list[Skip] = []
        for source_number, sample_id, *_ in bin.samples[:1]:
            self.note_reading(source_number, sample_id)  # remote shards are asked for all of the bin at once
        self._prefetch(bin)
        for source_number, sample_id, epoch, part in bin.samples:
            try:
                documents += self.documents(source_number, sample_id, epoch, part, bin.step)
            except SampleError as error:
                skips.append(self.note(source_number, sample_id, error))
        used = len(bin.samples) - len(skips)
        left_out = [self.left_out(*entry) for entry in bin.left_out]
        return pack_documents(documents or [self._nothing()], self.tokenizer.placeholder_ids, skips, used, left_out)

    def documents(
        self, source_number: int, sample_id: int, epoch: int, part: int = 0, step: int | None = None
    ) -> list[Document]:
        """All documents of one sample, or of one part of a sample that is split, of every objective of its source, at a global step.

        Raises:
            SampleError: the sample cannot be decoded or lacks what an objective needs.
        """
        table, augmentation = self.tables[source_number], self._augmentations[source_number]
        sample = self.sample(source_number, sample_id)
        drawn_from = (self.seed, "augment", table.source.name, sample.key, epoch)
        if augmentation is not None:
            sample = augmentation.sample(sample, derive_key(*drawn_from))
        piece, part = (part, 0) if table.is_stream else (0, part)  # the document is the same whichever piece is read
        parts = table.parts(sample)
        if part >= len(parts):
            raise SampleError("over_long", f"the index promises part {part}, the sample makes {len(parts)}")
        found: list[Document] = []
        for name in table.config.objectives:
            rng = np.random.default_rng(derive_key(self.seed, name, table.source.name, sample.key, epoch, part))
            documents = self.objectives[name].documents(parts[part], rng, step)
            if not documents and len(parts) == 1:
                raise SampleError("missing_member", f"objective {name!r} finds nothing to learn from in this sample")
            if augmentation is not None:
                documents = [
                    augmentation.document(document, derive_key(*drawn_from, part, name, number))
                    for number, document in enumerate(documents)
                ]
            found += (
                [piece_of(d, piece, table.data.context_length) for d in documents] if table.is_stream else documents
            )
        return found

    def note(self, source_number: int, sample_id: int, error: SampleError) -> Skip:
        """Remembers a sample that could not be used, in `undecodable` and as the line for the ledger."""
        skip = self._skip(source_number, sample_id, error.reason, error.detail)
        self.undecodable[skip.shard, skip.key] = skip
        return skip

    def left_out(self, source_number: int, sample_id: int, code: int) -> Skip:
        """The line for the ledger of a sample that the index or its sizes rule out."""
        detail = self.tables[source_number].explain(sample_id, code)
        return self._skip(source_number, sample_id, REASONS[code], detail)

    def describe(self, source_number: int, sample_id: int) -> str:
        """Names a sample to people."""
        source = self.tables[source_number].source
        shard, key = source.locate(sample_id)
        return f"sample {key!r} of source {source.name!r} in {shard}"

    def _skip(self, source_number: int, sample_id: int, reason: str, detail: str) -> Skip:
        source = self.tables[source_number].source
        shard, key = source.locate(sample_id)
        return Skip(source=source.name, shard=str(shard), key=key, reason=reason, detail=detail)

    def with_tables(self, tables: Sequence[SourceTable]) -> PackedDataset:
        """Other objectives or fewer sources over the same shards; what was decoded already is shared."""
        other = PackedDataset(tables, self.objectives, self.tokenizer, self.seed, self.cache_mb)
        other._cache, other._cache_room = self._cache, self._cache_room
        other.undecodable = self.undecodable
        return other

    def sample(self, source_number: int, sample_id: int) -> Sample:
        """The decoded sample, from the cache if it is there. What no longer fits is decoded anew each time: a set is read round and round,
        so making room would only throw out what is wanted next.
        """
        table, augmentation = self.tables[source_number], self._augmentations[source_number]
        place = self._place(source_number, sample_id)
        if (known := self._cache.get(place)) is not None:
            return known
        self.note_reading(source_number, sample_id)
        pre = table.preprocessors
        make_image, make_audio = (pre.image, pre.audio) if augmentation is None else augmentation.makers
        sample = decode_sample(
            table.source.read(sample_id),
            source=table.source.name,
            uid=make_uid(source_number, sample_id),
            texts=table.config.texts,
            tokenizer=self.tokenizer,
            make_image=make_image,
            make_audio=make_audio,
        )
        if (size := sample.num_bytes) <= self._cache_room:
            self._cache[place] = sample
            self._cache_room -= size
        return sample

    def _place(self, source_number: int, sample_id: int) -> tuple[object, ...]:
        """Where the cache holds a sample: by number (a uid holds it) and name of its source, and by what is kept of its media."""
        augmentation = self._augmentations[source_number]
        raw = (False, False) if augmentation is None else augmentation.raw
        return source_number, self.tables[source_number].source.name, sample_id, raw

    def _prefetch(self, bin: Bin) -> None:
        """Asks for all that a bin needs of remote shards at once: one after the other, each sample would wait for its server."""
        for number, (source, _) in enumerate(self.sources):
            drawn = [i for owner, i, _, _ in bin.samples if owner == number]
            wanted = [i for i in drawn if self._place(number, i) not in self._cache]
            source.prefetch(wanted)

    def _nothing(self) -> Document:
        """Stands in when every sample of a bin was skipped, so that the rank still takes part in the step."""
        token = np.array([self.tokenizer.eos_id])
        return Document(next(iter(self.objectives)), token, np.full_like(token, IGNORE_INDEX), causal=True)


class StepSampler(Sampler[Bin]):
    """This rank's bins, step after step, from `first_step` up to `last_step`; see `plan.share_out`."""

    def __init__(self, plan: Plan, first_step: int, last_step: int, rank: int = 0, world_size: int = 1) -> None:
        bins = plan.config.bins_per_step
        if bins % world_size:
            fitting = [count for count in range(1, bins + 1) if bins % count == 0]
            raise ConfigError(
                f"data.bins_per_step={bins} cannot be shared out evenly among {world_size} processes; start "
                f"{' or '.join(map(str, fitting))} of them, or set data.bins_per_step={-(-bins // world_size) * world_size}; "
                "the processes of a sequence parallel group count as one"
            )
        self.plan, self.first_step, self.last_step = plan, first_step, last_step
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Bin]:
        for step in range(self.first_step, self.last_step):
            yield from (bin for _, bin in share_out(self.plan.step(step), self.rank, self.world_size))


def make_loader(
    dataset: PackedDataset, bins: Sampler[Bin] | Sequence[Bin], config: DataConfig
) -> DataLoader[PackedBatch] | WatchedLoader:
    """A standard DataLoader over bins. It never goes through `accelerator.prepare`, which would shard it a second time.

    Iterating it raises DataError, with the sample, for a worker that hangs or dies.
    """
    pinned = torch.cuda.is_available()
    if not config.num_workers:
        return DataLoader(dataset, batch_size=None, sampler=bins, pin_memory=pinned)
    board = ReadingBoard(config.num_workers)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=bins,
        num_workers=config.num_workers,
        prefetch_factor=config.prefetch,
        pin_memory=pinned,
        timeout=config.worker_timeout or 0,
        worker_init_fn=StartWorker(board),
    )
    return WatchedLoader(loader, board)


def _nobody_asks(source_number: int, sample_id: int) -> None:
    """Stands for a reader of `note_reading` where there is none."""
