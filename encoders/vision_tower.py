"""Vision towers: any plain ViT of timm or open_clip, reduced to the part that makes patch tokens; EfficientNets are in `conv_tower`.

Shapes: I pictures, S image side in pixels, N patch tokens per picture, C tower width, h x w positions of a feature map.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from mmctx.config import StrictModel
from mmctx.encoders.conv_stem import ConvStem, square_side
from mmctx.encoders.projector import ProjectorKind
from mmctx.errors import ConfigError
from mmctx.user_cache import installed_version, remembered

# timm and open_clip are imported where they are used: loader workers and `mmctx --help` need neither (2 to 3 seconds).


class ImageEncoderConfig(StrictModel):
    """A picture encoder: a ViT or an EfficientNet by name, an optional reduction of its tokens, a projector."""

    kind: Literal["timm", "open_clip"] = "timm"
    """Library that the tower comes from."""
    name: str = "vit_tiny_patch16_224"
    """The library's name of the model; open_clip also takes `local-dir:FOLDER` and `hf-hub:ORG/REPO`."""
    pretrained: bool | str = False
    """False: random weights. True: the library's own (download; open_clip only for `local-dir:` and `hf-hub:` names).
    A string: a checkpoint file, or one of open_clip's tags."""
    image_size: int | None = Field(default=None, ge=1)
    """Side of the square picture in pixels; the tower's own if null. Checkpoints' position embeddings are resampled."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `timm.create_model` (embed_dim, depth, num_heads, patch_size ...) or keys of open_clip's
    `vision_cfg` (width, layers, head_width, patch_size ...)."""
    stem: Literal["patch", "conv"] = "patch"
    """`patch`: the tower's own patch embedding. `conv`: overlapping 3x3 convolutions of stride 2 (timm only)."""
    shuffle: int = Field(default=1, ge=1)
    """r: pixel shuffle merges r x r neighbouring tokens into one."""
    projector: ProjectorKind = "mlp"
    """How features become embeddings: `linear` or two layers (`mlp`)."""
    mean: tuple[float, float, float] | None = None
    """RGB mean of pixel values in 0..1; the tower's own if null."""
    std: tuple[float, float, float] | None = None
    """RGB standard deviation of pixel values in 0..1; the tower's own if null."""


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """What can be known of a picture encoder without its weights.

    Attributes:
        image_size: side of the square picture, pixels.
        grid: patch tokens along one side, before the pixel shuffle.
        num_tokens: embeddings per picture, after it.
        width: channels of a patch token.
        mean: RGB mean of pixel values in 0..1.
        std: RGB standard deviation of pixel values in 0..1.
        flops: of the tower's forward pass over one picture.
    """

    image_size: int
    grid: int
    num_tokens: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flops: int


def image_geometry(config: ImageEncoderConfig) -> ImageGeometry:
    """Builds the tower on the meta device (no weights) and reads off its sizes.

    That takes 0.2 s after three of importing timm, so the user's cache remembers them: what only plans or reads data needs no timm then.

    Raises:
        ConfigError: the name is unknown, the options do not fit, the model is no plain ViT, or the image size is not
            divisible by patch size times shuffle.
    """
    if config.name.startswith(("local-dir:", "hf-hub:")):  # what stands there may change
        return _measure(config)
    return _remembered_geometry(config.model_dump_json(exclude={"pretrained", "projector"}))


@lru_cache(maxsize=64)
def _remembered_geometry(config_json: str) -> ImageGeometry:
    here = Path(__file__)
    code = [
        hashlib.blake2b(here.with_name(name).read_bytes()).hexdigest()
        for name in (here.name, "conv_stem.py", "conv_tower.py")
    ]
    made_by = [installed_version(name) for name in ("torch", "timm", "open_clip_torch")]
    config = ImageEncoderConfig.model_validate_json(config_json)
    sizes = remembered("image_geometry", json.dumps([config_json, *made_by, *code]), lambda: asdict(_measure(config)))
    for name in ("mean", "std"):  # JSON has lists alone
        sizes[name] = _rgb(sizes[name])
    return ImageGeometry(**sizes)


def _measure(config: ImageEncoderConfig) -> ImageGeometry:
    with _NothingToFill():
        tower = build_tower(config.model_copy(update={"pretrained": False}), device="meta").eval()
    size, patch = tower.image_size, tower.patch_size
    if size % (patch * config.shuffle):
        raise ConfigError(
            f"image encoder {config.name!r}: image_size {size} is not divisible by patch size {patch} x shuffle "
            f"{config.shuffle} = {patch * config.shuffle}"
        )
    grid = size // patch
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tokens = tower(torch.empty(1, 3, size, size, device="meta"))
    if tokens.ndim != 3 or tokens.shape[1] != grid * grid:
        raise ConfigError(
            f"image encoder {config.name!r} gives features of shape {tuple(tokens.shape)}, a plain ViT of this size "
            f"(1, {grid * grid}, C)"
        )
    num_tokens = (grid // config.shuffle) ** 2
    return ImageGeometry(
        image_size=size,
        grid=grid,
        num_tokens=num_tokens,
        width=tokens.shape[2],
        mean=config.mean or tower.mean,
        std=config.std or tower.std,
        flops=counter.get_total_flops(),
    )


class _NothingToFill(TorchFunctionMode):
    """Skips what fills tensors in place: tensors without data stay as they are, and drawing weights takes most of the time of building."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.startswith("_") and args and getattr(args[0], "is_meta", False):
            return args[0]
        return func(*args, **(kwargs or {}))


class VisionTower(nn.Module):
    """A ViT that returns its patch tokens and nothing else: (I, 3, S, S) -> (I, N, C).

    Parts that only pooled features pass through (heads, attention pools) are removed: unused parameters upset DDP.

    Attributes:
        image_size: S.
        patch_size: pixels that one token stands for, along one side.
        mean: RGB mean of pixel values that the weights were trained with.
        std: their RGB standard deviation.
    """

    image_size: int
    patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """Its transformer blocks."""
        raise NotImplementedError


class TimmTower(VisionTower):
    """timm's `forward_features` without class and register tokens."""

    def __init__(self, model: Any, mean: tuple, std: tuple) -> None:
        super().__init__()
        embed: Any = getattr(model, "patch_embed", None)
        if getattr(embed, "img_size", None) is None or not hasattr(model, "num_prefix_tokens"):
            raise TypeError(
                f"{type(model).__name__} has no patch embedding of fixed size: only plain ViTs are supported"
            )
        self.image_size, self.patch_size = square_side(embed.img_size), square_side(embed.patch_size)
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
    build = _build_timm if config.kind == "timm" else _build_open_clip
    try:
        with torch.device(device):
            tower = build(config, device)
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
        return tower
    options = dict(config.options)
    dim, num_heads = options.get("embed_dim"), options.get("num_heads")
    if dim and num_heads and dim % num_heads:
        raise ConfigError(f"image encoder {config.name!r}: num_heads {num_heads} does not divide embed_dim {dim}")
    if config.image_size is not None:
        options["img_size"] = config.image_size
    if config.stem == "conv":
        options["embed_layer"] = ConvStem
    model: Any = timm.create_model(config.name, pretrained=config.pretrained is True, num_classes=0, **options)
    if isinstance(config.pretrained, str):
        load_timm(model, config.pretrained)
    return TimmTower(model, _rgb(model.pretrained_cfg["mean"]), _rgb(model.pretrained_cfg["std"]))


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
    create = partial(open_clip.create_model, config.name, device=device, pretrained_text=False)
    if config.name.startswith(("local-dir:", "hf-hub:")):
        if config.options or isinstance(config.pretrained, str):
            raise ConfigError(
                f"{config.name}: the folder fixes options and weights, remove `options`, set `pretrained: true`"
            )
        visual = create(load_weights=config.pretrained, force_image_size=config.image_size).visual
        return _wrap_open_clip(visual)
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
        overrides["text_cfg"] = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    return _wrap_open_clip(create(pretrained=config.pretrained or None, **overrides).visual)


def _wrap_open_clip(visual: Any) -> VisionTower:
    mean, std = _rgb(visual.preprocess_cfg["mean"]), _rgb(visual.preprocess_cfg["std"])
    if hasattr(visual, "trunk"):  # a timm model inside
        return TimmTower(visual.trunk, mean, std)
    if not hasattr(visual, "positional_embedding"):
        raise TypeError(f"{type(visual).__name__} is not a ViT")
    return OpenClipTower(visual, mean, std)


def _close_matches(name: str, known: list[str]) -> str:
    return f"close names: {', '.join(difflib.get_close_matches(name, known, n=3, cutoff=0.4)) or 'none'}"


def _rgb(values: Any) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)
