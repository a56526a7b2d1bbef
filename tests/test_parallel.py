"""How a batch is cut for sequence parallel, without processes: `tests/train/test_sequence_parallel.py` has those."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.errors import ConfigError
from mmctx.pack import PackedBatch, pack_documents
from mmctx.parallel.exchange import RowExchange
from mmctx.parallel.mesh import Mesh, build_mesh
from mmctx.parallel.shard import cut_evenly, shard_batch, share_items
from mmctx.parallel.ulysses import key_head_repeats
from mmctx.train.config import RunConfig

GROUP: Any = object()  # nothing is sent here


@pytest.fixture(params=["token", "mean"])
def batch(tree: dict[str, Any], request: pytest.FixtureRequest) -> PackedBatch:
    tree["objectives"]["similarity"]["pooling"] = request.param
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)
    documents = [d for number in (0, 1) for sample in range(2) for d in data.dataset.documents(number, sample, 0)]
    return pack_documents(documents, data.tokenizer.placeholder_ids)


def deliver(sent: list[Tensor], exchanges: list[RowExchange]) -> list[Tensor]:
    """What every rank receives when all send: an all-to-all in one process."""
    parcels = [rows.split(exchange.send) for rows, exchange in zip(sent, exchanges, strict=True)]
    received = [torch.cat([parcel[rank] for parcel in parcels]) for rank in range(len(sent))]
    for rank, exchange in enumerate(exchanges):
        assert exchange.receive == tuple(len(parcel[rank]) for parcel in parcels)
    return received


@pytest.mark.parametrize("size", [2, 3, 7, 200])
def test_parts_hold_all_of_a_batch_once(batch: PackedBatch, size: int) -> None:
    parts = [shard_batch(batch, rank, size, GROUP) for rank in range(size)]
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    sizes = [part.num_tokens for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert (0 in sizes) == (size > batch.num_tokens)
    starts = np.cumsum([0, *sizes])
    for part in parts:
        assert part.layout.shards is not None
        assert part.layout.shards.sizes == tuple(sizes)
        assert part.layout.lengths == batch.layout.lengths
    for name, positions in batch.label_positions.items():
        found = [
            part.label_positions[name] + start
            for part, start in zip(parts, starts, strict=False)
            if name in part.label_positions
        ]
        assert torch.equal(torch.cat(found), positions)


@pytest.mark.parametrize("size", [2, 3, 7, 200])
def test_every_slot_gets_its_own_row_of_its_own_item(batch: PackedBatch, size: int) -> None:
    parts = [shard_batch(batch, rank, size, GROUP) for rank in range(size)]
    starts = np.cumsum([0, *[part.num_tokens for part in parts]])
    for kind, media in batch.media.items():
        shares = [part.media[kind] for part in parts]
        assert torch.equal(torch.cat([share.values for share in shares]), media.values)
        assert sum((share.num_tokens for share in shares), ()) == media.num_tokens
        assert sum((share.lengths for share in shares), ()) == media.lengths
        costs = [sum(share.num_tokens) for share in shares]
        assert max(costs) - sum(costs) / size <= max(media.num_tokens)
        encoded = torch.arange(sum(media.num_tokens)).split(costs)  # the output of an encoder that numbers its rows
        received = deliver(
            [rows[share.rows] for rows, share in zip(encoded, shares, strict=True)],
            [share.exchange for share in shares],
        )
        slots = torch.cat([share.slots + start for share, start in zip(shares, starts, strict=False)])
        filled = dict(zip(slots.tolist(), torch.cat(received).tolist(), strict=True))
        assert filled == dict(zip(media.slots.tolist(), media.rows.tolist(), strict=True))


@pytest.mark.parametrize("size", [2, 3, 7, 200])
def test_one_rank_compares_all_embeddings(batch: PackedBatch, size: int) -> None:
    parts = [shard_batch(batch, rank, size, GROUP) for rank in range(size)]
    states = torch.arange(batch.num_tokens).split([part.num_tokens for part in parts])
    lent = [part.lent for part in parts]
    received = deliver(
        [h[rows.positions] for h, rows in zip(states, lent, strict=True)], [rows.exchange for rows in lent]
    )
    (borrower,) = [rank for rank, part in enumerate(parts) if part.pooled]
    assert parts[borrower].pairs == batch.pairs
    assert parts[borrower].pool_sizes == batch.pool_sizes
    everything = torch.cat([states[borrower], received[borrower]])
    for name, positions in batch.pooled.items():
        assert torch.equal(everything[parts[borrower].pooled[name]], positions)
    assert all(not part.pairs for part in parts[:borrower] + parts[borrower + 1 :])


def test_items_are_shared_out_by_cost() -> None:
    assert cut_evenly(7, 3).tolist() == [0, 3, 5, 7]
    assert share_items((5, 5, 5, 5), 2).tolist() == [0, 2, 4]
    assert share_items((12, 1, 1, 1, 1), 2).tolist() == [0, 1, 5]
    assert share_items((3,), 4).tolist() in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(8, 4, 2), (8, 2, 4), (8, 1, 8), (12, 3, 2), (12, 3, 4), (6, 6, 3)]
)
def test_a_rank_gets_the_key_heads_that_its_query_heads_read(heads: int, kv_heads: int, size: int) -> None:
    repeats = key_head_repeats(heads, kv_heads, size)
    copies = torch.arange(kv_heads).repeat_interleave(repeats)
    assert len(copies) % size == 0
    for queries, keys in zip(torch.arange(heads).chunk(size), copies.chunk(size), strict=True):
        read = keys.repeat_interleave(len(queries) // len(keys))  # as attention pairs them
        assert torch.equal(read, queries // (heads // kv_heads))
    assert repeats == 1 or kv_heads % size


def test_sizes_that_do_not_fit_are_refused(tree: dict[str, Any]) -> None:
    tree["train"]["sequence_parallel"] = 3
    with pytest.raises(
        ConfigError, match=r"train.sequence_parallel=3 must divide model.transformer.num_heads=4.* 1, 2, 4"
    ):
        build_config(RunConfig, tree, "tree")
    with pytest.raises(ConfigError, match=r"train.sequence_parallel=2 .* multiple of it, found 3; start 4"):
        build_mesh("cpu", rank=0, world_size=3, sequence_size=2)


def test_alone_nothing_changes(batch: PackedBatch) -> None:
    mesh = build_mesh("cpu", rank=1, world_size=3, sequence_size=1)
    assert mesh == Mesh(data_rank=1, data_size=3)
    assert mesh.shard(batch) is batch
    assert mesh.once([1, 2]) == [1, 2]
    assert Mesh(sequence_rank=1, sequence_size=2).once([1, 2]) == [0, 0]
