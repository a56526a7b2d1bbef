"""Puts the data side of a run together: tokenizer, index, sizes, dataset."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mmctx.datasets.config import DataConfig, SourceConfig
from mmctx.datasets.fetch import PackedDataset
from mmctx.datasets.planning.table import Preprocessors, SourceTable
from mmctx.datasets.shards.index import expand_shards, index_shards
from mmctx.datasets.shards.quarantine import Quarantine
from mmctx.datasets.shards.source import Source
from mmctx.encoders.audio_front_end import AudioPreprocessor
from mmctx.encoders.image import ImagePreprocessor
from mmctx.flops import estimate_work
from mmctx.model import ModelConfig
from mmctx.objectives import AnyObjective, build_data_halves
from mmctx.pack import Skip
from mmctx.tokenizer import TextTokenizer

Progress = Callable[[int, int], None]
_CHUNK = 1 << 16


@dataclass(frozen=True)
class RunData:
    """The data side of a run.

    Attributes:
        config: sizes.
        tokenizer: with the special tokens.
        dataset: `dataset[bin]` is a packed batch.
        quarantine: samples that no plan may use.
    """

    config: DataConfig
    tokenizer: TextTokenizer
    dataset: PackedDataset
    quarantine: Quarantine

    @property
    def tables(self) -> dict[str, SourceTable]:
        """What a plan packs, by the name of the source."""
        return {table.source.name: table for table in self.dataset.tables}

    def only(self, objective: str) -> RunData:
        """The same samples, making the documents of one objective alone; sources that do not serve it drop out."""
        tables = [table.only(objective) for table in self.dataset.tables if objective in table.config.objectives]
        return RunData(self.config, self.tokenizer, self.dataset.with_tables(tables), self.quarantine)

    def left_out(self) -> Iterator[Skip]:
        """Every sample that the index or its sizes rule out; looks at all of them."""
        for number, table in enumerate(self.dataset.tables):
            for start in range(0, table.num_samples, _CHUNK):
                reasons = table.units(np.arange(start, min(start + _CHUNK, table.num_samples))).reasons
                for local in np.flatnonzero(reasons).tolist():
                    yield self.dataset.left_out(number, start + local, int(reasons[local]))

    @property
    def fingerprints(self) -> dict[str, str]:
        """Name the content of the tokenizer ("") and of each source's shards: what a plan depends on beside the configuration, wherever the
        files lie.
        """
        found = {"": self.tokenizer.fingerprint}
        for source, _ in self.dataset.sources:
            content = str([shard.content_hash for shard in source.shards]).encode()
            found[source.name] = hashlib.blake2b(content, digest_size=8).hexdigest()
        return found


def build_preprocessors(config: ModelConfig) -> Preprocessors:
    """What turns decoded media into items, by the model's encoders."""
    image = ImagePreprocessor(config.image) if config.image else None
    audio = AudioPreprocessor(config.audio) if config.audio else None
    return Preprocessors(
        image=image,
        audio=audio,
        image_tokens=image.num_tokens if image else _no_tokens,
        audio_tokens=audio.num_tokens if audio else _no_tokens,
        frames_per_token=config.audio.frames_per_token if config.audio else 1,
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
        ConfigError: the tokenizer cannot be loaded, or a source names an objective that is not defined.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are the parallelism
    tokenizer = TextTokenizer(data.tokenizer, data.bos)
    halves = build_data_halves(objectives, tokenizer)
    preprocessors, work = build_preprocessors(model), estimate_work(model, len(tokenizer))
    quarantine = Quarantine.load(data.quarantine) if data.quarantine else Quarantine(())
    tables = []
    for name, config in sorted(sources.items()):  # by name: the order of keys in a YAML file means nothing
        found = expand_shards(config.shards, data.remote_cache)
        shards = index_shards(found, tokenizer, config.texts, progress=progress)
        source = Source(name, shards, config.texts, quarantine)
        tables.append(SourceTable(source, config, preprocessors, halves, work, data))
    dataset = PackedDataset(tables, halves, tokenizer, seed, data.cache_mb)
    return RunData(data, tokenizer, dataset, quarantine)
