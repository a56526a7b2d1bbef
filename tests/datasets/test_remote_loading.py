"""Remote shards in many processes, and all the way to batches."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from far_shards import TEXTS, drop_blocks, open_source, same, write_big_shard
from make_shards import make_triples, write_shard
from torch.utils.data import DataLoader, Dataset
from typer.testing import CliRunner

from mmctx.cli import app
from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.datasets.fetch import StepSampler, make_loader
from mmctx.datasets.planning.plan import Plan
from mmctx.datasets.remote.block_cache import BLOCK_BYTES
from mmctx.datasets.shards.index import expand_shards, index_shards
from mmctx.datasets.shards.source import RawSample, Source
from mmctx.train.config import RunConfig

pytest.importorskip("aiohttp", reason="needs the extra `remote`")


class _Samples(Dataset):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return self.source.num_samples

    def __getitem__(self, number: int) -> RawSample:
        return self.source.read(number)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_workers_share_the_cache(nginx, root, cache, start):
    write_big_shard(root / "x.tar", count=200, size=40_000)
    source = open_source(f"{nginx.url}/x.tar", cache)
    local = open_source(str(root / "x.tar"), cache)
    drop_blocks(cache)
    source.read(199)  # the parent has a connection that its children must not use
    nginx.forget()
    loader = DataLoader(_Samples(source), batch_size=None, num_workers=2, multiprocessing_context=start)
    assert all(same(raw, local.read(number)) for number, raw in enumerate(loader))
    spans = [request.range for request in nginx.requests()]
    assert len(spans) == len(set(spans)) <= -(-(root / "x.tar").stat().st_size // BLOCK_BYTES)


@pytest.mark.slow
def test_processes_index_remote_shards(nginx, root, cache, tokenizer):
    paths = [write_shard(root / f"x-{n}.tar", make_triples(3, seed=n)) for n in range(3)]
    far = index_shards(expand_shards(nginx.url + "/x-{0..2}.tar", cache), tokenizer, TEXTS, num_workers=2)
    near = index_shards(paths, tokenizer, TEXTS)
    assert [index.content_hash for index in far] == [index.content_hash for index in near]


def open_data(tree: dict[str, Any]) -> RunData:
    config = build_config(RunConfig, tree, "tree")
    return build_data(config.data, config.data.sources, config.model, config.objectives, config.train.seed)


@pytest.mark.slow
def test_batches_are_those_of_local_shards(tree, nginx, root, tmp_path):
    near = open_data(tree)
    for name, count in (("triples", 2), ("books", 1)):
        source = tree["data"]["sources"][name]
        for shard in expand_shards(source["shards"]):
            shutil.copy(str(shard), root)
        source["shards"] = f"{nginx.url}/{name}-{{000000..{count - 1:06d}}}.tar"
    tree["data"] |= {"remote_cache_dir": str(tmp_path / "cache"), "num_workers": 1}
    far = open_data(tree)
    assert far.fingerprints == near.fingerprints
    plan = Plan(near.config, near.tables, 0)
    loader = make_loader(far.dataset, StepSampler(plan, 0, 3), far.config)
    for bin, batch in zip((b for step in range(3) for b in plan.step(step)), loader, strict=True):
        expected = near.dataset[bin]
        assert batch.keys == expected.keys
        assert torch.equal(batch.input_ids, expected.input_ids)
        assert all(torch.equal(batch.media[k].values, expected.media[k].values) for k in expected.media)


def test_the_command_indexes_remote_shards(nginx, root, tmp_path):
    write_shard(root / "x.tar", make_triples(3))
    command = ["data", "index", f"{nginx.url}/x.tar", "--json", "--remote-cache-dir", str(tmp_path / "cache")]
    result = CliRunner().invoke(app, command)
    assert json.loads(result.stdout)["samples"] == 3
    assert list((tmp_path / "cache" / "indexes").glob("x.tar-*.index/meta.json"))
