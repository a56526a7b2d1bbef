"""Embeddings of pictures, sounds and texts, as a `similarity` objective makes them.

Shapes: B rows, L columns, I items, E size of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmctx.errors import ConfigError
from mmctx.hf.inputs import Rows, _clips, _pictures
from mmctx.objectives.similarity import Similarity
from mmctx.pack import Document, MediaItem, pack_documents
from mmctx.sample import Sample


class _SpecialIds(NamedTuple):
    """What `Similarity` asks of a tokenizer."""

    placeholder_ids: dict[str, int]
    embed_id: int


class FeaturesMixin:
    """`get_image_features`, `get_audio_features`, `get_text_features`."""

    config: Any
    native: Any
    device: torch.device
    placeholder_ids: dict[str, int]

    def get_image_features(self, pixel_values: Tensor, objective: str | None = None) -> Tensor:
        """Unit embeddings (I, E) of pictures.

        Args:
            pixel_values: (I, 3, S, S) uint8, as the processor makes them.
            objective: name of a similarity objective; the first one by default.

        Raises:
            ConfigError: the model has no such objective, no such encoder, or its config tells no ids of special tokens.
        """
        _, _, num_tokens = _pictures(self._encoder("image"), {"pixel_values": pixel_values})  # type: ignore[misc]
        items = [MediaItem("image", pixels, n) for pixels, n in zip(pixel_values.cpu(), num_tokens, strict=True)]
        return self._embed("image", items, objective)

    def get_audio_features(
        self, input_features: Tensor, input_features_mask: Tensor | None = None, objective: str | None = None
    ) -> Tensor:
        """Unit embeddings (I, E) of clips: (I, F, M) frames, (I, F) mask of those that are real; else see `get_image_features`."""
        inputs = {"input_features": input_features, "input_features_mask": input_features_mask}
        frames, lengths, num_tokens = _clips(self._encoder("audio"), inputs)  # type: ignore[misc]
        clips = frames.cpu().split(lengths)
        items = [MediaItem("audio", clip, n) for clip, n in zip(clips, num_tokens, strict=True)]
        return self._embed("audio", items, objective)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, objective: str | None = None
    ) -> Tensor:
        """Unit embeddings (B, E) of texts (B, L), padded at either end; else see `get_image_features`."""
        rows = Rows.of(input_ids, 0, attention_mask, None)
        texts = [ids.numpy() for ids in rows.pack(input_ids).cpu().split(rows.lengths)]
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
        half: Any = Similarity(name, configs[name], _SpecialIds(self.placeholder_ids, embed_id))  # type: ignore[arg-type]
        documents: list[Document] = [
            half.view_document(Sample("", "", number), view, part) for number, part in enumerate(parts)
        ]
        batch = pack_documents(documents, self.placeholder_ids).to(self.device)
        native = self.native
        place = f"{name}/{view}"
        return native.objectives[name].embed(native.encode(batch), batch.pooled[place], batch.pool_sizes[place])
