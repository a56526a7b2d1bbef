"""The index of a shard: a folder ``SHARD.tar.index`` beside it that tells where each sample lies and how big it is.

    meta.json      format version, the tar's size, mtime and hashes, and details of samples that cannot be used
    samples.npy    (n,) `SAMPLE_DTYPE`
    media.npy      (pictures and clips of all samples,) `MEDIA_DTYPE`
    keys.npy       (n,) fixed-width bytes
    tokens-<tokenizer>-<texts>.npy    (n, number of texts) int32, see `ShardIndex.tokens`; problems in a .json beside
    segments-<tokenizer>-<texts>.npy    (segments of all interleaved documents,) `SEGMENT_DTYPE`

Arrays are memory-mapped, so that a billion samples need no loading. Samples are measured in `measure.py`, tokens
counted in `tokens.py`. The index of a remote shard lies in the folder of its cache; one that was uploaded along with
the shard is copied there, else it is made from the shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmctx.datasets.remote.storage import Shard, index_path, stamp, uploaded_index
from mmctx.datasets.shards.arrays import map_array
from mmctx.datasets.shards.contents import Problem
from mmctx.datasets.shards.hashes import content_hash, ends_hash
from mmctx.datasets.shards.measure import ShardContents, measure_shard
from mmctx.datasets.shards.tar import scan_tar
from mmctx.datasets.shards.tokens import TokenCounter, count_tokens
from mmctx.errors import DataError

INDEX_VERSION = 1
_ATTEMPTS = 5
_ARRAYS = ("samples.npy", "media.npy", "keys.npy")


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """An index on disk. It holds names, not arrays: it is small, and may be pickled and forked.

    Attributes:
        path: the shard.
        num_samples: samples in it, those that cannot be used included.
        content_hash: of the shard when it was indexed.
        token_file: name of the file with token counts, None if none were asked for.
    """

    path: Shard
    num_samples: int
    content_hash: str
    token_file: str | None

    @property
    def samples(self) -> np.ndarray:
        """(n,) `measure.SAMPLE_DTYPE`, memory-mapped."""
        return self._array("samples.npy")

    @property
    def media(self) -> np.ndarray:
        """`measure.MEDIA_DTYPE` of all samples' pictures and clips, memory-mapped."""
        return self._array("media.npy")

    @property
    def keys(self) -> np.ndarray:
        """(n,) UTF-8 bytes, memory-mapped."""
        return self._array("keys.npy")

    @property
    def tokens(self) -> np.ndarray | None:
        """(n, max(1, number of texts)) int32, memory-mapped; None if no tokenizer was given.

        -1 where a sample lacks the text; in column 0, ``-1 - code`` where its texts cannot be used, for a code of
        `contents.REASONS`. An interleaved document counts the sum of its text segments in column 0.
        """
        return None if self.token_file is None else self._array(self.token_file)

    @property
    def segments(self) -> np.ndarray:
        """`tokens.SEGMENT_DTYPE` of all interleaved documents' segments, memory-mapped; needs a tokenizer as `tokens` does."""
        assert self.token_file is not None
        return self._array(_segment_file(self.token_file))

    def problems(self) -> list[Problem]:
        """Every sample that cannot be used, first those with unusable members, then those with unusable texts."""
        folder = index_folder(self.path)
        entries = _read_json(folder / "meta.json")["problems"]
        if self.token_file is not None:
            entries += _read_json((folder / self.token_file).with_suffix(".json"))["problems"]
        return [Problem(**entry) for entry in entries]

    def _array(self, name: str) -> np.ndarray:
        return map_array(f"{index_path(self.path)}/{name}", self.content_hash)


def index_folder(path: str | Shard) -> Path:
    """Where the index of a shard lies."""
    return Path(index_path(path))


def ensure_index(path: Shard, counter: TokenCounter | None, texts: tuple[str, ...], force: bool = False) -> ShardIndex:
    """Indexes a shard, or reuses what an earlier call left: stale parts alone are rebuilt.

    Args:
        path: a plain ``.tar``.
        counter: counts tokens; None leaves them out.
        texts: the source's texts, as `check_texts` returns them.
        force: rebuild everything.

    Raises:
        DataError: the shard is missing, damaged or cut short, or the folder cannot be written.
    """
    token_file = None if counter is None else token_file_name(counter.fingerprint, texts)
    for _ in range(_ATTEMPTS):
        try:
            stale = _inode(index_folder(path))
            if force or not (is_fresh(path) or _copy_uploaded(path, stale)):
                _build(path, stale)
                force = False
            if counter is not None and token_file is not None:
                _ensure_tokens(path, counter, texts, token_file)
            meta = _read_json(index_folder(path) / "meta.json")
            return ShardIndex(path, meta["num_samples"], meta["content_hash"], token_file)
        except FileNotFoundError:  # another process replaced the folder under us: look again
            continue
        except OSError as error:
            remedy = "index shards where you may write, copy them there, or for remote ones set data.remote_cache_dir"
            raise DataError(f"{index_folder(path)}: cannot be written ({error.strerror}); {remedy}") from None
    raise DataError(
        f"{index_folder(path)}: replaced {_ATTEMPTS} times while in use; stop the other processes that index it"
    )


def is_fresh(path: Shard) -> bool:
    """Whether the index belongs to the shard as it is now.

    Equal size and mtime (of a remote shard: ETag) decide at once; otherwise the content hash does, and an equal one
    makes the new mtime known.

    Raises:
        DataError: the shard is missing or damaged.
    """
    try:
        meta = _read_json(index_folder(path) / "meta.json")
    except (FileNotFoundError, DataError):
        return False
    found = stamp(path)
    if meta.get("version") != INDEX_VERSION or meta["size"] != found["size"]:
        return False
    if found.items() <= meta.items():
        return True
    if meta["content_hash"] != content_hash(path, list(scan_tar(path))):
        return False
    with contextlib.suppress(OSError):  # a copy that may not be written is hashed again each time
        _write_json(index_folder(path) / "meta.json", meta | found)
    return True


def token_file_name(fingerprint: str, texts: Sequence[str]) -> str:
    """Name of the file of token counts: another tokenizer or other texts are another file."""
    declared = hashlib.blake2b(json.dumps(list(texts)).encode(), digest_size=8).hexdigest()
    return f"tokens-{fingerprint}-{declared}.npy"


def _segment_file(token_file: str) -> str:
    return f"segments{token_file.removeprefix('tokens')}"


def _build(path: Shard, stale: int | None) -> None:
    """Measures the shard into a new folder, then puts it in place of the one with inode `stale`."""
    found = stamp(path)  # before reading: a shard that changes meanwhile must look stale
    members = list(scan_tar(path))
    contents = measure_shard(path, members)
    meta = found | {
        "version": INDEX_VERSION,
        "content_hash": content_hash(path, members),
        "ends_hash": ends_hash(path),
        "num_samples": len(contents.samples),
        "problems": [problem._asdict() for problem in contents.problems],
    }
    with _replacing(index_folder(path), stale) as fresh:
        _write_contents(fresh, contents)
        _write_json(fresh / "meta.json", meta)


def _copy_uploaded(path: Shard, stale: int | None) -> bool:
    """Copies the index that lies beside a remote shard; whether there is one that belongs to it.

    Size and both ends of the shard tell. Every sample is compared with its key when it is read, too.
    """
    try:
        meta = json.loads(uploaded_index(path, "meta.json") or b"{}")
    except ValueError:  # some servers have a page for everything
        return False
    now = stamp(path)
    if not isinstance(meta, dict) or (meta.get("version"), meta.get("size")) != (INDEX_VERSION, now["size"]):
        return False
    if meta.get("ends_hash") != ends_hash(path):
        return False
    arrays = {name: uploaded_index(path, name) for name in _ARRAYS}
    with _replacing(index_folder(path), stale) as fresh:
        for name, data in arrays.items():
            if data is None:
                return False
            (fresh / name).write_bytes(data)
        _write_json(fresh / "meta.json", meta | now | {"uploaded": True})
    return True


@contextlib.contextmanager
def _replacing(folder: Path, stale: int | None) -> Iterator[Path]:
    """A new folder to fill; once it is filled, it takes the place of the one with inode `stale`."""
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    fresh.mkdir(parents=True)
    try:
        yield fresh
        _swap(fresh, folder, stale)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write_contents(folder: Path, contents: ShardContents) -> None:
    np.save(folder / "samples.npy", contents.samples)
    np.save(folder / "media.npy", contents.media)
    np.save(folder / "keys.npy", contents.keys)


def _swap(fresh: Path, folder: Path, stale: int | None) -> None:
    """Puts `fresh` where `folder` is; a reader sees the old index, none, or the new one, never a part."""
    old = fresh.with_name(fresh.name + ".old")
    if stale is not None and _inode(folder) == stale:
        folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process has put its own index there since, as good as ours
            raise
    shutil.rmtree(old, ignore_errors=True)


def _inode(folder: Path) -> int | None:
    try:
        return folder.stat().st_ino
    except FileNotFoundError:
        return None


def _ensure_tokens(path: Shard, counter: TokenCounter, texts: tuple[str, ...], token_file: str) -> None:
    folder = index_folder(path)
    counted = (folder / token_file).is_file() and (folder / _segment_file(token_file)).is_file()
    if counted or _copy_uploaded_tokens(path, folder, token_file):
        return
    samples = np.load(folder / "samples.npy", allow_pickle=False)
    counts = count_tokens(path, samples, counter, texts)
    about = {
        "fingerprint": counter.fingerprint,
        "texts": texts,
        "problems": [problem._asdict() for problem in counts.problems],
    }
    _write_json((folder / token_file).with_suffix(".json"), about)
    for name, array in ((_segment_file(token_file), counts.segments), (token_file, counts.tokens)):
        part = folder / f".{uuid.uuid4().hex}.npy"
        np.save(part, array)
        part.replace(folder / name)  # the token counts come last: where they are, the rest is too


def _copy_uploaded_tokens(path: Shard, folder: Path, token_file: str) -> bool:
    """Copies token counts that were uploaded along with the index that `_copy_uploaded` found; whether there are any."""
    if not _read_json(folder / "meta.json").get("uploaded"):
        return False
    about = Path(token_file).with_suffix(".json").name
    for name in (about, _segment_file(token_file), token_file):  # the counts last: where they are, the rest is too
        data = uploaded_index(path, name)
        if data is None:
            return False
        part = folder / f".{uuid.uuid4().hex}"
        part.write_bytes(data)
        part.replace(folder / name)
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); rebuild it with `mmctx data index --force`") from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(f".{uuid.uuid4().hex}.json")
    part.write_text(json.dumps(content))
    part.replace(path)
