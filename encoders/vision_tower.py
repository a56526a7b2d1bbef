"""Vision towers: any plain ViT of timm, open_clip or Transformers, reduced to the part that makes patch tokens; EfficientNets are in
`conv_tower`.

Shapes: I pictures, H x W pixels of each (S x S where they are square), N patch tokens per picture, C tower width.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmctx.encoders.conv_stem import ConvStem, square_side
from mmctx.encoders.image_config import OPEN_CLIP_RESIZE, TIMM_RESIZE, ImageEncoderConfig, Interpolation, Resize
from mmctx.errors import ConfigError

# timm and open_clip are imported where they are used: loader workers and `mmctx --help` need neither (2 to 3 seconds).


class VisionTower(nn.Module):
    """A ViT that returns its patch tokens and nothing else: (I, 3, H, W) -> (I, N, C), row by row.

    Parts that only pooled features pass through (heads, attention pools) are removed: unused parameters upset DDP.

    Attributes:
        image_size: S; 0 if pictures may have any whole number of patches.
        patch_size: pixels that one token stands for, along one side.
        resize: how pictures became square when the weights were trained.
        interpolation: how their pixels were resampled.
        mean: RGB mean of pixel values that the weights were trained with.
        std: their RGB standard deviation.
    """

    image_size: int
    patch_size: int
    resize: Resize = "crop"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """Its transformer blocks."""
        raise NotImplementedError


class TimmTower(VisionTower):
    """timm's `forward_features` without class and register tokens.

    With `dynamic` its position embeddings are interpolated to the grid of each picture.
    """

    def __init__(self, model: Any, mean: tuple, std: tuple, dynamic: bool = False) -> None:
        super().__init__()
        embed: Any = getattr(model, "embeds", None) or getattr(model, "patch_embed", None)
        if not dynamic and hasattr(model, "embeds"):
            raise TypeError(f"{type(model).__name__} takes pictures of any size: set max_patches, such as 256")
        if not (dynamic or getattr(embed, "img_size", None)) or not hasattr(model, "num_prefix_tokens"):
            raise TypeError(
                f"{type(model).__name__} has no patch embedding of fixed size: only plain ViTs are supported"
            )
        self.image_size = 0 if dynamic else square_side(embed.img_size)
        self.patch_size = square_side(embed.patch_size)
        self.mean, self.std = mean, std
        model.prune_intermediate_layers(1, prune_norm=False, prune_head=True)  # keeps all blocks, drops head and pool
        self.model = model

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """See `VisionTower`."""
        return self.model.blocks

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.forward_features(pixels)[:, self.model.num_prefix_tokens :]


class OpenClipTower(VisionTower):
    """Patch tokens of open_clip's own ViT, normalised by `ln_post` where open_clip itself would do so."""

    def __init__(self, visual: Any, mean: tuple, std: tuple) -> None:
        super().__init__()
        self.image_size, self.patch_size = square_side(visual.image_size), square_side(visual.patch_size)
        self.mean, self.std = mean, std
        self.normalize = visual.attn_pool is None and not visual.final_ln_after_pool
        visual.prune_intermediate_layers(1, prune_norm=not self.normalize, prune_head=True)
        visual.attn_pool = None
        self.visual = visual

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """See `VisionTower`."""
        return self.visual.transformer.resblocks

    def forward(self, pixels: Tensor) -> Tensor:
        found = self.visual.forward_intermediates(
            pixels, indices=1, normalize_intermediates=self.normalize, intermediates_only=True, output_fmt="NLC"
        )
        return found["image_intermediates"][0]


def build_tower(config: ImageEncoderConfig, device: torch.device | str | None = None) -> VisionTower:
    """Builds the tower, with weights if the config asks for them.

    Raises:
        ConfigError: as `image_geometry`, or a checkpoint that does not fit the model.
    """
    device = torch.get_default_device() if device is None else device
    try:
        with torch.device(device):
            tower = _BUILDERS[config.kind](config, device)
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"image encoder {config.name!r} with options {config.options}: {error}") from error
    if any(isinstance(module, _BatchNorm) for module in tower.modules()):
        raise ConfigError(
            f"image encoder {config.name!r} has batch norm: a picture's features would depend on its neighbours"
        )
    return tower


def _build_timm(config: ImageEncoderConfig, device: torch.device | str) -> VisionTower:
    import timm

    from mmctx.encoders.conv_tower import build_conv_tower

    if "/" not in config.name and ":" not in config.name and not timm.is_model(config.name.partition(".")[0]):
        raise ConfigError(f"timm has no model {config.name!r}; {_close_matches(config.name, timm.list_models())}")
    if (tower := build_conv_tower(config, load_timm)) is not None:
        return _prepared_as(tower, tower.model.pretrained_cfg)
    options = dict(config.options)
    dim, num_heads = options.get("embed_dim"), options.get("num_heads")
    if dim and num_heads and dim % num_heads:
        raise ConfigError(f"image encoder {config.name!r}: num_heads {num_heads} does not divide embed_dim {dim}")
    if config.image_size is not None:
        options["img_size"] = config.image_size
    if config.stem == "conv":
        options["embed_layer"] = ConvStem
    if config.max_patches is not None and not config.name.startswith("naflexvit"):
        options["dynamic_img_size"] = True
    model: Any = timm.create_model(config.name, pretrained=config.pretrained is True, num_classes=0, **options)
    if isinstance(config.pretrained, str):
        load_timm(model, config.pretrained)
    about = model.pretrained_cfg
    tower = TimmTower(model, _rgb(about["mean"]), _rgb(about["std"]), dynamic=config.max_patches is not None)
    return _prepared_as(tower, about)


def _prepared_as(tower: VisionTower, about: Mapping[str, Any]) -> VisionTower:
    """The tower, told how timm prepares its pictures."""
    tower.resize = TIMM_RESIZE.get(about.get("crop_mode") or "center", "crop")
    tower.interpolation = "bilinear" if about.get("interpolation") == "bilinear" else "bicubic"
    return tower


def load_timm(model: nn.Module, path: str, convert: Callable[..., Any] | None = None) -> None:
    """Loads a timm checkpoint (safetensors or torch), but for its classifier; refuses what does not fit."""
    from timm.models import load_checkpoint

    if not os.path.isfile(path):
        raise ConfigError(f"pretrained: no such file {path!r}")
    # Each family's own conversions, such as the resampling of position embeddings to another image size.
    convert = convert or getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    keys = load_checkpoint(model, path, strict=False, filter_fn=convert)
    heads = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    unexpected = [key for key in keys.unexpected_keys if not key.startswith(heads)]
    if keys.missing_keys or unexpected:
        raise ConfigError(
            f"{path}: does not fit the model: {len(keys.missing_keys)} missing {keys.missing_keys[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}"
        )


def _build_open_clip(config: ImageEncoderConfig, device: torch.device | str) -> VisionTower:
    try:
        import open_clip
    except ImportError:
        raise ConfigError(
            "image encoder of kind 'open_clip': the package is missing, pip install 'mmctx[clip]'"
        ) from None

    if config.stem != "patch":
        raise ConfigError("stem 'conv' needs kind 'timm': open_clip's ViT has a fixed patch embedding")
    if config.max_patches is not None:
        raise ConfigError(
            "max_patches needs kind 'timm' or 'transformers': open_clip's towers take pictures of one size"
        )
    create = partial(open_clip.create_model, config.name, device=device, pretrained_text=False)
    if config.name.startswith(("local-dir:", "hf-hub:")):
        if isinstance(config.pretrained, str):
            raise ConfigError(f"{config.name}: the folder has its weights, set `pretrained: true`")
        if config.options and not config.pretrained:
            return _wrap_open_clip(_as_in_a_folder(config, create))
        return _wrap_open_clip(create(load_weights=config.pretrained, force_image_size=config.image_size).visual)
    known: Any = open_clip.get_model_config(config.name)
    if known is None:
        raise ConfigError(
            f"open_clip has no model {config.name!r}; {_close_matches(config.name, open_clip.list_models())}"
        )
    overrides: dict[str, Any] = {"vision_cfg": {**known["vision_cfg"], **config.options}}
    if config.image_size is not None:
        overrides["vision_cfg"]["image_size"] = config.image_size
    if config.pretrained is True:
        tags = open_clip.list_pretrained_tags_by_model(config.name)
        raise ConfigError(f"pretrained: name a checkpoint file or one of open_clip's tags for {config.name}: {tags}")
    if config.pretrained is False:  # the text tower is thrown away, so make it a tiny one
        overrides["text_cfg"] = _TINY_TEXT
    return _wrap_open_clip(create(pretrained=config.pretrained or None, **overrides).visual)


def _as_in_a_folder(config: ImageEncoderConfig, create: Any) -> Any:
    """The visual tower that a folder described when the config was resolved; the folder may be gone."""
    vision = dict(config.options)
    model = {
        "embed_dim": 8,
        "quick_gelu": vision.pop("quick_gelu", False),
        "vision_cfg": vision,
        "text_cfg": _TINY_TEXT,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "open_clip_config.json"
        path.write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}), encoding="utf-8")
        create = partial(create.func, f"local-dir:{folder}", **create.keywords)
        return create(load_weights=False, force_image_size=config.image_size).visual


_TINY_TEXT = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}


def _wrap_open_clip(visual: Any) -> VisionTower:
    mean, std = _rgb(visual.preprocess_cfg["mean"]), _rgb(visual.preprocess_cfg["std"])
    if hasattr(visual, "trunk"):  # a timm model inside
        tower: VisionTower = TimmTower(visual.trunk, mean, std)
    elif not hasattr(visual, "positional_embedding"):
        raise TypeError(f"{type(visual).__name__} is not a ViT")
    else:
        tower = OpenClipTower(visual, mean, std)
    tower.resize = OPEN_CLIP_RESIZE.get(visual.preprocess_cfg["resize_mode"], "crop")
    tower.interpolation = "bilinear" if visual.preprocess_cfg["interpolation"] == "bilinear" else "bicubic"
    return tower


def _close_matches(name: str, known: list[str]) -> str:
    return f"close names: {', '.join(difflib.get_close_matches(name, known, n=3, cutoff=0.4)) or 'none'}"


def _rgb(values: Any) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


def _build_transformers(config: ImageEncoderConfig, device: torch.device | str) -> VisionTower:
    from mmctx.encoders.transformers_tower import build_transformers_tower

    if config.stem != "patch":
        raise ConfigError("stem 'conv' needs kind 'timm': the model's own patch embedding is fixed")
    return build_transformers_tower(config)


_BUILDERS: dict[str, Callable[[ImageEncoderConfig, torch.device | str], VisionTower]] = {
    "timm": _build_timm,
    "open_clip": _build_open_clip,
    "transformers": _build_transformers,
}
