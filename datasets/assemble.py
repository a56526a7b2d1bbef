"""Puts the data side of a run together: tokenizer, index, sizes, dataset."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mmctx.datasets.config import DataConfig, SourceConfig
from mmctx.datasets.fetch import PackedDataset, Preprocessors, tabulate
from mmctx.datasets.index import expand_shards, index_shards
from mmctx.datasets.plan import SampleTable
from mmctx.datasets.source import Source
from mmctx.encoders.audio import AudioPreprocessor
from mmctx.encoders.image import ImagePreprocessor
from mmctx.model import ModelConfig
from mmctx.objectives import AnyObjective, build_data_halves
from mmctx.pack import Skip
from mmctx.tokenizer import TextTokenizer

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RunData:
    """The data side of a run.

    Attributes:
        config: sizes.
        tokenizer: with the special tokens.
        dataset: `dataset[bin]` is a packed batch.
        tables: usable samples of each source.
        skips: samples that the index or the sizes rule out.
    """

    config: DataConfig
    tokenizer: TextTokenizer
    dataset: PackedDataset
    tables: Mapping[str, SampleTable]
    skips: tuple[Skip, ...]

    def only(self, objective: str) -> RunData:
        """The same samples, making the documents of one objective alone; sources that do not serve it drop out."""
        kept = [
            (source, config.model_copy(update={"objectives": (objective,)}))
            for source, config in self.dataset.sources
            if objective in config.objectives
        ]
        return _tabulated(self.config, self.dataset.with_sources(kept))

    @property
    def fingerprint(self) -> str:
        """Names the content of shards and tokenizer: what a plan depends on beside the configuration, wherever the files lie."""
        digest = hashlib.blake2b(self.tokenizer.fingerprint.encode(), digest_size=8)
        for source, _ in self.dataset.sources:
            digest.update(f"{source.name}:{[shard.content_hash for shard in source.shards]}".encode())
        return digest.hexdigest()


def build_preprocessors(config: ModelConfig) -> Preprocessors:
    """What turns decoded media into items, by the model's encoders."""
    image = ImagePreprocessor(config.image) if config.image else None
    audio = AudioPreprocessor(config.audio) if config.audio else None
    return Preprocessors(
        image=image,
        audio=audio,
        image_tokens=image.num_tokens if image else _no_tokens,
        audio_tokens=audio.num_tokens if audio else _no_tokens,
    )


def _no_tokens(a, b):
    """A modality without an encoder takes no place: its members are not read."""
    return 0 * a


def build_data(
    data: DataConfig,
    sources: Mapping[str, SourceConfig],
    model: ModelConfig,
    objectives: Mapping[str, AnyObjective],
    seed: int,
    progress: Progress | None = None,
) -> RunData:
    """Everything between the shards of `sources` and packed batches; indexes what is not indexed yet.

    Raises:
        DataError: a shard is missing or damaged.
        ConfigError: the tokenizer cannot be loaded.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are the parallelism
    tokenizer = TextTokenizer(data.tokenizer)
    opened = []
    for name, config in sorted(sources.items()):  # by name: the order of keys in a YAML file means nothing
        found = expand_shards(config.shards, data.remote_cache)
        shards = index_shards(found, tokenizer, config.texts, progress=progress)
        opened.append((Source(name, shards, config.texts), config))
    halves = build_data_halves(objectives, tokenizer)
    dataset = PackedDataset(opened, build_preprocessors(model), halves, tokenizer, seed, data.cache_mb)
    return _tabulated(data, dataset)


def _tabulated(data: DataConfig, dataset: PackedDataset) -> RunData:
    tables: dict[str, SampleTable] = {}
    skips: list[Skip] = []
    for source, config in dataset.sources:
        tables[source.name], left_out = tabulate(source, config, dataset.preprocessors, dataset.objectives, data)
        skips += left_out
    return RunData(data, dataset.tokenizer, dataset, tables, tuple(skips))
