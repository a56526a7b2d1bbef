"""Who made the vectors of a store: vectors of two encoders must never be compared."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmctx.errors import DataError
from mmctx.store.entries import Kind

_KEY = b"mmctx_memory"
_FORMAT = 1


@dataclass(frozen=True)
class Provenance:
    """An encoder, as a store remembers it.

    Attributes:
        encoder: how it was named, such as `runs/demo` or `transformers:FOLDER`; opened again by that name unless told otherwise.
        fingerprint: names weights, tokenizer and head, wherever they lie.
        dim: of its vectors.
        kinds: what it can embed.
        normalisation: of its vectors; `l2`: unit length, so that dot products are cosines.
        head: of a run: its similarity objective.
    """

    encoder: str
    fingerprint: str
    dim: int
    kinds: tuple[Kind, ...]
    normalisation: str = "l2"
    head: str | None = None

    def metadata(self) -> dict[bytes, bytes]:
        """As the schema of the table holds it: written in one go with the table, and carried along by every version."""
        return {_KEY: json.dumps({"format": _FORMAT, **asdict(self)}).encode()}

    @classmethod
    def of(cls, metadata: dict[bytes, bytes] | None, path: Path) -> Provenance:
        """From a table's schema.

        Raises:
            DataError: another program made the table, or a newer mmctx.
        """
        if not metadata or _KEY not in metadata:
            raise DataError(
                f"{path}: a LanceDB table, but no store of mmctx: its schema does not say which encoder made it"
            )
        about: dict[str, Any] = json.loads(metadata[_KEY])
        if (found := about.pop("format")) != _FORMAT:
            raise DataError(
                f"{path}: format {found}, this mmctx reads {_FORMAT}; build it again with `mmctx memory build`"
            )
        about["kinds"] = tuple(about["kinds"])
        return cls(**about)

    def check(self, other: Provenance, path: Path) -> None:
        """That `other` is the encoder of this store.

        Raises:
            DataError: it is another one; both are named.
        """
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in ("fingerprint", "dim", "normalisation")}
        if differ := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
            said = "; ".join(f"{name} {ours} against {theirs}" for name, (ours, theirs) in differ.items())
            raise DataError(
                f"{path}: made by the encoder {self.encoder!r} ({self.fingerprint}), asked with {other.encoder!r} ({other.fingerprint}): "
                f"{said}. Their vectors cannot be compared: name the store's own by --encoder, or build another store"
            )
