"""Sound: from log-mel frames to embeddings, all clips of a batch packed end to end.

Shapes: F frames of all clips, M mel bins, L frames in slots, C width, P positions of the transformer (L = P * stride),
r shuffle factor, R embeddings of all clips (P = R * r),
D trunk width, H heads of d channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmctx.activations import recompute
from mmctx.attention import attention
from mmctx.encoders.audio_front_end import AudioPreprocessor
from mmctx.encoders.item_flops import ItemFlops
from mmctx.encoders.log_mel import AudioEncoderConfig
from mmctx.encoders.projector import build_projector
from mmctx.errors import DataError
from mmctx.layout import DocumentLayout
from mmctx.pack import MediaBatch

__all__ = ["AudioEncoder", "AudioEncoderConfig", "AudioPreprocessor"]


class AudioEncoder(nn.Module):
    """Clips to embeddings: convolutions of stride 2, sinusoidal positions, bidirectional blocks (Whisper), projector.

    A clip longer than `chunk_seconds` is cut into chunks that do not see each other, as if each were a clip.

    Args:
        config: sizes of the encoder.
        dim: D, width of the trunk.
        attention_backend: see `mmctx.attention.attention`.

    Attributes:
        chunk: chunks of sound encoded at a time while training, each group once more in the backward pass; None takes all and keeps all.
    """

    positions: Tensor  # (positions of a full chunk, C)

    def __init__(self, config: AudioEncoderConfig, dim: int, attention_backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.attention_backend = attention_backend
        self.chunk: int | None = None
        num_convs = config.stride.bit_length() - 1
        in_widths = [config.num_mels] + [config.width] * (num_convs - 1)
        self.convs = nn.ModuleList(PairConv(in_width, config.width) for in_width in in_widths)
        # Without this norm the features would start far smaller than the positions added to them, and drown in them.
        self.stem_norm = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(AudioBlock(config.width, config.num_heads) for _ in range(config.depth))
        self.projector = build_projector(config.projector, config.width * config.shuffle, dim)
        self.register_buffer(
            "positions", sinusoids(config.chunk_frames // config.stride, config.width), persistent=False
        )

    @property
    def one_pass(self) -> bool:
        """Whether a batch passes through the blocks once, whatever it holds."""
        return self.chunk is None

    def forward(self, media: MediaBatch) -> Tensor:
        """Encodes all clips of a batch.

        Args:
            media: `values` (F, M) frames of all clips end to end, `lengths` the frames of each clip.

        Returns:
            (R, D) embeddings, R = sum(media.num_tokens), clips in order.

        Raises:
            DataError: frames or embeddings are not as many as the batch promises.
        """
        per_token = self.config.frames_per_token
        expected = tuple(-(-n // per_token) for n in media.lengths)
        if expected != media.num_tokens:
            raise DataError(
                f"clips of {sum(media.lengths)} frames become {sum(expected)} embeddings of {per_token} frames, but the "
                f"batch has room for {sum(media.num_tokens)}: preprocessor and encoder differ in their config"
            )
        if media.values.shape != (sum(media.lengths), self.config.num_mels):
            raise DataError(
                f"the clips should hold ({sum(media.lengths)}, {self.config.num_mels}) frames, found "
                f"{tuple(media.values.shape)}"
            )
        chunks = cut_clips(media.lengths, self.config.chunk_frames)
        if self.chunk is None or not self.training:
            return self._encode(media.values, chunks)
        groups = [chunks[start : start + self.chunk] for start in range(0, len(chunks), self.chunk)]
        frames = media.values.split([sum(group) for group in groups])
        pairs = zip(frames, groups, strict=True)
        return torch.cat([recompute(partial(self._encode, chunks=group), part) for part, group in pairs])

    def _encode(self, values: Tensor, chunks: Sequence[int]) -> Tensor:
        """(F, M) frames of chunks of these lengths -> (R, D)."""
        device = values.device
        slots = Slots.of_chunks(chunks, self.config.frames_per_token)
        x = self.embed_frames(values, slots)
        positions = [n * self.config.shuffle for n in slots.num_tokens]
        layout = DocumentLayout.from_lengths(positions, num_causal=0, device=device)
        for block in self.blocks:
            x = block(x, layout, self.attention_backend)
        return self.projector(x.view(sum(slots.num_tokens), -1))  # (R, r * C)

    def embed_frames(self, values: Tensor, slots: Slots) -> Tensor:
        """Convolutions and positions: (F, M) frames -> (P, C)."""
        offsets = torch.from_numpy(slots.offsets).to(values.device, non_blocking=True)  # (L,)
        real = torch.from_numpy(slots.real).to(values.device, non_blocking=True)[:, None]  # (L, 1)
        x = values.to(self.positions.dtype)
        if not slots.real.all():
            index = torch.from_numpy(np.flatnonzero(slots.real)).to(values.device, non_blocking=True)
            x = x.new_zeros(len(slots.real), x.shape[1]).index_copy(0, index, x)  # (L, M)
        for conv in self.convs:
            offsets, real = offsets[::2], real[::2]
            # Bias and GELU make padding non-zero: zero it again, or the next layer's last real frame would see it.
            x = nn.functional.gelu(conv(x, starts=offsets == 0)) * real  # (L/2, C), (L/4, C) ... (P, C)
        return self.stem_norm(x) + self.positions[offsets // self.config.stride]

    @staticmethod
    def flops(config: AudioEncoderConfig, dim: int) -> ItemFlops:
        """FLOPs of the forward pass over a chunk."""
        with torch.device("meta"):
            encoder = AudioEncoder(config, dim)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            encoder(encoder.empty_batch("meta"))
        square = 4 * config.depth * config.width * config.shuffle**2
        return ItemFlops(item=0, token=counter.get_total_flops(), square=square)

    def empty_batch(self, device: torch.device | str) -> MediaBatch:
        """One clip of zeros that fills no slot, for ranks without sound: multiply its embedding by zero."""
        nowhere = torch.zeros(0, dtype=torch.int64, device=device)
        frames = self.config.frames_per_token
        values = torch.zeros(frames, self.config.num_mels, device=device)
        return MediaBatch(values=values, lengths=(frames,), num_tokens=(1,), slots=nowhere, rows=nowhere)


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Where each frame of each chunk lies, on the host.

    A chunk of f frames takes a slot of ceil(f / per_token) * per_token, where per_token = stride * shuffle. Slots begin
    at multiples of the stride, so after k halvings position p still belongs to the same slot, and it is real where its
    frame p * 2**k was: `[::2]` carries all arrays to the next level. With shuffle 1 the last level has no padding left;
    otherwise the slot's last positions are silence that belongs to the chunk.

    Attributes:
        offsets: (L,) int64 position of each frame in its slot.
        real: (L,) bool, false for padding.
        num_tokens: embeddings of each chunk.
    """

    offsets: np.ndarray
    real: np.ndarray
    num_tokens: list[int]

    @classmethod
    def of_chunks(cls, chunks: Sequence[int], per_token: int) -> Slots:
        """Gives each chunk of so many frames a slot."""
        frames = np.array(chunks, dtype=np.int64)
        num_tokens = -(-frames // per_token)
        sizes = num_tokens * per_token
        offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return cls(offsets=offsets, real=offsets < np.repeat(frames, sizes), num_tokens=num_tokens.tolist())


def cut_clips(lengths: Sequence[int], chunk_frames: int) -> list[int]:
    """Clips of `lengths` frames as chunks of at most `chunk_frames`."""
    return [min(chunk_frames, length - start) for length in lengths for start in range(0, length, chunk_frames)]


class PairConv(nn.Module):
    """Convolution of kernel 3, stride 2 and padding 1 over chunks that lie end to end.

    Output i sees frames 2i-1, 2i and 2i+1. The last two are one row of a view; the first ends the row above, or is zero
    where a chunk starts. As windows times a matrix this needs no gaps between chunks, and on CPU it is 1.2 to 1.3
    times as fast as `conv1d`.
    """

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * in_width, width)  # columns: kernel tap 0, 1, 2
        nn.init.kaiming_normal_(self.linear.weight)

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        """(L, C_in) and (L/2,) bool, true where a chunk starts -> (L/2, C). Rows that are padding must be zero."""
        pairs = x.view(len(x) // 2, -1)  # (L/2, 2 * C_in)
        before = nn.functional.pad(pairs[:-1, x.shape[1] :], (0, 0, 1, 0)).masked_fill(starts[:, None], 0)
        return self.linear(torch.cat([before, pairs], dim=1))


class AudioBlock(nn.Module):
    """Pre-norm transformer block: bidirectional attention inside each chunk, GELU feed-forward layer."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_width: int | None = None,
        norm_eps: float = 1e-5,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        mlp_width = mlp_width or 4 * width
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, norm_eps)
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, norm_eps)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width))

    def forward(self, x: Tensor, layout: DocumentLayout, backend: str) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(len(x), 3, self.num_heads, -1).unbind(1)  # (R, H, d) each
        x = x + self.out(self.attend(q, k, v, layout, backend).reshape(x.shape))
        return x + self.mlp(self.norm2(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, backend: str) -> Tensor:
        """What the positions of a chunk tell each other: (R, H, d)."""
        return attention(q, k, v, layout, backend=backend)


def sinusoids(length: int, width: int) -> Tensor:
    """Fixed positions (length, width): sines, then cosines, wavelengths 2 pi to 20,000 pi."""
    rates = torch.exp(torch.arange(width // 2) * (-math.log(10_000) / max(width // 2 - 1, 1)))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
