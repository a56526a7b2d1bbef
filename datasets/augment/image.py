"""Pictures, augmented by torchvision.

Shapes: H x W pixels of a picture, h x w of the encoder's input.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

from mmctx.datasets.augment.config import ImageAugmentConfig


def augment_image(pixels: Tensor, config: ImageAugmentConfig, size: tuple[int, int]) -> Tensor:
    """(3, H, W) uint8, decoded where `config.crop` is set, else of its `size` already -> (3, h, w) uint8. Draws from torch's generator."""
    return _transform(config.model_dump_json(), size)(pixels)


@lru_cache(maxsize=64)
def _transform(config_json: str, size: tuple[int, int]) -> Any:
    from torchvision.transforms import v2  # slow to import, and of no use to runs that do not augment

    config = ImageAugmentConfig.model_validate_json(config_json)
    steps: list[Any] = []
    if config.crop is not None:
        bicubic = v2.InterpolationMode.BICUBIC  # as in evaluation
        steps.append(v2.RandomResizedCrop(size, config.crop, config.ratio, interpolation=bicubic, antialias=True))
    if config.flip:
        steps.append(v2.RandomHorizontalFlip(config.flip))
    if config.randaugment:
        steps.append(v2.RandAugment(config.randaugment, config.magnitude))
    if config.jitter is not None:
        steps.append(v2.ColorJitter(*config.jitter))
    return v2.Compose(steps or [v2.Identity()])
