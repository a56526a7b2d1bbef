"""From bins to batches: what is skipped, what is cached, what stands in when nothing is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import book, png, words, write_shard

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.datasets.planning.plan import Bin, Plan
from mmctx.errors import ConfigError
from mmctx.pack import Document, PackedBatch
from mmctx.train.config import RunConfig


def open_data(tree: dict[str, Any]) -> RunData:
    config = build_config(RunConfig, tree, "tree")
    return build_data(config.data, config.data.sources, config.model, config.objectives, config.train.seed)


def with_shard(tree: dict[str, Any], path: Path, samples: list[dict[str, Any]], objectives: list[str]) -> RunData:
    write_shard(path, samples)
    tree["data"]["sources"] = {"s": {"shards": str(path), "objectives": objectives}}
    return open_data(tree)


def documents_of(data: RunData, source: str, sample_id: int) -> list[Document]:
    number = [s.name for s, _ in data.dataset.sources].index(source)
    return data.dataset.documents(number, sample_id, epoch=0)


def same(a: PackedBatch, b: PackedBatch) -> bool:
    media = all(torch.equal(a.media[kind].values, b.media[kind].values) for kind in a.media)
    return torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels) and media and a.keys == b.keys


def test_every_unusable_sample_has_a_reason_and_the_rest_is_used(tree: dict[str, Any], tmp_path: Path) -> None:
    broken_book = book(1)
    broken_book["json"] = json.dumps({"segments": [{"text": "a"}, {"image": "77.png"}]}).encode()
    samples = [
        {"__key__": "good", "png": png(1), "txt": b"red cat"},
        {"__key__": "half", "png": png(2)[:20], "txt": b"red cat"},
        {"__key__": "silent", "flac": b"fLaC and nothing", "txt": b"red cat"},
        {"__key__": "wordless", "png": png(3)},
        {"__key__": "endless", "txt": words(1, 400).encode()},
        {"__key__": "unnamed", **{k: v for k, v in broken_book.items() if k != "__key__"}},
        {"__key__": "syntax", "json": b"{", "png": png(4), "txt": b"red cat"},
    ]
    data = with_shard(tree, tmp_path / "s.tar", samples, ["captioning"])
    found = {skip.key: skip for skip in data.left_out()}
    assert {key: skip.reason for key, skip in found.items()} == {
        "half": "undecodable_image",
        "silent": "undecodable_audio",
        "wordless": "missing_member",
        "endless": "over_long",
        "unnamed": "missing_member",
        "syntax": "bad_json",
    }
    assert "77.png" in found["unnamed"].detail
    assert "context_length=128" in found["endless"].detail
    assert all(skip.shard.endswith("s.tar") and skip.source == "s" and skip.detail for skip in found.values())
    batch = data.dataset[Plan(data.config, data.tables, 0).step(0)[0]]
    assert set(batch.keys) == {"good"}


def test_a_bin_of_which_nothing_can_be_decoded_is_still_a_batch(tree: dict[str, Any], tmp_path: Path) -> None:
    picture = png(5)
    hollow = picture[:60] + bytes(len(picture) - 60)  # the header is whole, the pixels are not
    data = with_shard(tree, tmp_path / "s.tar", [{"__key__": "hollow", "png": hollow, "txt": b"red"}], ["captioning"])
    assert not list(data.left_out())
    batch = data.dataset[Bin(((0, 0, 0, 0),), 1, 1)]
    assert [skip.reason for skip in batch.skips] == ["undecodable_image"]
    assert batch.num_tokens == 1
    assert batch.num_samples == 0
    assert not batch.label_positions


def test_batches_depend_on_bin_and_seed_alone(tree: dict[str, Any]) -> None:
    one, other = open_data(tree), open_data(tree)
    bins = Plan(one.config, one.tables, 1).step(2)
    other.dataset[bins[1]]  # whatever was read before
    for bin in bins:
        assert same(one.dataset[bin], other.dataset[bin])


def test_the_cache_changes_nothing_and_keeps_its_bound(tree: dict[str, Any]) -> None:
    plain = open_data(tree)
    tree["data"]["cache_mb"] = 1
    cached = open_data(tree)
    plan = Plan(plain.config, plain.tables, 1)
    for step in (0, 1, 0):
        for bin in plan.step(step):
            assert same(plain.dataset[bin], cached.dataset[bin])
    held = sum(sample.num_bytes for sample in cached.dataset._cache.values())
    assert 0 < held <= 1 << 20
    assert not plain.dataset._cache


def test_samples_of_two_sources_stay_apart_when_a_suite_reads_one_objective(tree: dict[str, Any]) -> None:
    """`only` may leave sources out and number the rest anew; the shared cache must not mix up whose sample is whose."""
    shards = tree["data"]["sources"]["triples"]["shards"]
    tree["data"] |= {"cache_mb": 64}
    tree["data"]["sources"] = {
        "a": {"shards": shards, "objectives": ["captioning"]},
        "b": {"shards": shards, "objectives": ["captioning", "similarity"]},
        "c": {"shards": shards, "objectives": ["captioning", "similarity"]},
    }
    data = open_data(tree)
    data.dataset.documents(1, 0, epoch=0)  # b's sample is cached under number 1, which will be c's
    alone = data.only("similarity").dataset
    pairs = {name: alone.documents(number, 0, 0)[0].pair for number, name in enumerate("bc")}
    assert pairs["b"] != pairs["c"]


@pytest.mark.parametrize("missing", ["image", "audio"])
def test_a_model_without_an_encoder_leaves_that_modality_out(tree: dict[str, Any], missing: str) -> None:
    tree["model"][missing] = None
    data = open_data(tree)
    batch = data.dataset[Plan(data.config, data.tables, 0).step(0)[0]]
    assert set(batch.media) == {"image", "audio"} - {missing}
    assert missing not in batch.pooled


def test_a_text_only_run(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["model"] |= {"image": None, "audio": None}
    samples = [{"__key__": f"{n}", "txt": words(n, 9).encode()} for n in range(20)]
    data = with_shard(tree, tmp_path / "s.tar", samples, ["captioning", "masked_lm"])
    batch = data.dataset[Plan(data.config, data.tables, 0).step(0)[0]]
    assert not batch.media
    assert set(batch.objectives) == {"captioning", "masked_lm"}


def test_an_undefined_objective_is_named(tree: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="typo"):
        open_data(tree).only("captioning").tables["triples"].only("typo")


def test_a_retrained_tokenizer_is_counted_anew(tree: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    """Counts belong to a tokenizer's fingerprint: lengths in the plan follow the tokenizer in use."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    before = open_data(tree)
    bytes_only = Tokenizer.from_file(str(corpus / "tokenizer" / "tokenizer.json"))
    bytes_only.model = type(bytes_only.model)(
        vocab={k: v for k, v in bytes_only.get_vocab().items() if v < 257}, merges=[]
    )
    PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|endoftext|>").save_pretrained(str(tmp_path / "t"))
    tree["data"]["tokenizer"] = str(tmp_path / "t")
    after = open_data(tree)
    ids = np.arange(after.tables["triples"].num_samples)
    tokens = after.tables["triples"].units(ids).sizes[:, 0]
    assert (tokens > before.tables["triples"].units(ids).sizes[:, 0]).all()
    made = sum(len(d.input_ids) for d in documents_of(after, "triples", 0))
    assert made == tokens[0]


def test_triples_give_documents_of_all_their_objectives(tree: dict[str, Any]) -> None:
    data = open_data(tree)
    documents = documents_of(data, "triples", 0)
    assert [d.objective for d in documents].count("captioning") == 2
    assert {d.view for d in documents if d.view} == {"image", "audio", "text0", "text1"}
    assert len({d.pair for d in documents if d.view}) == 1
    assert {d.key for d in documents} == {"triple0000"}
