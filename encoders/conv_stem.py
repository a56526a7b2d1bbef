"""The convolutional stem that can stand in for a ViT's patch embedding.

Shapes: I pictures, S image side in pixels, N patch tokens per picture, C tower width, h x w positions of a feature map.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class ConvStem(nn.Module):
    """Overlapping convolutions in place of timm's `PatchEmbed`: (I, 3, S, S) -> (I, N, C).

    "Early Convolutions Help Transformers See Better" (Xiao et al. 2021): 3x3 convolutions of stride 2 whose width
    doubles up to C, then a 1x1 convolution. The paper's batch norm would make a picture depend on its neighbours in the
    batch, so each position is layer-normalised over its channels instead.
    """

    def __init__(
        self,
        img_size: Any,
        patch_size: Any,
        in_chans: int,
        embed_dim: int,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        size, patch = square_side(img_size), square_side(patch_size)
        depth = patch.bit_length() - 1
        if patch < 2 or patch != 2**depth or dynamic_img_pad:
            raise ValueError(
                f"stem 'conv' needs a fixed image size and a patch size that is a power of two, found {patch}"
            )
        self.img_size, self.patch_size = (size, size), (patch, patch)
        self.grid_size = (size // patch, size // patch)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        widths = [in_chans, *(max(embed_dim >> i, 8) for i in reversed(range(depth)))]
        pairs = list(pairwise(widths))
        dd = {"device": device, "dtype": dtype}
        self.convs = nn.ModuleList(nn.Conv2d(a, b, kernel_size=3, stride=2, padding=1, **dd) for a, b in pairs)
        self.norms = nn.ModuleList(nn.LayerNorm(b, **dd) for _, b in pairs)
        self.proj = nn.Conv2d(widths[-1], embed_dim, kernel_size=1, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # a quarter faster, and makes the norm's permutes free
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nn.functional.gelu(norm(conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))  # (I, width, h, w)
        return self.proj(x).flatten(2).transpose(1, 2)


def square_side(size: Any) -> int:
    """The side of a square given as one number or two."""
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"only square pictures and patches are supported, found {height} x {width}")
    return height
