"""A run's own similarity head as the encoder of a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmctx.datasets.assemble import build_preprocessors
from mmctx.datasets.decode import decode_audio, decode_image
from mmctx.errors import ConfigError, SampleError
from mmctx.eval.documents import grouped
from mmctx.eval.views import embed_with
from mmctx.objectives import build_data_halves
from mmctx.pack import Document, MediaItem
from mmctx.sample import Sample
from mmctx.store.encoders.base import fingerprint_files
from mmctx.store.entries import KINDS, Kind
from mmctx.store.provenance import Provenance

if TYPE_CHECKING:
    from mmctx.datasets.config import DataConfig
    from mmctx.datasets.planning.table import Preprocessors
    from mmctx.model import MmctxModel
    from mmctx.objectives.similarity import Similarity
    from mmctx.tokenizer import TextTokenizer
    from mmctx.train.config import RunConfig


class CheckpointEncoder:
    """Embeds as the suite `retrieval` does: every part is a document of its own view. Texts beyond the context are cut off.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: the checkpoint's own.
        half: data half of a similarity objective of it.
        media: how its pictures and clips become items.
        config: of the run's data; its context and its bins bound what is embedded together.
        name: how the checkpoint was named.
        fingerprint: names its weights.
        bf16: products run in bfloat16, as the run was trained.
    """

    def __init__(
        self,
        model: MmctxModel,
        tokenizer: TextTokenizer,
        half: Similarity,
        media: Preprocessors,
        config: DataConfig,
        *,
        name: str,
        fingerprint: str,
        bf16: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, next(model.parameters()).device
        self._half, self._media, self._bf16 = half, media, bf16
        self._context, self._bin = config.context_length, config.bin_tokens
        self._views = _views(half.config.views, media)
        kinds: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind in self._views)
        head: Any = model.objectives[half.name]
        about = f"{fingerprint}-{half.name}"
        self.provenance = Provenance(name, about, head.projection.out_features, kinds, head=half.name)

    @classmethod
    def of_run(
        cls,
        model: MmctxModel,
        tokenizer: TextTokenizer,
        config: RunConfig,
        weights: Path,
        name: str,
        objective: str | None = None,
    ) -> CheckpointEncoder:
        """The encoder of a checkpoint, on the GPU if there is one.

        Args:
            model: its own, in evaluation mode.
            tokenizer: its own.
            config: of its run.
            weights: the file that holds them, for the fingerprint.
            name: how the checkpoint was named.
            objective: of the kind `similarity`; the run's first by default.

        Raises:
            ConfigError: the run has no such objective.
        """
        known = [own for own, settings in config.objectives.items() if settings.kind == "similarity"]
        if not known or objective not in (None, *known):
            wanted = f" named {objective!r}" if objective else ""
            raise ConfigError(
                f"{name}: an encoder needs an objective of the kind similarity{wanted}, the run has {', '.join(known) or 'none'}; train "
                "with one, or name another encoder"
            )
        half: Any = build_data_halves(config.objectives, tokenizer)[objective or known[0]]
        about = f"{tokenizer.definition}{config.model.model_dump_json()}"
        return cls(
            model.to("cuda" if torch.cuda.is_available() else "cpu"),
            tokenizer,
            half,
            build_preprocessors(config.model),
            config.data,
            name=name,
            fingerprint=fingerprint_files([weights], about),
            bf16=config.train.precision == "bf16",
        )

    def prepare(self, kind: Kind, value: str | bytes) -> tuple[Kind, Any]:
        """See `Encoder`."""
        if isinstance(value, str):
            ids = self.tokenizer.encode(value)[: self._half.room(self._context)]
            if not len(ids):
                raise SampleError("empty", f"the tokenizer makes 0 tokens of {value[:40]!r}")
            return kind, ids
        if kind == "image":
            assert self._media.image is not None
            return kind, self._media.image(decode_image(value))
        assert self._media.audio is not None
        item = self._media.audio(*decode_audio(value))
        if item.num_tokens > self._half.room(self._context):
            raise SampleError(
                "over_long",
                f"a clip of {item.num_tokens} tokens, the checkpoint's context has {self._context}; cut it up",
            )
        return kind, item

    def embed(self, prepared: Sequence[tuple[Kind, Any]]) -> np.ndarray:
        """See `Encoder`."""
        documents = [self._document(number, entry) for number, entry in enumerate(prepared)]
        vectors = np.zeros((len(documents), self.provenance.dim), np.float32)
        for group in grouped(documents, [len(document.input_ids) for document in documents], self._bin):
            with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
                for _, embedded, numbers in embed_with(
                    self.model, self._half.name, group, self.tokenizer.placeholder_ids, self.device
                ):
                    vectors[numbers] = embedded
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)  # bf16 products leave them a little off

    def _document(self, number: int, entry: tuple[Kind, np.ndarray | MediaItem]) -> Document:
        kind, part = entry
        return self._half.view_document(Sample("", "", number), self._views[kind], part)


def _views(views: Sequence[str], media: Any) -> dict[Kind, str]:
    """Kind -> the objective's view of it, of those that the model has an encoder for."""
    found: dict[Kind, str] = {}
    for view in views:
        kind: Kind = view if view in ("image", "audio") else "text"  # type: ignore[assignment]
        if kind == "text" or getattr(media, kind) is not None:
            found.setdefault(kind, view)
    return found
