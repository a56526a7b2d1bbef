"""What can be known of a picture encoder without its weights, and how large it wants its pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from mmctx.encoders.image_config import ImageEncoderConfig, Interpolation, Resize
from mmctx.encoders.item_flops import ItemFlops
from mmctx.encoders.vision_tower import VisionTower, build_tower
from mmctx.errors import ConfigError
from mmctx.user_cache import installed_version, remembered


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """Sizes and preprocessing of a picture encoder.

    Attributes:
        image_size: side of the square picture, pixels; 0 where pictures keep their shape.
        unit: side of the square that becomes one embedding, pixels.
        num_tokens: embeddings of a picture; the most that it may become where pictures keep their shape.
        width: channels of a patch token.
        resize: how a picture becomes square.
        interpolation: how its pixels are resampled.
        mean: RGB mean of pixel values in 0..1.
        std: RGB standard deviation of pixel values in 0..1.
        flops: of the tower's forward pass over a picture; of squares all are in `item`.
    """

    image_size: int
    unit: int
    num_tokens: int
    width: int
    resize: Resize
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flops: ItemFlops

    @property
    def dynamic(self) -> bool:
        """Whether pictures keep their shape."""
        return self.image_size == 0

    def sizes(self, widths: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of embeddings of pictures of these sizes (pixels): (n,) and (n,) -> two of (n,) int64.

        A picture that is small enough keeps its size, to the nearest whole embedding; a larger one keeps its shape as far as whole
        embeddings can. Pictures of these sizes stay as they are.
        """
        widths, heights = np.broadcast_arrays(np.asarray(widths, np.int64), np.asarray(heights, np.int64))
        if not self.dynamic:
            side = np.full(widths.shape, self.image_size // self.unit, np.int64)
            return side, side
        # In integers but for one square root, which is rounded alike on all machines: the plan and the loader must agree.
        rows, columns = (np.maximum((2 * side + self.unit) // (2 * self.unit), 1) for side in (heights, widths))
        scale = np.sqrt(self.num_tokens / (heights * widths))
        small_rows = np.clip((heights * scale).astype(np.int64), 1, self.num_tokens)
        small_columns = np.clip((widths * scale).astype(np.int64), 1, self.num_tokens // small_rows)
        fits = rows * columns <= self.num_tokens
        return np.where(fits, rows, small_rows), np.where(fits, columns, small_columns)


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
    names = (here.name, "vision_tower.py", "transformers_tower.py", "conv_stem.py", "conv_tower.py")
    code = [hashlib.blake2b(here.with_name(name).read_bytes()).hexdigest() for name in names]
    made_by = [installed_version(name) for name in ("torch", "timm", "open_clip_torch", "transformers")]
    config = ImageEncoderConfig.model_validate_json(config_json)
    sizes = remembered("image_geometry", json.dumps([config_json, *made_by, *code]), lambda: asdict(_measure(config)))
    for key in ("mean", "std"):  # JSON has lists alone
        sizes[key] = tuple(sizes[key])
    sizes["flops"] = ItemFlops(*sizes["flops"])
    return ImageGeometry(**sizes)


def _measure(config: ImageEncoderConfig) -> ImageGeometry:
    with _NothingToFill():
        tower = build_tower(config.model_copy(update={"pretrained": False}), device="meta").eval()
    size, patch = tower.image_size, tower.patch_size
    unit = patch * config.shuffle
    if size % unit:
        raise ConfigError(
            f"image encoder {config.name!r}: image_size {size} is not divisible by patch size {patch} x shuffle "
            f"{config.shuffle} = {unit}"
        )
    if config.max_patches is None:
        side = size // unit
        total, width = _run(tower, config, side, side)
        flops, num_tokens = ItemFlops(total, 0, 0), side**2
    else:
        runs = [_run(tower, config, 1, columns) for columns in (1, 2, 3)]
        (one, two, three), width = (total for total, _ in runs), runs[0][1]
        square = (three - 2 * two + one) // 2
        token = two - one - 2 * square
        flops, num_tokens = ItemFlops(one - token, token, square), config.max_patches // config.shuffle**2
    return ImageGeometry(
        image_size=size,
        unit=unit,
        num_tokens=num_tokens,
        width=width,
        resize=config.resize or tower.resize,
        interpolation=config.interpolation or tower.interpolation,
        mean=config.mean or tower.mean,
        std=config.std or tower.std,
        flops=flops,
    )


def _run(tower: VisionTower, config: ImageEncoderConfig, rows: int, columns: int) -> tuple[int, int]:
    """FLOPs of the tower over a picture of so many embeddings, and the width of its features."""
    unit, patches = tower.patch_size * config.shuffle, rows * columns * config.shuffle**2
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tokens = tower(torch.empty(1, 3, rows * unit, columns * unit, device="meta"))
    if tokens.ndim != 3 or tokens.shape[1] != patches:
        raise ConfigError(
            f"image encoder {config.name!r} gives features of shape {tuple(tokens.shape)}, a plain ViT of this size "
            f"(1, {patches}, C)"
        )
    return counter.get_total_flops(), tokens.shape[2]


class _NothingToFill(TorchFunctionMode):
    """Skips what fills tensors in place: tensors without data stay as they are, and drawing weights takes most of the time of building."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.startswith("_") and args and getattr(args[0], "is_meta", False):
            return args[0]
        return func(*args, **(kwargs or {}))
