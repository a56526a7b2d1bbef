"""Pretrained sound encoders: a stem that turns frames into positions, blocks over packed chunks, a projector.

Shapes: F frames of all chunks, M mel bins, C width, P positions of the transformer over all chunks, b bands (patches of a time step),
r shuffle factor, R embeddings of all clips, D trunk width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmctx.activations import recompute
from mmctx.encoders.audio import AudioBlock, PairConv, sinusoids
from mmctx.encoders.item_flops import ItemFlops
from mmctx.encoders.projector import build_projector
from mmctx.encoders.sound_config import ASTConfig, PretrainedSoundConfig, WhisperConfig
from mmctx.encoders.sound_weights import load_sound_weights
from mmctx.errors import DataError
from mmctx.layout import DocumentLayout
from mmctx.pack import MediaBatch


class PretrainedSoundEncoder(nn.Module):
    """Clips to embeddings through Whisper's or AST's encoder, chunk by chunk, none of which sees another.

    Dropout and layer drop, which their makers set to zero, are left out.

    Args:
        config: sizes; its folder's weights, if it names one.
        dim: D, width of the trunk.
        attention_backend: see `mmctx.attention.attention`.

    Attributes:
        chunk: chunks of sound encoded at a time while training, each group once more in the backward pass; None takes all and keeps all.

    Raises:
        ConfigError: the folder's weights do not fit the config.
    """

    def __init__(self, config: PretrainedSoundConfig, dim: int, attention_backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.attention_backend = attention_backend
        self.chunk: int | None = None
        self.stem = STEMS[config.kind](config)
        eps, qkv_bias = (config.norm_eps, config.qkv_bias) if isinstance(config, ASTConfig) else (1e-5, True)
        self.blocks = nn.ModuleList(
            AudioBlock(config.width, config.num_heads, config.mlp_width, eps, qkv_bias) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps)
        self.projector = build_projector(config.projector, self.stem.features, dim)
        if config.pretrained:
            load_sound_weights(self, config)

    @property
    def one_pass(self) -> bool:
        """Whether a batch passes through the blocks once, whatever it holds."""
        return self.chunk is None

    def forward(self, media: MediaBatch) -> Tensor:
        """Encodes all clips of a batch.

        Args:
            media: `values` (F, M) frames of all clips end to end, as `AudioPreprocessor` makes them.

        Returns:
            (R, D) embeddings, R = sum(media.num_tokens), clips in order.

        Raises:
            DataError: frames are not as many as the batch promises.
        """
        full = self.config.chunk_tokens
        cuts = [[min(full, n - start) for start in range(0, n, full)] for n in media.num_tokens]
        expected = tuple(sum(map(self._frames, chunks)) for chunks in cuts)
        if expected != media.lengths or media.values.shape != (sum(expected), self.config.num_mels):
            raise DataError(
                f"clips of {sum(media.num_tokens)} embeddings take ({sum(expected)}, {self.config.num_mels}) frames, found "
                f"{tuple(media.values.shape)} of {len(media.lengths)} clips: preprocessor and encoder differ in their config"
            )
        chunks = [chunk for chunks in cuts for chunk in chunks]
        if self.chunk is None or not self.training:
            return self._encode(media.values, chunks)
        groups = [chunks[start : start + self.chunk] for start in range(0, len(chunks), self.chunk)]
        frames = media.values.split([sum(map(self._frames, group)) for group in groups])
        pairs = zip(frames, groups, strict=True)
        return torch.cat([recompute(partial(self._encode, chunks=group), part) for part, group in pairs])

    def features(self, values: Tensor, chunks: Sequence[int]) -> Tensor:
        """(F, M) frames of chunks of so many embeddings -> (R, features), before the projector."""
        heard = [self.config.chunk_tokens] * len(chunks) if self.config.padding == "silence" else list(chunks)
        x = self.stem(values.to(self.norm.weight.dtype), heard)  # (P, C)
        layout = DocumentLayout.from_lengths(
            [self.config.positions_of(n) for n in heard], num_causal=0, device=values.device
        )
        for block in self.blocks:
            x = block(x, layout, self.attention_backend)
        x = self.stem.merge(self.norm(x), heard)
        if heard != list(chunks):  # embeddings of silence are left behind
            x = x.index_select(0, _on(x, runs([n * self.config.chunk_tokens for n in range(len(chunks))], chunks)))
        return x

    def _encode(self, values: Tensor, chunks: Sequence[int]) -> Tensor:
        return self.projector(self.features(values, chunks))

    def _frames(self, tokens: int) -> int:
        """Frames that a chunk of so many embeddings comes with."""
        return self.config.frames_of(self.config.chunk_tokens if self.config.padding == "silence" else tokens)

    @staticmethod
    def flops(config: PretrainedSoundConfig, dim: int) -> ItemFlops:
        """FLOPs of the forward pass over a chunk; see `mmctx.flops`."""
        stem = STEMS[config.kind]
        per_position = config.depth * (8 * config.width**2 + 4 * config.width * config.mlp_width)
        first, more = (
            config.positions_of(0),
            config.positions_of(1) - config.positions_of(0),
        )  # (first + more * t) positions
        pair = 4 * config.depth * config.width
        features = stem.width_of(config)
        projector = 2 * features * dim + (2 * dim**2 if config.projector == "mlp" else 0)
        token = more * per_position + pair * (2 * first * more + more**2) + stem.flops(config) + projector
        chunk = first * per_position + pair * first**2
        if config.padding == "none":
            return ItemFlops(chunk, token, pair * more**2)
        full = config.chunk_tokens  # heard to the end, however little of it is sound
        heard = chunk + full * (token - projector) + (full**2 - full) * pair * more**2
        return ItemFlops(heard, projector, 0)

    def empty_batch(self, device: torch.device | str) -> MediaBatch:
        """One clip of zeros that fills no slot, for ranks without sound: multiply its embedding by zero."""
        nowhere = torch.zeros(0, dtype=torch.int64, device=device)
        frames = self._frames(1)
        values = torch.zeros(frames, self.config.num_mels, device=device)
        return MediaBatch(values=values, lengths=(frames,), num_tokens=(1,), slots=nowhere, rows=nowhere)


class WhisperStem(nn.Module):
    """Two convolutions of kernel 3, the second of stride 2, and fixed positions: (F, M) -> (P, C), P = F / 2."""

    positions: Tensor  # (max_positions, C)

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.config = config
        self.features = self.width_of(config)
        self.conv1 = nn.Linear(3 * config.num_mels, config.width)  # columns: kernel tap 0, 1, 2
        self.conv2 = PairConv(config.width, config.width)
        self.register_buffer("positions", sinusoids(config.max_positions, config.width), persistent=False)

    def forward(self, frames: Tensor, chunks: Sequence[int]) -> Tensor:
        lengths = [self.config.frames_of(n) for n in chunks]
        starts = _on(frames, np.array([0, *accumulate(lengths)][:-1]))
        ends = _on(frames, np.array([*accumulate(lengths)]) - 1)
        # A row beyond a chunk is another's, or none: the convolution finds zeros there.
        before = nn.functional.pad(frames[:-1], (0, 0, 1, 0)).index_fill(0, starts, 0)
        after = nn.functional.pad(frames[1:], (0, 0, 0, 1)).index_fill(0, ends, 0)
        x = nn.functional.gelu(self.conv1(torch.cat([before, frames, after], dim=1)))  # (F, C)
        offsets = runs([0] * len(chunks), [length // 2 for length in lengths])
        x = nn.functional.gelu(self.conv2(x, starts=_on(x, offsets == 0)))  # (P, C)
        return x + self.positions.index_select(0, _on(x, offsets))

    def merge(self, x: Tensor, chunks: Sequence[int]) -> Tensor:
        """(P, C) -> (R, r * C)."""
        return x.view(sum(chunks), self.features)

    @staticmethod
    def width_of(config: WhisperConfig) -> int:
        """Features of an embedding."""
        return config.shuffle * config.width

    @staticmethod
    def flops(config: WhisperConfig) -> int:
        """Of the convolutions, for one embedding."""
        return 6 * config.shuffle * config.width * (2 * config.num_mels + config.width)


class ASTStem(nn.Module):
    """Patches of frames, learned positions, and two positions for the chunk as a whole: (F, M) -> (P, C).

    A chunk's positions are its two, then time step by time step its bands; all see each other, so their order means nothing.
    """

    def __init__(self, config: ASTConfig) -> None:
        super().__init__()
        self.config = config
        self.features = self.width_of(config)
        self.whole = nn.Parameter(torch.zeros(2, config.width))  # class and distillation token
        self.patches = nn.Linear(config.patch_size**2, config.width)  # columns: mel bin by mel bin, its frames
        self.positions = nn.Parameter(torch.randn(2 + config.bands * config.time_steps, config.width) * 0.02)

    def forward(self, frames: Tensor, chunks: Sequence[int]) -> Tensor:
        config = self.config
        steps = [config.shuffle * n for n in chunks]
        firsts = [0, *accumulate(config.frames_of(n) for n in chunks)][:-1]
        where = runs(firsts, steps, config.time_stride)  # (steps,) first frame of each step
        index = where[:, None] + np.arange(config.patch_size)
        x = frames.index_select(0, _on(frames, index.reshape(-1))).view(*index.shape, -1)  # (steps, frames, M)
        x = x.unfold(2, config.patch_size, config.frequency_stride)  # (steps, frames, b, bins)
        x = self.patches(x.permute(0, 2, 3, 1).flatten(2))  # (steps, b, C)
        step = runs([0] * len(chunks), steps)[:, None]
        places = 2 + np.arange(config.bands) * config.time_steps + step  # (steps, b), as Transformers flattens the grid
        x = x.flatten(0, 1) + self.positions.index_select(0, _on(x, places.reshape(-1)))
        whole = (self.whole + self.positions[:2]).to(x.dtype)
        parts = x.split([config.bands * n for n in steps])
        return torch.cat([part for patches in parts for part in (whole, patches)])

    def merge(self, x: Tensor, chunks: Sequence[int]) -> Tensor:
        """(P, C) -> (R, r * b * C)."""
        sizes = [self.config.positions_of(n) for n in chunks]
        starts = [2 + start for start in [0, *accumulate(sizes)][:-1]]
        patches = x.index_select(0, _on(x, runs(starts, [size - 2 for size in sizes])))
        return patches.view(sum(chunks), self.features)

    @staticmethod
    def width_of(config: ASTConfig) -> int:
        """Features of an embedding."""
        return config.shuffle * config.bands * config.width

    @staticmethod
    def flops(config: ASTConfig) -> int:
        """Of the patch embedding, for one embedding."""
        return 2 * config.shuffle * config.bands * config.width * config.patch_size**2


STEMS: dict[str, Any] = {"whisper": WhisperStem, "ast": ASTStem}


def runs(starts: Sequence[int], lengths: Sequence[int], stride: int = 1) -> np.ndarray:
    """Places `start, start + stride ...` of runs of these lengths, end to end, (sum of lengths,) int64."""
    sizes = np.asarray(lengths, np.int64)
    offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(np.asarray(starts, np.int64), sizes) + stride * offsets


def _on(like: Tensor, values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device, non_blocking=True)
