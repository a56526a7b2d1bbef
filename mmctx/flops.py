"""How much arithmetic a batch is: bins are balanced by it, `mmctx plan` foretells it, utilisation is measured against it.

Model FLOPs, forward and backward (three times forward), by the usual convention (PaLM, Chowdhery et al. 2022, appendix B): two for each
multiply-add, 6 P T for P matrix parameters on T tokens, attention counted over the pairs that may see each other, so that causal attention
costs half of bidirectional. Encoders count, and attention inside a picture and a clip. Recomputation and optimizer are not counted; nor are
the products of similarity losses, which are few. Three times forward holds a gradient of pixels and frames that nobody needs, and of frozen
modules: PyTorch, which counts what runs, finds a little less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmctx.encoders.audio import AudioEncoder
from mmctx.encoders.image import ImageEncoder
from mmctx.model import VOCAB_MULTIPLE, ModelConfig
from mmctx.pack import PackedBatch
from mmctx.transformer import TransformerConfig

FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of one training step, by what is in the batch. All are integers: no machine rounds them otherwise.

    Attributes:
        token: of the trunk's matrices, for each token.
        label: of the output head, for each position with a label.
        image: of the image encoder, for each picture.
        audio_token: of the sound encoder, for each embedding it makes, as if it were a clip of its own.
        windows: window of each layer, None for a global one.
        width: H * d, channels of attention.
        audio_square: of attention in the sound encoder, times the square of the embeddings of a clip (or chunk of one).
        audio_chunk: embeddings that see each other at most.
    """

    token: int
    label: int
    image: int
    audio_token: int
    windows: tuple[int | None, ...]
    width: int
    audio_square: int = 0
    audio_chunk: int = 1

    def attention(self, lengths: np.ndarray, causal: bool) -> np.ndarray:
        """FLOPs of attention inside documents of these lengths, any shape of int64, over all layers."""
        pairs = np.zeros_like(lengths)
        for window in set(self.windows):
            pairs += self.windows.count(window) * count_pairs(lengths, causal, window)
        return 4 * FORWARD_AND_BACKWARD * self.width * pairs

    def clips(self, num_tokens: np.ndarray) -> np.ndarray:
        """FLOPs of the sound encoder over clips of so many embeddings (n,), attention among them included."""
        num_tokens = np.asarray(num_tokens, np.int64)
        whole, rest = np.divmod(num_tokens, self.audio_chunk)
        squares = whole * self.audio_chunk**2 + rest**2
        return num_tokens * self.audio_token + (squares - num_tokens) * self.audio_square

    def batch(self, batch: PackedBatch) -> int:
        """FLOPs of a training step over a packed batch, from what the host knows of it."""
        layout, media = batch.layout, batch.media
        lengths = np.array(layout.lengths, np.int64)
        total = batch.num_tokens * self.token
        total += sum(len(positions) for positions in batch.label_positions.values()) * self.label
        total += int(self.attention(lengths[: layout.num_causal], causal=True).sum())
        total += int(self.attention(lengths[layout.num_causal :], causal=False).sum())
        if "image" in media:
            total += len(media["image"].num_tokens) * self.image
        if "audio" in media:
            total += int(self.clips(np.array(media["audio"].num_tokens)).sum())
        return total


def count_pairs(lengths: np.ndarray, causal: bool, window: int | None) -> np.ndarray:
    """Pairs of a query and a key that it may see; a window holds a token itself and what is before it (and behind, without `causal`)."""
    lengths = np.asarray(lengths, np.int64)
    reach = lengths if window is None else np.minimum(lengths, window)
    looking_back = reach * (reach + 1) // 2 + (lengths - reach) * reach
    return looking_back if causal else 2 * looking_back - lengths


def estimate_work(config: ModelConfig, vocab_size: int) -> Work:
    """The work of a model, from its config alone: encoders are run once without data, on the meta device."""
    image, audio = config.image, config.audio
    trunk = config.transformer
    rows = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return Work(
        token=2 * FORWARD_AND_BACKWARD * trunk_matrices(trunk),
        label=2 * FORWARD_AND_BACKWARD * (rows + trunk.width * trunk.head_transform) * trunk.width,
        image=FORWARD_AND_BACKWARD * ImageEncoder.flops(image, trunk.width) if image else 0,
        audio_token=FORWARD_AND_BACKWARD * AudioEncoder.flops(audio, trunk.width) if audio else 0,
        windows=tuple(trunk.layer_window(layer) for layer in range(trunk.depth)),
        width=trunk.num_heads * trunk.head_width,
        audio_square=4 * FORWARD_AND_BACKWARD * audio.depth * audio.width * audio.shuffle**2 if audio else 0,
        audio_chunk=audio.chunk_frames // audio.frames_per_token if audio else 1,
    )


def trunk_matrices(config: TransformerConfig) -> int:
    """Parameters of the matrices that every token passes."""
    heads = 2 * config.num_heads + 2 * config.kv_heads  # queries and output, keys and values
    mlp = 3 if config.activation == "swiglu" else 2
    return config.depth * config.width * (heads * config.head_width + mlp * config.mlp_width)
