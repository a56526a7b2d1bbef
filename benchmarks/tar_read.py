"""Reading tar shards (bar C4): samples as bytes, nothing decoded, ours against webdataset.

    python benchmarks/tar_read.py [--json] [--quick] [--repeats 3]

Image shards hold pairs of a photo-like JPEG and a caption, token shards many small members: an npy of token ids and a text. webdataset's
writer puts an extra header before every member, for the fraction of its time stamp; "plain" shards are written without, as by GNU tar.
Both sides first give the same keys and bytes. Ours is timed walking a shard without an index, and through an index: in order, in the
order of a plan (blocks of 16 neighbours), and at random. Building the index, cold, is timed beside it: it is paid once.
The files lie in the page cache for both sides, so this is the cost of the code, not of a disk.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import caption, interleaved, machine, parse, ratios, report, timed, versions, write_photos

from mmctx.datasets.planning.order import BlockOrder
from mmctx.datasets.remote.storage import map_file
from mmctx.datasets.shards.index import index_shards
from mmctx.datasets.shards.sidecar import index_folder
from mmctx.datasets.shards.source import Source
from mmctx.datasets.shards.tar import group_samples, scan_tar

BARS = {"image": 6.0, "token": 18.0}
"""How many times faster than webdataset reading through the index should be. There is none for plain shards."""


def write_tokens(folder: Path, count: int, shards: int, mtime: int | None = None) -> list[Path]:
    """Shards of `count` samples in all: ``npy`` of about 500 token ids (1 KB) and ``txt``."""
    import webdataset

    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    paths = [folder / f"tokens-{number:04d}.tar" for number in range(shards)]
    for number, path in enumerate(paths):
        with webdataset.TarWriter(str(path), encoder=False, mtime=mtime) as writer:
            for index in range(number * count // shards, (number + 1) * count // shards):
                buffer = io.BytesIO()
                np.save(buffer, rng.integers(0, 50_000, rng.integers(400, 600)).astype(np.uint16))
                writer.write({"__key__": f"{index:08d}", "npy": buffer.getvalue(), "txt": caption(rng).encode()})
    return paths


def webdataset_samples(paths: list[Path]) -> Iterator[dict]:
    """webdataset's shortest pipeline: shards, tar members, samples."""
    import webdataset

    return iter(
        webdataset.DataPipeline(
            webdataset.SimpleShardList([str(path) for path in paths]), webdataset.tarfile_to_samples()
        )
    )


def walked_samples(paths: list[Path]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Ours without an index: every header is checked, members are cut from the mapped file."""
    for path in paths:
        with map_file(path) as buffer:
            for sample in group_samples(scan_tar(path)):
                yield (
                    sample.key,
                    {extension: buffer[m.offset : m.offset + m.size] for extension, m in sample.members},
                )


def drain(samples: Iterator) -> None:
    for _ in samples:
        pass


def check_equal(paths: list[Path], source: Source) -> int:
    """Same keys, extensions and bytes in the same order, by all three ways; returns the bytes of all members."""
    total = count = 0
    for number, (theirs, (key, walked)) in enumerate(
        zip(webdataset_samples(paths), walked_samples(paths), strict=True)
    ):
        raw = source.read(number)
        assert theirs["__key__"] == key == raw.key
        assert {name: data for name, data in theirs.items() if not name.startswith("__")} == walked == raw.members
        total += sum(map(len, walked.values()))
        count += 1
    assert count == source.num_samples
    return total


def index_cold(paths: list[Path]) -> Source:
    for path in paths:
        shutil.rmtree(index_folder(path), ignore_errors=True)
    return Source("bench", index_shards(paths, None, ("txt",)), ("txt",))


def measure(paths: list[Path], repeats: int) -> dict:
    source = index_cold(paths)
    num_bytes = check_equal(paths, source)
    count = source.num_samples
    everything = np.arange(count)
    planned = BlockOrder(count, 16, 64, 7).ordinal(everything, np.zeros(count, np.int64)).tolist()
    shuffled = np.random.default_rng(2).permutation(count).tolist()
    sides = {
        "webdataset": timed(lambda: drain(webdataset_samples(paths))),
        "walk": timed(lambda: drain(walked_samples(paths))),
        "read in order": timed(lambda: drain(map(source.read, everything.tolist()))),
        "read in plan order": timed(lambda: drain(map(source.read, planned))),
        "read at random": timed(lambda: drain(map(source.read, shuffled))),
        "build the index": timed(lambda: index_cold(paths)),
    }
    times = interleaved(sides, repeats)
    return {
        "samples": count,
        "bytes": num_bytes,
        "samples_per_second": {name: round(count / min(found)) for name, found in times.items()},
        "times_faster": {name: ratios(times["webdataset"], times[name]) for name in list(sides)[1:]},
    }


def main() -> None:
    arguments = parse(__doc__, repeats=3)
    images, tokens, shards = (60, 400, 2) if arguments.quick else (2_000, 30_000, 4)
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "image": measure(write_photos(Path(folder) / "image", images, shards), arguments.repeats),
            "token": measure(write_tokens(Path(folder) / "token", tokens, shards), arguments.repeats),
            "plain token": measure(write_tokens(Path(folder) / "plain", tokens, shards, mtime=0), arguments.repeats),
        }
    result = {"shards": results, "bars": BARS, "machine": machine(), "versions": versions("webdataset", "mmctx")}
    lines = []
    for kind, found in results.items():
        size = found["bytes"] / found["samples"] / 1024
        bar = f", bar {BARS[kind]:g} times webdataset" if kind in BARS else ""
        lines.append(f"{kind} shards: {found['samples']} samples of {size:.1f} KiB{bar}")
        for name, rate in found["samples_per_second"].items():
            faster = found["times_faster"].get(name)
            against = f"   {faster['best']:6.1f}x best, {faster['median']:6.1f}x median" if faster else ""
            lines.append(f"  {name:<20} {rate:>9,} samples/s{against}")
    report(result, lines, arguments.json)


if __name__ == "__main__":
    main()
