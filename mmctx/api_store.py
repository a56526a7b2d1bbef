"""The part of `mmctx.api` about knowledge stores: open the encoder that made one, and ask it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmctx.errors import CheckpointError
from mmctx.store.encoders.base import Encoder
from mmctx.store.recall import Recall, Segment, recall
from mmctx.store.store import Store
from mmctx.train.checkpoints.layout import resolve_checkpoint
from mmctx.train.checkpoints.load import read_model


def open_encoder(name: str, objective: str | None = None) -> Encoder:
    """An encoder for a knowledge store.

    Args:
        name: a checkpoint or run folder, whose similarity head embeds; `transformers:FOLDER`; or `open_clip:ARCHITECTURE@WEIGHTS`.
        objective: which similarity objective of the run; its first by default.

    Raises:
        ConfigError: there is no such encoder, or the run has no similarity objective.
        CheckpointError: there is no whole checkpoint.
    """
    library, colon, model = name.partition(":")
    if colon and library == "transformers":
        from mmctx.store.encoders.transformers import TransformersEncoder

        return TransformersEncoder(model, name)
    if colon and library == "open_clip":
        from mmctx.store.encoders.open_clip import OpenClipEncoder

        return OpenClipEncoder(model, name)
    from mmctx.store.encoders.checkpoint import CheckpointEncoder

    folder = resolve_checkpoint(Path(name))
    return CheckpointEncoder.of_run(*read_model(folder), folder / "model.safetensors", name, objective)


def encoder_of(store: Store, name: str | None = None, objective: str | None = None) -> Encoder:
    """The encoder that made a store.

    Args:
        store: an open store.
        name: where it lies by now, see `open_encoder`; by default where it lay when the store was made.
        objective: which similarity objective of the run; the store's own by default.

    Raises:
        DataError: that is another encoder; both are named.
        ConfigError: see `open_encoder`.
        CheckpointError: see `open_encoder`.
    """
    about = store.provenance
    try:
        encoder = open_encoder(name or about.encoder, objective or about.head)
    except CheckpointError as error:
        if name is not None:
            raise
        raise CheckpointError(f"{error}; it made {store.path}: if it has moved, say where to by --encoder") from None
    about.check(encoder.provenance, store.path)
    return encoder


def recall_from(
    store: str | Path, query: Sequence[Segment], k: int = 3, *, encoder: str | None = None, numbered: bool = False
) -> Recall:
    """What a store knows of a question: the entries to cite, and a prompt of them with the question behind.

    Args:
        store: its folder.
        query: texts, and pictures and clips as the bytes of their files, such as `[("image", data), ("text", "What is it?")]`.
        k: entries at most.
        encoder: see `encoder_of`.
        numbered: begin each entry with its number, such as `[1] `. `mmctx memory pack` writes none.

    Raises:
        DataError: there is no store, or another encoder made it.
        ConfigError: the encoder embeds nothing of the query.
    """
    opened = Store.open(store)
    return recall(opened, encoder_of(opened, encoder), query, k, numbered=numbered)
