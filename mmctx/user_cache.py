"""The folder where mmctx keeps, for this user and machine, what it would otherwise find out again at every start."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/mmctx`, which is `~/.cache/mmctx` where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmctx"


def installed_version(package: str) -> str | None:
    """Version of an installed package, None where it is not: what is kept here is often true of some versions alone."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def remembered(what: str, key: str, find_out: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `find_out` gave when it was last called for this `key`; calls it if that is not known, and keeps the answer.

    A file that is damaged or belongs to another key is written anew; a folder that cannot be written costs time, nothing else.

    Args:
        what: names the folder inside the cache.
        key: all that the answer depends on, versions included.
        find_out: gives plain values that JSON can hold.
    """
    path = user_cache() / what / f"{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return kept["answer"]
    answer = find_out()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        fresh.write_text(json.dumps({"key": key, "answer": answer}), encoding="utf-8")
        os.replace(fresh, path)  # readers see the whole file or none
    return answer
