"""Pictures: from decoded pixels to embeddings.

Shapes: I pictures, H x W their pixels, S side of a square input, g x h patch tokens of a picture, C tower width,
R embeddings of all pictures, D trunk width, r shuffle factor.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from mmctx.activations import in_tiles
from mmctx.encoders.image_config import ImageEncoderConfig
from mmctx.encoders.image_geometry import ImageGeometry, image_geometry
from mmctx.encoders.item_flops import ItemFlops
from mmctx.encoders.projector import build_projector, pixel_shuffle
from mmctx.encoders.vision_tower import build_tower
from mmctx.errors import DataError, SampleError
from mmctx.pack import MediaBatch, MediaItem

__all__ = ["ImageEncoder", "ImageEncoderConfig", "ImageGeometry", "ImagePreprocessor", "image_geometry"]


class ImagePreprocessor:
    """Turns decoded pixels into a `MediaItem`, square or in its own shape; runs in loader workers, holds sizes and no weights."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        self.geometry = image_geometry(config)

    def __call__(self, pixels: Tensor) -> MediaItem:
        """Brings a picture to the size that the tower takes (antialiased); pixels of the right size stay as they are.

        What is cut away is cut before resizing, which keeps very long pictures cheap. Values stay uint8: the encoder normalises on the
        device.

        Args:
            pixels: (3, H, W) uint8, RGB.

        Raises:
            SampleError: not RGB, not uint8, or without pixels.
        """
        item = self.keep(pixels)
        height, width = self.size_of(pixels)
        pixels = item.values if self.geometry.dynamic else _SQUARES[self.geometry.resize](item.values)
        if pixels.shape[1:] != (height, width):
            mode = self.geometry.interpolation
            pixels = nn.functional.interpolate(pixels[None], size=(height, width), mode=mode, antialias=True)[0]
        return MediaItem(kind="image", values=pixels.contiguous(), num_tokens=item.num_tokens)

    def keep(self, pixels: Tensor) -> MediaItem:
        """The picture in the size it has, to be cut otherwise later; raises as `__call__`."""
        if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != torch.uint8 or pixels.numel() == 0:
            raise SampleError(
                "undecodable_image", f"expected (3, H, W) uint8 pixels, found {tuple(pixels.shape)} {pixels.dtype}"
            )
        height, width = pixels.shape[1:]
        (num_tokens,) = self.num_tokens(np.array([width]), np.array([height])).tolist()
        return MediaItem(kind="image", values=pixels, num_tokens=num_tokens)

    def size_of(self, pixels: Tensor) -> tuple[int, int]:
        """Height and width that a picture (3, H, W) will have for the tower."""
        rows, columns = self.geometry.sizes(np.array([pixels.shape[2]]), np.array([pixels.shape[1]]))
        return int(rows[0]) * self.geometry.unit, int(columns[0]) * self.geometry.unit

    def num_tokens(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """Embeddings that pictures of these sizes (pixels) become: (n,) and (n,) -> (n,) int64."""
        rows, columns = self.geometry.sizes(widths, heights)
        return rows * columns


def _crop(pixels: Tensor) -> Tensor:
    """The central square."""
    height, width = pixels.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[:, top : top + side, left : left + side]


def _pad(pixels: Tensor) -> Tensor:
    """A square around it, black beside the picture."""
    height, width = pixels.shape[1:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return nn.functional.pad(pixels, (left, side - width - left, top, side - height - top))


_SQUARES = {"crop": _crop, "squash": lambda pixels: pixels, "pad": _pad}


class ImageEncoder(nn.Module):
    """Pictures to embeddings: normalise, ViT patch tokens, pixel shuffle, projector.

    Pictures of several sizes are encoded size by size, without padding: none sees another or what lies beside itself.

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

    @property
    def one_pass(self) -> bool:
        """Whether a batch passes through the blocks once, whatever it holds."""
        return self.chunk is None and not self.geometry.dynamic

    def forward(self, media: MediaBatch) -> Tensor:
        """Encodes all pictures of a batch.

        Args:
            media: pictures as `ImagePreprocessor` makes them.

        Returns:
            (R, D) embeddings, R = sum(media.num_tokens), pictures in order, each row by row.

        Raises:
            DataError: pictures of another size, or another number of embeddings than the batch promises.
        """
        self._check(media)
        if media.values.ndim == 4:
            return self._encode_all(media.values)
        pictures = media.pictures()
        groups: dict[tuple[int, int], list[int]] = {}
        for number, size in enumerate(media.picture_sizes):
            groups.setdefault(size, []).append(number)
        found: list[Tensor] = [media.values] * len(pictures)
        for numbers in groups.values():
            rows = self._encode_all(torch.stack([pictures[number] for number in numbers]))
            for number, part in zip(numbers, rows.chunk(len(numbers)), strict=True):
                found[number] = part
        return torch.cat(found)

    def grids(self, media: MediaBatch) -> list[tuple[int, int]]:
        """Rows and columns of embeddings of each picture."""
        unit = self.geometry.unit
        return [(height // unit, width // unit) for height, width in media.picture_sizes]

    def _check(self, media: MediaBatch) -> None:
        geometry, sizes = self.geometry, media.picture_sizes
        side, unit = geometry.image_size, geometry.unit
        if geometry.dynamic:
            wrong = [size for size in sizes if size[0] % unit or size[1] % unit]
            if wrong:
                raise DataError(
                    f"the image encoder takes pictures of whole {unit} x {unit} pixels, found one of {wrong[0][0]} x {wrong[0][1]}"
                )
        elif media.values.shape[1:] != (3, side, side):
            raise DataError(f"the image encoder takes (I, 3, {side}, {side}) pixels, found {tuple(media.values.shape)}")
        expected = tuple(rows * columns for rows, columns in self.grids(media))
        if media.num_tokens != expected:
            raise DataError(
                f"{len(sizes)} pictures make {sum(expected)} embeddings, but the batch has room for "
                f"{sum(media.num_tokens)}: preprocessor and encoder differ in their config"
            )

    def _encode_all(self, values: Tensor) -> Tensor:
        """(I, 3, H, W) uint8 -> (R, D), a chunk at a time if so told."""
        if self.chunk is not None and self.training:
            return in_tiles(self._encode, values, self.chunk, random=True)  # towers may have dropout
        return self._encode(values)

    def _encode(self, values: Tensor) -> Tensor:
        """(I, 3, H, W) uint8 -> (R, D)."""
        grid = [side // self.tower.patch_size for side in values.shape[2:]]
        pixels = torch.addcmul(self.shift, values.to(self.scale.dtype), self.scale)
        x = self.tower(pixels)  # (I, N, C)
        x = pixel_shuffle(x.unflatten(1, grid), self.shuffle)  # (I, g/r, h/r, C*r*r)
        return self.projector(x.flatten(0, 2))

    @staticmethod
    def flops(config: ImageEncoderConfig, dim: int) -> ItemFlops:
        """FLOPs of the forward pass over one picture."""
        geometry = image_geometry(config)
        with torch.device("meta"):
            projector = build_projector(config.projector, geometry.width * config.shuffle**2, dim)
        token = 2 * sum(p.numel() for p in projector.parameters() if p.ndim == 2)
        tower = geometry.flops
        if geometry.dynamic:
            return tower._replace(token=tower.token + token)
        return tower._replace(item=tower.item + token * geometry.num_tokens)

    def empty_batch(self, device: torch.device | str) -> MediaBatch:
        """One black picture that fills no slot, for ranks without pictures: multiply its embeddings by zero."""
        side = self.geometry.image_size or self.geometry.unit
        nowhere = torch.zeros(0, dtype=torch.int64, device=device)
        values = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)
        num_tokens = ((side // self.geometry.unit) ** 2,)
        return MediaBatch(values=values, lengths=(1,), num_tokens=num_tokens, slots=nowhere, rows=nowhere)
