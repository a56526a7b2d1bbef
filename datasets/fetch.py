"""From a planned bin to a `PackedBatch`: read byte ranges, decode, let each objective make its documents, pack."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mmctx.datasets.augment import augment
from mmctx.datasets.config import DataConfig, SourceConfig
from mmctx.datasets.decode import decode_sample
from mmctx.datasets.order import derive_key
from mmctx.datasets.plan import Bin, Plan, SampleTable
from mmctx.datasets.source import Source
from mmctx.errors import ConfigError, SampleError
from mmctx.objectives import DataHalf
from mmctx.pack import IGNORE_INDEX, Document, MediaItem, PackedBatch, Skip, pack_documents
from mmctx.sample import Sample, SampleSizes
from mmctx.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Preprocessors:
    """How media become items, and how many tokens they will be; None for a modality that the model has no encoder for.

    Attributes:
        image: picture (3, H, W) uint8 -> item.
        audio: clip (n,) float32 and its sample rate -> item.
        image_tokens: widths, heights (n,) -> tokens (n,).
        audio_tokens: numbers of samples, sample rates (n,) -> tokens (n,).
    """

    image: Callable[[Tensor], MediaItem] | None
    audio: Callable[[Tensor, int], MediaItem] | None
    image_tokens: Callable[[np.ndarray, np.ndarray], np.ndarray]
    audio_tokens: Callable[[np.ndarray, np.ndarray], np.ndarray]


class PackedDataset(Dataset[PackedBatch]):
    """`dataset[bin]` is the packed batch of that bin.

    A sample that cannot be read or decoded is left out and travels along as a `Skip`; the rest of the bin is unchanged.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, SourceConfig]],
        preprocessors: Preprocessors,
        objectives: Mapping[str, DataHalf],
        tokenizer: TextTokenizer,
        seed: int,
        cache_mb: int = 0,
    ) -> None:
        for source, config in sources:
            for name in config.objectives:
                if name not in objectives:
                    raise ConfigError(
                        f"data.sources.{source.name}.objectives: no objective {name!r}; there are {sorted(objectives)}"
                    )
        self.sources, self.preprocessors, self.objectives = list(sources), preprocessors, dict(objectives)
        self.tokenizer, self.seed, self.cache_mb = tokenizer, seed, cache_mb
        self._cache: dict[
            tuple[int, str, int], Sample
        ] = {}  # by number (a uid holds it) and name of the source, and sample
        self._cache_room = cache_mb << 20
        self.undecodable: list[Skip] = []  # what this process came across, as often as it did

    def __getitem__(self, bin: Bin) -> PackedBatch:
        documents: list[Document] = []
        skips: list[Skip] = []
        self._prefetch(bin)
        for source_number, sample_id, epoch in bin.samples:
            try:
                documents += self.documents(source_number, sample_id, epoch)
            except SampleError as error:
                skips.append(self.note(source_number, sample_id, error))
        used = len(bin.samples) - len(skips)
        return pack_documents(documents or [self._nothing()], self.tokenizer.placeholder_ids, skips, used)

    def documents(self, source_number: int, sample_id: int, epoch: int) -> list[Document]:
        """All documents of one sample, of every objective of its source.

        Raises:
            SampleError: the sample cannot be decoded or lacks what an objective needs.
        """
        source, config = self.sources[source_number]
        sample = self._sample(source_number, sample_id)
        if config.spec_augment is not None:
            rng = np.random.default_rng(derive_key(self.seed, "augment", source.name, sample.key, epoch))
            sample = augment(sample, config.spec_augment, rng)
        found: list[Document] = []
        for name in config.objectives:
            rng = np.random.default_rng(derive_key(self.seed, name, source.name, sample.key, epoch))
            documents = self.objectives[name].documents(sample, rng)
            if not documents:
                raise SampleError("missing_member", f"objective {name!r} finds nothing to learn from in this sample")
            found += documents
        return found

    def note(self, source_number: int, sample_id: int, error: SampleError) -> Skip:
        """Remembers a sample that could not be used, in `undecodable` and as the line for the ledger."""
        source = self.sources[source_number][0]
        shard, key = source.locate(sample_id)
        skip = Skip(source=source.name, shard=str(shard), key=key, reason=error.reason, detail=error.detail)
        self.undecodable.append(skip)
        return skip

    def with_sources(self, sources: Sequence[tuple[Source, SourceConfig]]) -> PackedDataset:
        """Other objectives or fewer sources over the same shards; what was decoded already is shared."""
        other = PackedDataset(sources, self.preprocessors, self.objectives, self.tokenizer, self.seed, self.cache_mb)
        other._cache, other._cache_room = self._cache, self._cache_room
        other.undecodable = self.undecodable
        return other

    def _sample(self, source_number: int, sample_id: int) -> Sample:
        """The decoded sample, from the cache if it is there. What no longer fits is decoded anew each time: a set is read round and round,
        so making room would only throw out what is wanted next.
        """
        source, config = self.sources[source_number]
        known = self._cache.get((source_number, source.name, sample_id))
        if known is not None:
            return known
        sample = decode_sample(
            source.read(sample_id),
            source=source.name,
            uid=source_number << 48 | sample_id,
            texts=config.texts,
            tokenizer=self.tokenizer,
            make_image=self.preprocessors.image,
            make_audio=self.preprocessors.audio,
        )
        if (size := sample.num_bytes) <= self._cache_room:
            self._cache[source_number, source.name, sample_id] = sample
            self._cache_room -= size
        return sample

    def _prefetch(self, bin: Bin) -> None:
        """Asks for all that a bin needs of remote shards at once: one after the other, each sample would wait for its server."""
        for number, (source, _) in enumerate(self.sources):
            wanted = [
                i for owner, i, _ in bin.samples if owner == number and (number, source.name, i) not in self._cache
            ]
            source.prefetch(wanted)

    def _nothing(self) -> Document:
        """Stands in when every sample of a bin was skipped, so that the rank still takes part in the step."""
        token = np.array([self.tokenizer.eos_id])
        return Document(next(iter(self.objectives)), token, np.full_like(token, IGNORE_INDEX), causal=True)


def tabulate(
    source: Source,
    config: SourceConfig,
    preprocessors: Preprocessors,
    objectives: Mapping[str, DataHalf],
    data: DataConfig,
) -> tuple[SampleTable, list[Skip]]:
    """Sizes of a source's usable samples, and a ledger line for each of the others."""
    ids = np.arange(source.num_samples)
    sizes: SampleSizes = source.sizes(ids, preprocessors.image_tokens, preprocessors.audio_tokens)
    by_objective = [objectives[name].lengths(sizes) for name in config.objectives]
    lengths = np.concatenate(by_objective, axis=1)  # (n, documents)
    tokens = lengths.sum(axis=1)
    # Attention's share of the work, in tokens: a document of context length costs about as much again as its other layers.
    costs = tokens + (lengths.astype(np.float64) ** 2).sum(axis=1) / max(data.context_length, 1)
    flags = source.flags(ids)
    reasons = np.full(len(ids), "", dtype=object)
    reasons[np.array([(part == 0).all(axis=1) for part in by_objective]).any(axis=0)] = "missing_member"
    reasons[lengths.max(axis=1, initial=0) > data.context_length] = "over_long"
    reasons[tokens > data.bin_tokens] = "over_long"
    for number in np.flatnonzero(flags):
        reasons[number] = source.flag_reason(int(flags[number]))
    problems = (
        {(shard.path, p.key): p.detail for shard in source.shards for p in shard.problems()} if flags.any() else {}
    )
    skips = []
    for number in np.flatnonzero(reasons != "").tolist():
        shard, key = source.locate(number)
        detail = problems.get((shard, key)) or _size_problem(lengths[number], data)
        skips.append(Skip(source=source.name, shard=str(shard), key=key, reason=str(reasons[number]), detail=detail))
    usable = np.flatnonzero(reasons == "")
    return SampleTable(usable, tokens[usable].astype(np.int64), costs[usable]), skips


def _size_problem(lengths: np.ndarray, data: DataConfig) -> str:
    made = (
        f"the objectives of this source would make documents of {lengths[lengths > 0].tolist()} tokens of this sample"
    )
    return f"{made}; allowed are data.context_length={data.context_length} each and data.bin_tokens={data.bin_tokens} together"


class StepSampler(Sampler[Bin]):
    """This rank's bins, step after step, from `first_step` up to `last_step`."""

    def __init__(self, plan: Plan, first_step: int, last_step: int, rank: int = 0, world_size: int = 1) -> None:
        bins = plan.config.bins_per_step
        if bins % world_size:
            fitting = [count for count in range(1, bins + 1) if bins % count == 0]
            raise ConfigError(
                f"data.bins_per_step={bins} cannot be shared out evenly among {world_size} processes; start "
                f"{' or '.join(map(str, fitting))} of them, or a new run with data.bins_per_step={-(-bins // world_size) * world_size}"
            )
        self.plan, self.first_step, self.last_step = plan, first_step, last_step
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Bin]:
        for step in range(self.first_step, self.last_step):
            yield from self.plan.step(step)[self.rank :: self.world_size]

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.plan.config.bins_per_step // self.world_size


def make_loader(dataset: PackedDataset, bins: Sampler[Bin] | Sequence[Bin], config: DataConfig) -> DataLoader:
    """A standard DataLoader over bins. It never goes through `accelerator.prepare`, which would shard it a second time."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=bins,
        num_workers=config.num_workers,
        prefetch_factor=config.prefetch if config.num_workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_interrupts,
    )


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group; workers must live until the run has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
