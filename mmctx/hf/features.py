"""Embeddings of pictures, sounds and texts, as a `similarity` objective makes them.

Shapes: B rows, L columns, I items, E size of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmctx.errors import ConfigError
from mmctx.hf.inputs import Items, Rows, clips_of, pictures_of
from mmctx.objectives.base import ids
from mmctx.objectives.similarity import Similarity
from mmctx.pack import Document, MediaItem, pack_documents
from mmctx.sample import Sample


class _SpecialIds(NamedTuple):
    """What `Similarity` asks of a tokenizer."""

    placeholder_ids: dict[str, int]
    embed_id: int
    begin: np.ndarray


class FeaturesMixin:
    """`get_image_features`, `get_audio_features`, `get_text_features`."""

    config: Any
    native: Any
    device: torch.device
    placeholder_ids: dict[str, int]

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, objective: str | None = None
    ) -> Tensor:
        """Unit embeddings (I, E) of pictures.

        Args:
            pixel_values: (I, 3, H, W) uint8, as the processor makes them.
            image_sizes: (I, 2), where they differ.
            objective: name of a similarity objective; the first one by default.

        Raises:
            ConfigError: the model has no such objective, no such encoder, or its config tells no ids of special tokens.
        """
        inputs = {"pixel_values": pixel_values, "image_sizes": image_sizes}
        return self._embed("image", _items("image", pictures_of(self._encoder("image"), inputs)), objective)

    def get_audio_features(
        self,
        input_features: Tensor,
        input_features_mask: Tensor | None = None,
        input_features_tokens: Tensor | None = None,
        objective: str | None = None,
    ) -> Tensor:
        """Unit embeddings (I, E) of clips: (I, F, M) frames, (I, F) mask of those that are real, (I,) tokens; else see
        `get_image_features`."""
        inputs = {
            "input_features": input_features,
            "input_features_mask": input_features_mask,
            "input_features_tokens": input_features_tokens,
        }
        return self._embed("audio", _items("audio", clips_of(self._encoder("audio"), inputs)), objective)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, objective: str | None = None
    ) -> Tensor:
        """Unit embeddings (B, E) of texts (B, L), padded at either end; else see `get_image_features`."""
        rows = Rows.of(input_ids, 0, attention_mask, None)
        texts = [text.numpy() for text in rows.pack(input_ids).cpu().split(rows.lengths)]
        bos = self.config.special_tokens.get("bos")
        texts = [text[1:] if len(text) and text[0] == bos else text for text in texts]  # documents begin with it anyway
        return self._embed("text0", texts, objective)

    def _encoder(self, kind: str) -> Any:
        encoders = self.native.encoders
        if kind not in encoders:
            raise ConfigError(f"the model has no encoder of kind {kind!r}: its config's model.{kind} is null")
        return encoders[kind]

    def _embed(self, view: str, parts: Sequence[Any], objective: str | None) -> Tensor:
        configs = {name: c for name, c in self.config.objective_configs.items() if c.kind == "similarity"}
        if not configs or (objective is not None and objective not in configs):
            raise ConfigError(
                f"objective {objective!r} is no similarity objective of this model; it has {', '.join(configs) or 'none'}"
            )
        name = objective or next(iter(configs))
        if (embed_id := self.config.special_tokens.get("embed")) is None:
            raise ConfigError("special_tokens of the config lack 'embed', the id behind which embeddings are read")
        bos = self.config.special_tokens.get("bos")
        special: Any = _SpecialIds(self.placeholder_ids, embed_id, ids() if bos is None else ids(bos))
        half: Any = Similarity(name, configs[name], special)
        documents: list[Document] = [
            half.view_document(Sample("", "", number), view, part) for number, part in enumerate(parts)
        ]
        batch = pack_documents(documents, self.placeholder_ids).to(self.device)
        native = self.native
        place = f"{name}/{view}"
        return native.objectives[name].embed(native.encode(batch), batch.pooled[place], batch.pool_sizes[place])


def _items(kind: str, found: Items) -> list[MediaItem]:
    """On the host, as documents hold them."""
    return [MediaItem(kind, values.cpu(), n) for values, n in zip(found.values, found.num_tokens, strict=True)]
