"""Pictures: from decoded pixels to embeddings.

Shapes: I pictures, H x W their pixels, S side of the tower's square input, N = g * g patch tokens, C tower width,
R embeddings of all pictures, D trunk width, r shuffle factor.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from mmctx.activations import in_tiles
from mmctx.encoders.projector import build_projector, pixel_shuffle
from mmctx.encoders.vision_tower import ImageEncoderConfig, ImageGeometry, build_tower, image_geometry
from mmctx.errors import DataError, SampleError
from mmctx.pack import MediaBatch, MediaItem

__all__ = ["ImageEncoder", "ImageEncoderConfig", "ImageGeometry", "ImagePreprocessor", "image_geometry"]


class ImagePreprocessor:
    """Turns decoded pixels into a square `MediaItem`; runs in loader workers, holds two numbers and no weights."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        geometry = image_geometry(config)
        self.image_size = geometry.image_size
        self.tokens_per_picture = geometry.num_tokens

    def __call__(self, pixels: Tensor) -> MediaItem:
        """Cuts the central square and resizes it (antialiased bicubic); pixels of the right size stay as they are.

        Cutting before resizing keeps very long pictures cheap. Values stay uint8: the encoder normalises on the device.

        Args:
            pixels: (3, H, W) uint8, RGB.

        Raises:
            SampleError: not RGB, not uint8, or without pixels.
        """
        pixels = self.keep(pixels).values
        height, width = pixels.shape[1:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[:, top : top + side, left : left + side]
        if side != self.image_size:
            size = (self.image_size, self.image_size)
            pixels = nn.functional.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0]
        return MediaItem(kind="image", values=pixels.contiguous(), num_tokens=self.tokens_per_picture)

    def keep(self, pixels: Tensor) -> MediaItem:
        """The picture in the size it has, to be cut otherwise later; raises as `__call__`."""
        if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != torch.uint8 or pixels.numel() == 0:
            raise SampleError(
                "undecodable_image", f"expected (3, H, W) uint8 pixels, found {tuple(pixels.shape)} {pixels.dtype}"
            )
        return MediaItem(kind="image", values=pixels, num_tokens=self.tokens_per_picture)

    def num_tokens(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """Embeddings that pictures of these sizes (pixels) become: (n,) and (n,) -> (n,) int64, all equal."""
        return np.full(np.broadcast(widths, heights).shape, self.tokens_per_picture, dtype=np.int64)


class ImageEncoder(nn.Module):
    """Pictures to embeddings: normalise, ViT patch tokens, pixel shuffle, projector.

    Args:
        config: which tower, and how its tokens are reduced.
        dim: D, width of the trunk.

    Attributes:
        chunk: pictures encoded at a time while training, each chunk once more in the backward pass; None takes all and keeps all.

    Raises:
        ConfigError: the tower cannot be built, see `image_geometry` and `build_tower`.
    """

    scale: Tensor  # (1, 3, 1, 1), uint8 -> normalised
    shift: Tensor  # (1, 3, 1, 1)

    def __init__(self, config: ImageEncoderConfig, dim: int) -> None:
        super().__init__()
        self.geometry = image_geometry(config)
        self.shuffle = config.shuffle
        self.chunk: int | None = None
        self.tower = build_tower(config)
        self.projector = build_projector(config.projector, self.geometry.width * config.shuffle**2, dim)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.geometry.mean, self.geometry.std))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """Its transformer blocks."""
        return self.tower.blocks

    def forward(self, media: MediaBatch) -> Tensor:
        """Encodes all pictures of a batch.

        Args:
            media: `values` (I, 3, S, S) uint8, as `ImagePreprocessor` makes them.

        Returns:
            (R, D) embeddings, R = sum(media.num_tokens), pictures in order, each row by row.

        Raises:
            DataError: pictures of another size, or another number of embeddings than the batch promises.
        """
        size, num_tokens = self.geometry.image_size, self.geometry.num_tokens
        if media.values.shape[1:] != (3, size, size):
            raise DataError(f"the image encoder takes (I, 3, {size}, {size}) pixels, found {tuple(media.values.shape)}")
        if any(n != num_tokens for n in media.num_tokens) or len(media.num_tokens) != len(media.values):
            raise DataError(
                f"{len(media.values)} pictures of {num_tokens} embeddings make {num_tokens * len(media.values)}, but "
                f"the batch has room for {sum(media.num_tokens)}: preprocessor and encoder differ in their config"
            )
        if self.chunk is not None and self.training:
            return in_tiles(self._encode, media.values, self.chunk, random=True)  # towers may have dropout
        return self._encode(media.values)

    def _encode(self, values: Tensor) -> Tensor:
        """(I, 3, S, S) uint8 -> (R, D)."""
        grid = self.geometry.grid
        pixels = torch.addcmul(self.shift, values.to(self.scale.dtype), self.scale)
        x = self.tower(pixels)  # (I, N, C)
        x = pixel_shuffle(x.unflatten(1, (grid, grid)), self.shuffle)  # (I, g/r, g/r, C*r*r)
        return self.projector(x.flatten(0, 2))

    @staticmethod
    def flops(config: ImageEncoderConfig, dim: int) -> int:
        """FLOPs of the forward pass over one picture."""
        geometry = image_geometry(config)
        with torch.device("meta"):
            projector = build_projector(config.projector, geometry.width * config.shuffle**2, dim)
        return geometry.flops + 2 * geometry.num_tokens * sum(p.numel() for p in projector.parameters() if p.ndim == 2)

    def empty_batch(self, device: torch.device | str) -> MediaBatch:
        """One black picture that fills no slot, for ranks without pictures: multiply its embeddings by zero."""
        size = self.geometry.image_size
        nowhere = torch.zeros(0, dtype=torch.int64, device=device)
        values = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)
        num_tokens = (self.geometry.num_tokens,)
        return MediaBatch(values=values, lengths=(1,), num_tokens=num_tokens, slots=nowhere, rows=nowhere)
