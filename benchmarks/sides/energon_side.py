"""Megatron-Energon with open_clip's transform and tokenizer: `energon_side.py FOLDER NUM_SHARDS NUM_SAMPLES BATCH_SIZE STEADY`.

Energon wants an index too: it is built at the first call and not timed, as ours is not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import open_clip
import torch
from megatron.energon import DefaultTaskEncoder, SampleDecoder, WorkerConfig, get_loader, get_train_dataset
from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator
from stopwatch import measure

ABOUT = """sample_type:
  __module__: megatron.energon
  __class__: CaptioningSample
field_map:
  image: jpg
  caption: txt
"""


class Encoder(DefaultTaskEncoder):
    """The same work as open_clip's pipeline does."""

    decoder = SampleDecoder(image_decode="pilrgb")

    def __init__(self) -> None:
        super().__init__()
        self.transform = open_clip.image_transform(224, is_train=True)
        self.tokenizer = open_clip.SimpleTokenizer()

    def encode_sample(self, sample):
        sample.image, sample.caption = self.transform(sample.image), self.tokenizer(sample.caption)[0]
        return sample


def prepare(folder: Path) -> None:
    if (folder / ".nv-meta" / "dataset.yaml").exists():
        return
    names = sorted(path.name for path in folder.glob("*.tar"))
    WebdatasetPreparator.prepare_dataset(folder, names, split_parts_ratio=[("train", 1.0)], workers=1)
    (folder / ".nv-meta" / "dataset.yaml").write_text(ABOUT)


def main() -> None:
    folder, batch_size, steady = Path(sys.argv[1]), int(sys.argv[4]), int(sys.argv[5])
    torch.set_num_threads(1)
    prepare(folder)

    def batches():
        dataset = get_train_dataset(
            folder,
            batch_size=batch_size,
            shuffle_buffer_size=100,
            max_samples_per_sequence=100,
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
            task_encoder=Encoder(),
        )
        return get_loader(dataset)

    measure(batches, lambda batch: len(batch.image), steady)


if __name__ == "__main__":
    main()
