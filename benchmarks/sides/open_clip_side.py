"""open_clip's own training pipeline for image-text shards: `open_clip_side.py FOLDER NUM_SHARDS NUM_SAMPLES BATCH_SIZE STEADY`."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import open_clip
import torch
from open_clip_train.data import get_wds_dataset
from stopwatch import measure


def main() -> None:
    folder, num_shards, num_samples, batch_size, steady = Path(sys.argv[1]), *map(int, sys.argv[2:])
    torch.set_num_threads(1)

    def batches():
        arguments = Namespace(
            train_data=str(folder / f"photos-{{0000..{num_shards - 1:04d}}}.tar"),
            train_num_samples=max(num_samples, steady + 2 * batch_size),  # what it calls an epoch
            train_data_upsampling_factors=None,
            dataset_resampled=False,
            seed=0,
            workers=0,
            world_size=1,
            batch_size=batch_size,
        )
        transform = open_clip.image_transform(224, is_train=True)
        return get_wds_dataset(arguments, transform, is_train=True, tokenizer=open_clip.SimpleTokenizer()).dataloader

    measure(batches, lambda batch: len(batch[0]), steady)


if __name__ == "__main__":
    main()
