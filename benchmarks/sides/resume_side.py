"""The first batch from batch K on, in a fresh process: `resume_side.py ours|accelerate FOLDER BATCH_SIZE K OUT`.

What a resumed run would do, without its imports. Ours leaves the tensors of its batch in OUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from our_side import build, loader_from
from stopwatch import Laps

from mmctx.pack import PackedBatch


def tensors(batch: PackedBatch) -> list[torch.Tensor]:
    """What must be equal, bit for bit."""
    return [batch.input_ids, batch.labels, batch.position_ids, batch.media["image"].values]


def ours(folder: Path, batch_size: int, k: int, out: Path) -> None:
    laps = Laps()
    data = build(folder, batch_size)
    laps.lap("build")
    batch = next(iter(loader_from(data, k)))
    laps.lap("seek")
    torch.save(tensors(batch), out)
    print(json.dumps(laps.times))


def accelerate(folder: Path, batch_size: int, k: int) -> None:
    """webdataset without shuffling through a DataLoader, open_clip's transform and tokenizer."""
    import open_clip
    import webdataset
    from accelerate import skip_first_batches

    laps = Laps()
    tokenize, transform = open_clip.SimpleTokenizer(), open_clip.image_transform(224, is_train=True)
    shards = sorted(map(str, folder.glob("*.tar")))
    samples = webdataset.WebDataset(shards, shardshuffle=False).repeat().decode("pil").to_tuple("jpg", "txt")
    batches = samples.map_tuple(transform, lambda text: tokenize(text)[0]).batched(batch_size)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=0)  # type: ignore[arg-type]
    laps.lap("build")
    next(iter(skip_first_batches(loader, k)))
    laps.lap("seek")
    print(json.dumps(laps.times))


def main() -> None:
    torch.set_num_threads(1)
    side, folder, batch_size, k = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if side == "ours":
        ours(folder, batch_size, k, Path(sys.argv[5]))
    else:
        accelerate(folder, batch_size, k)


if __name__ == "__main__":
    main()
