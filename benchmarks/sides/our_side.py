"""Ours, `dataset[bin]` through the loader: `our_side.py FOLDER NUM_SHARDS NUM_SAMPLES BATCH_SIZE STEADY uint8|float`."""

from __future__ import annotations

import sys
from pathlib import Path

import timm  # noqa: F401  # imports are not timed on any side: these two are otherwise left until they are needed
import torch
from stopwatch import measure
from transformers import PreTrainedTokenizerFast  # noqa: F401

from mmctx.datasets.assemble import RunData, build_data
from mmctx.datasets.config import DataConfig, SourceConfig
from mmctx.datasets.fetch import StepSampler, make_loader
from mmctx.datasets.planning.plan import Plan
from mmctx.encoders.image import ImageEncoderConfig, image_geometry
from mmctx.model import ModelConfig
from mmctx.objectives.captioning import CaptioningConfig
from mmctx.pack import PackedBatch

PICTURE = ImageEncoderConfig(name="vit_base_patch32_224", image_size=224)  # 49 tokens a picture


def build(folder: Path, batch_size: int) -> RunData:
    """The data side of a captioning run; a bin takes about `batch_size` samples."""
    config = DataConfig(
        tokenizer=str(folder / "tokenizer"),
        sources={"photos": SourceConfig(shards=str(folder / "*.tar"), objectives=("captioning",))},
        context_length=256,  # a picture of 49 tokens, a caption of at most 20
        bin_tokens=64 * batch_size,
        window_steps=4,
    )
    model = ModelConfig(image=PICTURE)
    return build_data(config, config.sources, model, {"captioning": CaptioningConfig()}, seed=0)


def loader_from(data: RunData, step: int = 0):
    """Batches from global step `step` on. All that this benchmark knows of plans stands here."""
    plan = Plan(data.config, data.tables, seed=0)
    return make_loader(data.dataset, StepSampler(plan, step, step + 1_000_000), data.config)


class Normaliser:
    """What the encoder does on the device otherwise, into memory that is used again for every batch."""

    def __init__(self) -> None:
        geometry = image_geometry(PICTURE)
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (geometry.mean, geometry.std))
        self.scale, self.shift, self.room = 1 / (255 * std), -mean / std, torch.empty(0)

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """(I, 3, S, S) uint8 -> float32 of mean 0 and deviation 1."""
        if len(self.room) < len(pictures):
            self.room = torch.empty(pictures.shape)
        for to, picture in zip(self.room, pictures, strict=False):  # one by one: a picture stays in the cache
            to.copy_(picture).mul_(self.scale).add_(self.shift)
        return self.room[: len(pictures)]


def main() -> None:
    folder, batch_size, steady, kind = Path(sys.argv[1]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6]
    torch.set_num_threads(1)
    normalise: Normaliser | None = None

    def make():
        nonlocal normalise
        data = build(folder, batch_size)
        normalise = Normaliser() if kind == "float" else None
        return loader_from(data)

    def use(batch: PackedBatch) -> int:
        if normalise is not None:
            normalise(batch.media["image"].values)
        return batch.num_samples

    measure(make, use, steady)


if __name__ == "__main__":
    main()
