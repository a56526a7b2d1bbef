"""The quarantine list: what is written comes back, by content and not by path, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmctx.datasets.shards.quarantine import Quarantine, QuarantineEntry, write_quarantine
from mmctx.errors import DataError


def entry(name: str, number: int, key: str = "k") -> QuarantineEntry:
    return QuarantineEntry(f"data/{name}.tar", name, number, key, "bad_json", "a detail")


def test_entries_come_back(tmp_path: Path) -> None:
    entries = [entry("a", 7), entry("b", 0, "odd\udcff\u2028key"), entry("a", 2), entry("a", 7)]
    assert write_quarantine(tmp_path / "q.jsonl", entries) == 4
    found = Quarantine.load(tmp_path / "q.jsonl")
    assert list(found.entries) == entries
    assert len(found) == 3
    np.testing.assert_array_equal(found.numbers("a"), np.array([2, 7], np.int64), strict=True)
    np.testing.assert_array_equal(found.numbers("c"), np.array([], np.int64), strict=True)
    assert found.unmatched(["a", "c"]) == (entries[1],)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.jsonl"]


def test_fingerprint_is_of_the_set_of_samples() -> None:
    entries = [entry("a", 7), entry("b", 1), entry("a", 2)]
    moved = [QuarantineEntry("elsewhere", e.content_hash, e.number, "", "empty", "") for e in reversed(entries)]
    assert Quarantine(entries).fingerprint == Quarantine(moved + moved).fingerprint
    others = [entries[:2], [*entries, entry("b", 7)], [entry("b", 7), entry("a", 1), entry("b", 2)], []]
    assert len({Quarantine(e).fingerprint for e in [entries, *others]}) == 5


GOOD = {"shard": "a", "content_hash": "h", "number": 1, "key": "k", "reason": "empty", "detail": ""}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "JSON object"),
        ("[1]", "found list"),
        (json.dumps(GOOD | {"more": 1}), "more"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "number"}), "found content_hash"),
        (json.dumps(GOOD | {"number": "1"}), "number should be of type int"),
        (json.dumps(GOOD | {"number": True}), "number should be of type int"),
        (json.dumps(GOOD | {"number": -1}), "0 or more"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(DataError, match=rf"q\.jsonl:3: .*{says}"):
        Quarantine.load(path)


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such quarantine list"):
        Quarantine.load(tmp_path / "nothing.jsonl")
