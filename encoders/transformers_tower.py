"""Vision models of Transformers as towers: CLIP, SigLIP and ViT."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmctx.encoders.image_config import ImageEncoderConfig
from mmctx.encoders.vision_tower import VisionTower
from mmctx.errors import ConfigError


class TransformersTower(VisionTower):
    """`last_hidden_state` without the class token, position embeddings interpolated by the model where the picture is of another size.

    Of CLIP that is before its last norm, which Transformers applies to the class token alone.
    """

    def __init__(self, model: Any, config: ImageEncoderConfig) -> None:
        super().__init__()
        own = model.config
        self.image_size = 0 if config.max_patches is not None else config.image_size or own.image_size
        self.patch_size = own.patch_size
        self.interpolate = self.image_size != own.image_size
        self.num_prefix_tokens = 0 if own.model_type == "siglip_vision_model" else 1
        self.mean, self.std = config.mean or (0.5, 0.5, 0.5), config.std or (0.5, 0.5, 0.5)
        if own.model_type == "clip_vision_model":  # what nothing is read of upsets DDP
            getattr(model, "vision_model", model).post_layernorm = nn.Identity()
        self.model = model

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """See `VisionTower`."""
        return _blocks(self.model)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.model(pixels, interpolate_pos_encoding=self.interpolate).last_hidden_state
        return features[:, self.num_prefix_tokens :]


def build_transformers_tower(config: ImageEncoderConfig) -> TransformersTower:
    """Builds the model that `config.options` describes, with the weights of the folder `config.pretrained` if it is one.

    Raises:
        ConfigError: the folder's weights are not all there.
    """
    import transformers

    options = dict(config.options)
    kind = options.pop("model_type")
    name, changes, arguments = {
        "clip_vision_model": ("CLIPVisionModel", {}, {}),
        "siglip_vision_model": ("SiglipVisionModel", {"vision_use_head": False}, {}),
        "vit": ("ViTModel", {}, {"add_pooling_layer": False}),
    }[kind]
    made: Any = transformers.AutoConfig.for_model(kind, **options | changes)
    cls: Any = getattr(transformers, name)
    if not isinstance(config.pretrained, str):
        return TransformersTower(cls(made, **arguments), config)
    model, found = cls.from_pretrained(
        config.pretrained,
        config=made,
        dtype=torch.float32,
        output_loading_info=True,
        local_files_only=True,
        **arguments,
    )
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(
            f"pretrained: {config.pretrained} lacks {len(missing)} tensors of a {name}, such as {missing[0]}"
        )
    return TransformersTower(model, config)


def _blocks(model: Any) -> Iterable[nn.Module]:
    base = getattr(model, "vision_model", model)
    return base.encoder.layers if hasattr(base, "encoder") else base.layers
