"""``left_out.jsonl``: what did not reach the shards, one line each, kept in step with the shards across builds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mmctx.datasets.build.members import LeftOut
from mmctx.jsonl import read_lines

LEDGER = "left_out.jsonl"


class Ledger:
    """Lines by the shard that was being written when they came up; those that belong to no shard stand under ``""``.

    Args:
        folder: of the shards.
        valid: shards whose lines from an earlier build still hold; all other lines are dropped.
    """

    def __init__(self, folder: Path, valid: set[str]) -> None:
        self.path = folder / LEDGER
        self._lines: dict[
            str, dict[LeftOut, None]
        ] = {}  # a shard that is mended brings its lines again: once is enough
        for entry in read_lines(self.path):
            shard = entry.get("shard")
            if shard in valid:
                line = LeftOut(str(entry.get("key")), str(entry.get("reason")), str(entry.get("detail")))
                self._lines.setdefault(shard, {})[line] = None
        if self.path.exists():
            self.save(self._lines)

    def add(self, shard: str, lines: Iterable[LeftOut]) -> None:
        """Adds lines to a shard, in memory and on the disk, so that an interrupted build keeps them."""
        lines = list(lines)
        self._lines.setdefault(shard, {}).update(dict.fromkeys(lines))
        if lines:
            with self.path.open("a") as file:
                file.writelines(_line(shard, line) for line in lines)

    def save(self, shards: Iterable[str]) -> None:
        """Writes the lines of `shards`, in this order, and forgets all others."""
        self._lines = {shard: self._lines[shard] for shard in shards if shard in self._lines}
        temporary = self.path.with_name(self.path.name + ".partial")
        with temporary.open("w") as file:
            file.writelines(_line(shard, line) for shard, lines in self._lines.items() for line in lines)
        temporary.replace(self.path)

    def counts(self) -> dict[str, int]:
        """Number of lines by reason, most frequent first."""
        counts = Counter(line.reason for lines in self._lines.values() for line in lines)
        return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))

    def first(self) -> LeftOut | None:
        """Some line, to show in an error."""
        return next((line for lines in self._lines.values() for line in lines), None)


def _line(shard: str, line: LeftOut) -> str:
    return json.dumps({"shard": shard or None, **line._asdict()}) + "\n"


def shown(counts: dict[str, int]) -> str:
    """Counts as ``missing_file 3, empty 1``."""
    return ", ".join(f"{reason} {count}" for reason, count in counts.items()) or "nothing"
