"""What a source's samples are to a plan: limits of a bin, reasons and their explanations, the quarantine."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tiny import book, flac, png, words, write_shard

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.datasets.planning.plan import Bin, Plan
from mmctx.datasets.planning.table import SourceTable
from mmctx.datasets.shards.contents import REASONS
from mmctx.datasets.shards.quarantine import QuarantineEntry, write_quarantine
from mmctx.train.config import RunConfig


def open_data(tree: dict[str, Any]) -> RunData:
    config = build_config(RunConfig, tree, "tree")
    return build_data(config.data, config.data.sources, config.model, config.objectives, config.train.seed)


def with_shard(tree: dict[str, Any], path: Path, samples: list[dict[str, Any]], **source: Any) -> RunData:
    write_shard(path, samples)
    tree["data"]["sources"] = {"s": {"shards": str(path), "objectives": ["captioning"]} | source}
    return open_data(tree)


def epoch_of(plan: Plan, number: int = 0) -> list[Bin]:
    """The bins of the windows that hold an epoch; plans here have one source, or none with a weight."""
    first, stop = number * plan.num_samples, (number + 1) * plan.num_samples
    windows = range(first // plan.samples_per_window, -(-stop // plan.samples_per_window))
    steps = range(windows.start * plan.window_steps, windows.stop * plan.window_steps)
    return [bin for step in steps for bin in plan.step(step)]


def quarantine(tree: dict[str, Any], path: Path, data: RunData, source: str, numbers: list[int]) -> RunData:
    """The same data with some samples of a source's first shard held back."""
    shard = data.tables[source].source.shards[0]
    entries = [QuarantineEntry(str(shard.path), shard.content_hash, n, f"{n}", "bad_json", "") for n in numbers]
    write_quarantine(path, entries)
    tree["data"]["quarantine"] = str(path)
    return open_data(tree)


def text_samples(count: int) -> list[dict[str, Any]]:
    return [{"__key__": f"{n:04d}", "txt": words(n, 2 + n % 9).encode()} for n in range(count)]


def test_a_quarantined_sample_is_left_out_and_all_others_stay(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["data"] |= {"bin_tokens": 128, "block_size": 4, "blocks_in_flight": 3}
    free = with_shard(tree, tmp_path / "s.tar", text_samples(300))
    held = quarantine(tree, tmp_path / "q.jsonl", free, "s", [7, 150])
    plain, plan = (Plan(data.config, data.tables, 1) for data in (free, held))
    assert held.quarantine.fingerprint != free.quarantine.fingerprint
    everything, bins = epoch_of(plain), epoch_of(plan)
    before, after = (
        {sample for bin in found for _, sample, epoch, _ in bin.samples if epoch == 0} for found in (everything, bins)
    )
    assert before - after == {7, 150}
    assert not after - before
    batches = [held.dataset[bin] for bin in bins if bin.left_out]
    found = [skip for batch in batches for skip in batch.left_out]
    assert {(skip.source, skip.key, skip.reason) for skip in found} == {
        ("s", f"{n:04d}", "quarantined") for n in (7, 150)
    }
    assert all(skip.shard.endswith("s.tar") and skip.detail == "listed in data.quarantine" for skip in found)
    assert not any(batch.skips or {"0007", "0150"} & set(batch.keys) for batch in batches)


def test_a_quarantine_of_another_shard_holds_nothing_back(tree: dict[str, Any], tmp_path: Path) -> None:
    data = with_shard(tree, tmp_path / "s.tar", text_samples(20))
    entry = QuarantineEntry(str(tmp_path / "s.tar"), "another content", 3, "0003", "bad_json", "")
    write_quarantine(tmp_path / "q.jsonl", [entry])
    tree["data"]["quarantine"] = str(tmp_path / "q.jsonl")
    held = open_data(tree)
    assert not list(held.left_out())
    assert held.quarantine.unmatched([data.tables["s"].source.shards[0].content_hash]) == (entry,)
    assert Plan(held.config, held.tables, 1).step(1) == Plan(data.config, data.tables, 1).step(1)


def test_samples_left_out_come_once_an_epoch(tree: dict[str, Any], tmp_path: Path) -> None:
    samples = text_samples(60)
    for number in (0, 9, 31):
        samples[number]["txt"] = words(number, 400).encode()
    for number in (4, 59):
        samples[number]["txt"] = b" "
    tree["data"] |= {"bin_tokens": 128, "block_size": 4, "blocks_in_flight": 3}
    data = with_shard(tree, tmp_path / "s.tar", samples)
    data = quarantine(tree, tmp_path / "q.jsonl", data, "s", [22])
    expected = {0: "over_long", 9: "over_long", 31: "over_long", 4: "empty", 59: "empty", 22: "quarantined"}
    assert {int(skip.key): skip.reason for skip in data.left_out()} == expected
    plan = Plan(data.config, data.tables, 1)
    # Whole windows and whole epochs: nothing is counted twice, nothing at the edges is missed.
    windows = plan.num_samples
    left_out, read = Counter(), Counter()
    for step in range(windows * plan.window_steps):
        for bin in plan.step(step):
            left_out.update((sample, REASONS[code]) for _, sample, code in bin.left_out)
            read.update((sample, epoch) for _, sample, epoch, _ in bin.samples)
    epochs = plan.samples_per_window
    assert left_out == dict.fromkeys(expected.items(), epochs)
    assert read == {(n, epoch): 1 for n in set(range(60)) - set(expected) for epoch in range(epochs)}


def limited(data: RunData, **limits: int) -> RunData:
    """The same shards under other limits; what was decoded is kept."""
    config = data.config.model_copy(update=limits)
    tables = [
        SourceTable(t.source, t.config, t.preprocessors, t.objectives, t.work, config) for t in data.dataset.tables
    ]
    return RunData(config, data.tokenizer, data.dataset.with_tables(tables), data.quarantine)


def largest(data: RunData) -> dict[str, int]:
    """Most pictures, frames and pairs that a batch of one epoch holds, counted on the batches themselves."""
    plan = Plan(data.config, data.tables, 1)
    found, read = Counter(), []
    for bin in epoch_of(plan):
        batch = data.dataset[bin]
        held = {
            "bin_images": sum(batch.media["image"].lengths) if "image" in batch.media else 0,
            "bin_audio_frames": sum(batch.media["audio"].lengths) if "audio" in batch.media else 0,
            "bin_pairs": len({sample for samples in batch.pairs.values() for sample in samples}),
        }
        found |= Counter(held)
        assert batch.num_tokens == bin.tokens <= data.config.bin_tokens
        read += [sample[:3] for sample in bin.samples]
    assert len(read) == len(set(read)) >= plan.num_samples
    return found


def test_batches_keep_each_limit_of_a_bin(tree: dict[str, Any]) -> None:
    tree["data"]["cache_mb"] = 64
    data = open_data(tree)
    free = largest(data)
    for name, limit in {"bin_images": 5, "bin_audio_frames": 200, "bin_pairs": 3}.items():
        assert largest(limited(data, **{name: limit}))[name] <= limit < free[name]


def test_media_that_no_bin_could_hold_are_left_out(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["data"] |= {"bin_images": 2, "bin_audio_frames": 40}
    album = {"json": json.dumps({"segments": [{"image": f"{n}.png"} for n in range(3)]}).encode()}
    samples = [
        {"__key__": "album", **album, **{f"{n}.png": png(n) for n in range(3)}},
        {"__key__": "loud", "flac": flac(1, seconds=0.6), "txt": b"red cat"},
        {"__key__": "fine", "png": png(1), "flac": flac(1, seconds=0.3), "txt": b"red cat"},
    ]
    data = with_shard(tree, tmp_path / "s.tar", samples)
    found = {skip.key: skip for skip in data.left_out()}
    assert {key: skip.reason for key, skip in found.items()} == {"album": "over_long", "loud": "over_long"}
    limits = "allowed are data.context_length=128 a document, and in a bin 600 tokens, 2 images, 40 audio_frames"
    assert "with 3 pictures and 0 tokens of sound" in found["album"].detail
    assert all(limits in skip.detail for skip in found.values())


def test_explanations_name_lengths_limits_and_what_is_missing(tree: dict[str, Any], tmp_path: Path) -> None:
    samples = [
        {"__key__": "long", "txt": words(1, 300).encode(), "png": png(1)},
        {"__key__": "wordless", "png": png(2)},
        {"__key__": "blank", "txt": b" \n"},
        {"__key__": "held", "txt": b"red"},
    ]
    data = with_shard(tree, tmp_path / "s.tar", samples, objectives=["captioning", "masked_lm"])
    table = quarantine(tree, tmp_path / "q.jsonl", data, "s", [3]).tables["s"]
    reasons = table.units(np.arange(4)).reasons
    assert [REASONS[code] for code in reasons] == ["over_long", "missing_member", "empty", "quarantined"]
    long, wordless, blank, held = (table.explain(number, int(code)) for number, code in enumerate(reasons))
    made = [len(d.input_ids) for d in _of_any_length(tree, tmp_path).dataset.documents(0, 0, 0)]
    assert f"documents of {made} tokens" in long
    assert "with 1 pictures" in long
    assert "data.context_length=128 a document, and in a bin 600 tokens" in long
    assert "documents of [] tokens" in wordless
    assert "each of captioning, masked_lm must find something to learn from" in wordless
    assert "txt: the text is blank" in blank
    assert held == "listed in data.quarantine"


def _of_any_length(tree: dict[str, Any], folder: Path) -> RunData:
    tree["data"] |= {"context_length": 4096, "bin_tokens": 8192}
    return open_data(tree)


def test_one_part_that_has_no_place_rules_its_document_out(tree: dict[str, Any], tmp_path: Path) -> None:
    """A book is read whole or not at all: a clip longer than the context would leave a hole in it."""
    broken = book(1)
    broken["json"] = json.dumps(
        {"segments": [{"text": words(1, 30)}, {"audio": "9.flac"}, {"text": words(2, 30)}]}
    ).encode()
    broken["9.flac"] = flac(1, seconds=5.0)
    tree["data"]["context_length"] = 20
    data = with_shard(tree, tmp_path / "s.tar", [broken, book(2)], long_documents="split")
    units = data.tables["s"].units(np.arange(2))
    assert [REASONS[code] for code in units.reasons] == ["over_long", "ok"]
    assert set(units.owner.tolist()) == {1}
    (skip,) = data.left_out()
    assert "tokens of sound" in skip.detail
