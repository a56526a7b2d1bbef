"""Shards behind a URL: what they are, which there are, and byte ranges of them, asked of their server through fsspec.

A URL names data, never a program: protocols are those of `PROTOCOLS` alone, none is chained or run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import cache, lru_cache
from hashlib import blake2b
from typing import Any

from mmctx.datasets.remote.block_cache import BlockCache
from mmctx.datasets.remote.retry import ShortRead, describe, http_status, is_absent, persist
from mmctx.errors import DataError

PROTOCOLS = {"http": "remote", "https": "remote", "s3": "remote", "gs": "gcs", "memory": "", "file": ""}
"""Protocols that shards may have, and the extra of mmctx that brings what each needs."""

_HTTP = ("http", "https")
_REQUESTS_AT_ONCE = 16
_VERSION_KEYS = ("ETag", "etag", "generation", "Last-Modified", "LastModified", "updated", "mtime", "created")


@dataclass(frozen=True, slots=True)
class RemoteShard:
    """A shard on a server, as it was when it was looked up. Small; may be pickled and forked.

    Attributes:
        url: where it is.
        size: in bytes.
        version: its ETag, or else what the server says of its time.
        cache: where its blocks and its index are kept.
    """

    url: str
    size: int
    version: str
    cache: BlockCache

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """A file name that no other shard and no other version of this one has."""
        return _file_name(self.url, self.size, self.version)

    def beside(self, name: str) -> str:
        """The url of a file in the folder ``SHARD.tar.index`` beside the shard."""
        address, mark, query = self.url.partition("?") if protocol_of(self.url) in _HTTP else (self.url, "", "")
        return f"{address}.index/{name}{mark}{query}"


@lru_cache(maxsize=1 << 16)
def _file_name(url: str, size: int, version: str) -> str:
    digest = blake2b("\n".join((url, str(size), version)).encode(), digest_size=12).hexdigest()
    base = url.partition("?")[0].rpartition("/")[2]
    return f"{''.join(c if c.isalnum() or c in '.-_' else '_' for c in base)[-80:]}-{digest}"


def protocol_of(url: str) -> str:
    """The part before ``://``.

    Raises:
        DataError: shards cannot be read by it.
    """
    protocol = url.partition("://")[0]
    if protocol not in PROTOCOLS:
        known = ", ".join(f"{name}://" for name in PROTOCOLS)
        chained = "; protocols are not chained, remote shards have their own cache" if "::" in protocol else ""
        raise DataError(f"{url}: no shards are read by {protocol!r}{chained}; known are {known}")
    return protocol


def look_up(urls: Sequence[str], cache: BlockCache) -> list[RemoteShard]:
    """The shards at `urls`, looked up several at once.

    Raises:
        DataError: one is missing or cannot be asked for; how many more, too.
    """

    def ask(url: str) -> RemoteShard | DataError:
        try:
            return _shard(url, persist(lambda: _filesystem(protocol_of(url)).info(url), url), cache)
        except DataError as error:
            return error

    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        answers = list(pool.map(ask, urls))
    if errors := [answer for answer in answers if isinstance(answer, DataError)]:
        others = f" ({len(errors)} of {len(urls)} shards failed)" if len(urls) > 1 else ""
        raise DataError(f"{errors[0]}{others}") from errors[0].__cause__
    return [answer for answer in answers if isinstance(answer, RemoteShard)]


def has_wildcards(url: str) -> bool:
    """Whether a url must be matched against a listing. HTTP has no listings, and its queries begin with ``?``."""
    return "*" in url if protocol_of(url) in _HTTP else any(c in url for c in "*?[")


def match(pattern: str, cache: BlockCache) -> list[RemoteShard]:
    """The shards whose urls match `pattern`, in order; their sizes come with the listing.

    Raises:
        DataError: none do, or the protocol has no listings.
    """
    protocol = protocol_of(pattern)
    if protocol in _HTTP:
        raise DataError(
            f"{pattern}: HTTP servers list no files; name the shards with braces, such as x-{{0000..0099}}.tar"
        )
    system = _filesystem(protocol)
    found = persist(lambda: system.glob(pattern, detail=True), pattern)
    shards = [_shard(f"{protocol}://{name.lstrip('/')}", info, cache) for name, info in sorted(found.items())]
    if not shards:
        raise DataError(f"{pattern}: matches no file; check the pattern and the bucket")
    return shards


def read_beside(shard: RemoteShard, name: str) -> bytes | None:
    """A file of the index that was uploaded along with a shard, None if there is none."""
    url = shard.beside(name)
    try:
        return persist(lambda: _filesystem(protocol_of(url)).cat_file(url), url)
    except DataError as error:
        if is_absent(error):
            return None
        raise


class Connection:
    """Byte ranges of one shard, each from its server; threads may share it, forked processes connect anew.

    Every answer is known to be of the version that was looked up: S3 and HTTP are asked for no other, others are asked
    for their version after each read.
    """

    def __init__(self, shard: RemoteShard) -> None:
        self.shard = shard
        self._protocol = protocol_of(shard.url)
        self._conditions = _conditions(shard.version) if self._protocol in _HTTP else {}
        self._forget()

    def _forget(self) -> None:
        self._pid, self._file, self._lock = os.getpid(), None, threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`.

        Raises:
            DataError: the server cannot be reached or refuses, the shard changed, or ranges are not served.
        """
        if self._pid != os.getpid():
            self._forget()
        what = f"{self.shard}: offset {offset}, {size} bytes"
        return persist(lambda: self._read(offset, size), what)

    def _read(self, offset: int, size: int) -> bytes:
        with self._lock:
            try:
                self._file = self._file or self._open()
                self._file.seek(offset)
                data = self._file.read(size)
            except Exception as error:
                self._file = None
                if http_status(error) == 412 or type(error).__name__ == "FileExpired":
                    self._check_version()
                    raise self._changed("another version") from error
                if "range requests" in str(error):
                    raise DataError(
                        f"{self.shard}: offset {offset}: the server answers a request for {size} bytes with the whole file; "
                        "shards are read in ranges: serve them from one that knows Range, or copy them to a local folder"
                    ) from error
                raise
        if self._protocol != "s3" and not self._conditions:
            self._check_version()
        if len(data) != size:
            raise ShortRead(f"the answer ended after {len(data)} of {size} bytes")
        return data

    def _open(self) -> Any:
        system = _filesystem(self._protocol)
        if self._protocol in _HTTP:
            headers = {
                "Accept-Encoding": "identity",
                **self._conditions,
            }  # ranges of compressed bytes would be other bytes
            return system.open(self.shard.url, "rb", cache_type="none", size=self.shard.size, headers=headers)
        self._check_version()
        return system.open(self.shard.url, "rb", cache_type="none")

    def _check_version(self) -> None:
        url, cache = self.shard.url, self.shard.cache
        found = _shard(url, _filesystem(self._protocol).info(url), cache)
        if found != self.shard:
            raise self._changed(f"{found.size} bytes, version {found.version}")

    def _changed(self, found: str) -> DataError:
        expected = f"expected {self.shard.size} bytes, version {self.shard.version}, found {found}"
        return DataError(
            f"{self.shard}: changed on the server since it was indexed: {expected}; "
            "put the old shard back, or start anew to index the new one"
        )


def _conditions(version: str) -> dict[str, str]:
    """Headers with which an HTTP server answers 412 once the file is another; none for what it would not compare."""
    if version.startswith('"'):
        return {"If-Match": version}
    if version.startswith("W/"):
        return {}
    return {"If-Unmodified-Since": version}


def _shard(url: str, info: dict[str, Any], cache: BlockCache) -> RemoteShard:
    if info.get("type") == "directory":
        raise DataError(f"{url}: is a folder, expected a tar; check the url")
    if info.get("size") is None:
        raise DataError(f"{url}: the server does not tell the size; serve shards as plain files")
    version = next((info[key] for key in _VERSION_KEYS if info.get(key)), None)
    if version is None:
        raise DataError(
            f"{url}: the server tells neither ETag nor Last-Modified, so a shard that changed would be taken for the old one; "
            "serve shards as plain files, or copy them to a local folder"
        )
    if isinstance(version, datetime):  # listings may tell times as numbers
        version = version.timestamp()
    return RemoteShard(url, int(info["size"]), str(version), cache)


def _filesystem(protocol: str) -> Any:
    """The file system of this process: clients of a forked one would share its sockets."""
    return _connect(protocol, os.getpid())


@cache
def _connect(protocol: str, pid: int) -> Any:
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False}
    try:
        if protocol in _HTTP:
            from aiohttp import ClientTimeout

            # Silence for so long counts as a failure, however long a whole answer may take.
            timeout = ClientTimeout(total=None, sock_connect=10, sock_read=20)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
        return fsspec.filesystem(protocol, **options)
    except ImportError as error:
        extra = PROTOCOLS[protocol]
        raise DataError(
            f"{protocol}:// needs a package that is not installed ({describe(error)}); pip install 'mmctx[{extra}]'"
        ) from error
