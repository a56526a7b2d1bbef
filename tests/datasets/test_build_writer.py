"""Shards are cut by count and size, have the same bytes always, and are not written twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from make_shards import encode_image, random_pixels
from reading import contents, left_out, read_back, shards_of

from mmctx.datasets.build.folder import build_folder
from mmctx.datasets.build.members import safe_key
from mmctx.datasets.build.writer import BuildOptions, is_heldout
from mmctx.datasets.shards.tar import split_name
from mmctx.errors import ConfigError, DataError


def options(**changes) -> BuildOptions:
    return BuildOptions(**{"num_workers": 1, "samples_per_shard": 4, "heldout": 0.3} | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 pairs, of which 2 are damaged."""
    path = tmp_path / "in"
    path.mkdir()
    for number in range(20):
        data = encode_image(random_pixels(number, 6, 6), "PNG")
        (path / f"p{number:02d}.png").write_bytes(data[:40] if number in (5, 11) else data)
        (path / f"p{number:02d}.txt").write_text(f"picture {number}")
    return path


def test_all_samples_come_once_and_in_the_same_split_always(folder: Path, tmp_path: Path, tokenizer) -> None:
    summary = build_folder(folder, tmp_path / "out", options=options())
    splits = {s: read_back(shards_of(tmp_path / "out", s), tokenizer).keys() for s in ("train", "heldout")}
    keys = {f"p{number:02d}" for number in range(20)} - {"p05", "p11"}
    assert splits["train"] | splits["heldout"] == keys
    assert splits["heldout"] == {key for key in keys if is_heldout(key, 0.3)}
    assert splits["heldout"] > {key for key in keys if is_heldout(key, 0.1)}
    assert summary["counts"] == {split: len(found) for split, found in splits.items()}
    assert set(left_out(tmp_path / "out")) == {"p05", "p11"}
    sizes = [len(read_back([shard], tokenizer)) for shard in shards_of(tmp_path / "out")]
    assert max(sizes[:-1]) == min(sizes[:-1]) == 4


def test_shards_are_cut_by_size(folder: Path, tmp_path: Path, tokenizer) -> None:
    for number in range(4):
        (folder / f"big{number}.png").write_bytes(encode_image(random_pixels(number, 400, 400), "PNG"))  # 0.46 MiB
        (folder / f"big{number}.txt").write_text("big")
    build_folder(folder, tmp_path / "out", options=options(samples_per_shard=100, shard_mb=1, heldout=0.0))
    shards = shards_of(tmp_path / "out")
    assert len(shards) == 2
    assert all(shard.stat().st_size < 1.1 * 2**20 for shard in shards)
    assert len(read_back(shards, tokenizer)) == 22


def test_bytes_do_not_depend_on_the_number_of_workers(folder: Path, tmp_path: Path) -> None:
    build_folder(folder, tmp_path / "one", options=options())
    build_folder(folder, tmp_path / "two", options=options(num_workers=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_second_build_writes_nothing_and_says_the_same(folder: Path, tmp_path: Path) -> None:
    first = build_folder(folder, tmp_path / "out", options=options())
    before = contents(tmp_path / "out")
    second = build_folder(folder, tmp_path / "out", options=options())
    assert second["written"] == []
    assert second["skipped"] == first["written"]
    same = ("counts", "bytes", "pictures", "words", "left_out")
    assert {name: first[name] for name in same} == {name: second[name] for name in same}
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("number", [0, 1, -1])
def test_damage_is_undone_alone(folder: Path, tmp_path: Path, number: int) -> None:
    build_folder(folder, tmp_path / "out", options=options())
    before = contents(tmp_path / "out")
    shard = shards_of(tmp_path / "out")[number]
    shard.write_bytes(shard.read_bytes()[:-100] + b"x" * 100)
    summary = build_folder(folder, tmp_path / "out", options=options())
    assert summary["written"] == [str(shard.relative_to(tmp_path / "out"))]
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("stop_at", [3, 7, 13, 19])
def test_an_interrupted_build_goes_on(folder: Path, tmp_path: Path, stop_at: int) -> None:
    build_folder(folder, tmp_path / "whole", options=options())

    def stop(stage: str, done: int, total: int) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_folder(folder, tmp_path / "out", options=options(progress=stop))
    kept = [shard.name for shard in shards_of(tmp_path / "out")]
    summary = build_folder(folder, tmp_path / "out", options=options())
    assert [Path(name).name for name in summary["skipped"] if name.startswith("train")] == kept
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_changed_file_is_seen(folder: Path, tmp_path: Path, tokenizer) -> None:
    build_folder(folder, tmp_path / "out", options=options())
    (folder / "p05.png").write_bytes(encode_image(random_pixels(5, 6, 6), "PNG"))  # mended
    build_folder(folder, tmp_path / "out", options=options())
    keys = {k for s in ("train", "heldout") for k in read_back(shards_of(tmp_path / "out", s), tokenizer)}
    assert "p05" in keys
    assert set(left_out(tmp_path / "out")) == {"p11"}


def test_a_folder_that_holds_another_build_is_not_touched(folder: Path, tmp_path: Path) -> None:
    build_folder(folder, tmp_path / "out", options=options())
    before = contents(tmp_path / "out")
    other = tmp_path / "other"
    folder.rename(other)
    with pytest.raises(DataError, match="another folder"):
        build_folder(other, tmp_path / "out", options=options())
    assert contents(tmp_path / "out") == before


def test_fewer_shards_leave_no_old_ones(folder: Path, tmp_path: Path) -> None:
    build_folder(folder, tmp_path / "out", options=options())
    (tmp_path / "out" / "train" / "mine.tar").touch()
    summary = build_folder(folder, tmp_path / "out", options=options(samples_per_shard=100))
    assert summary["deleted"]
    names = [shard.name for shard in shards_of(tmp_path / "out")]
    assert names == ["folder-000000.tar", "mine.tar"]


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="heldout"):
        BuildOptions(heldout=1.0)
    with pytest.raises(ConfigError, match="samples_per_shard"):
        BuildOptions(samples_per_shard=0)


def test_keys_are_whole_and_different() -> None:
    names = ["a.b", "a%2Eb", "a_b", "x.y/a.b", ".hidden", "__meta__/a", "%5F_meta__/a", "日本.語", "a"]
    keys = [safe_key(name) for name in names]
    assert len(set(keys)) == len(names)
    for key in keys:
        assert split_name(f"{key}.txt") == (key, "txt")


def test_build_json_is_json(folder: Path, tmp_path: Path) -> None:
    build_folder(folder, tmp_path / "out", options=options())
    record = json.loads((tmp_path / "out" / "build.json").read_text())
    assert record["kind"] == "folder"
    assert set(record["files"]) == {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.tar")}
