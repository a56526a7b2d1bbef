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

from mmctx.attention.memory import MemoryConfig
from mmctx.encoders.image import ImageEncoder
from mmctx.encoders.sound import SOUND_ENCODERS
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
        image: of the image encoder, for each picture, however large; where all are of one size, that is all of it.
        audio_token: of the sound encoder, for each embedding it makes, as if it saw itself alone.
        windows: window of each layer, None for a global one.
        width: H * d, channels of attention.
        memory: of the layers that look beyond their window; None if none does.
        audio_square: of attention in the sound encoder, for each ordered pair of different embeddings of a clip (or chunk of one).
        audio_chunk: embeddings that see each other at most.
        image_token: of the image encoder, for each embedding it makes, as if it saw itself alone, where sizes differ.
        image_square: of attention in the image encoder, for each ordered pair of different embeddings of a picture, where sizes differ.
        audio_item: of the sound encoder, for each clip (or chunk of one), however long.
    """

    token: int
    label: int
    image: int
    audio_token: int
    windows: tuple[int | None, ...]
    width: int
    audio_square: int = 0
    audio_chunk: int = 1
    audio_item: int = 0
    image_token: int = 0
    image_square: int = 0
    memory: MemoryConfig | None = None

    @property
    def audio_share(self) -> int:
        """Of an embedding of sound where its clip is not known: its share of a full chunk, attention left out."""
        return self.audio_token + self.audio_item // self.audio_chunk

    def attention(self, lengths: np.ndarray, causal: bool, start: np.ndarray | int = 0) -> np.ndarray:
        """FLOPs of attention inside documents of these lengths, any shape of int64, over all layers; what memories search included, whose
        products have no backward pass.

        Args:
            lengths: of documents, or of pieces of a stream.
            causal: which way they attend.
            start: tokens of the stream before a piece: layers with a window look back beyond it.
        """
        lengths = np.asarray(lengths, np.int64)
        pairs = np.zeros_like(lengths)
        for window in set(self.windows):
            before = start if window is not None else 0
            seen = count_pairs(before + lengths, causal, window) - count_pairs(np.asarray(before), causal, window)
            pairs += self.windows.count(window) * seen
        searched = np.zeros_like(lengths)
        memory = self.memory if causal else None
        for layer in memory.layers if memory is not None else ():
            assert memory is not None
            window = self.windows[layer] or 0
            old, new = (np.maximum(np.asarray(n) - window, 0) for n in (start, start + lengths))  # queries with a past
            for total, reach in ((pairs, min(memory.top_k, memory.tokens)), (searched, memory.tokens)):
                total += count_pairs(new, causal, reach) - count_pairs(old, causal, reach)
        return 4 * FORWARD_AND_BACKWARD * self.width * pairs + 2 * self.width * searched

    def pictures(self, num_tokens: np.ndarray) -> np.ndarray:
        """FLOPs of the image encoder over pictures of so many embeddings (n,)."""
        num_tokens = np.asarray(num_tokens, np.int64)
        return self.image + num_tokens * self.image_token + (num_tokens**2 - num_tokens) * self.image_square

    def clips(self, num_tokens: np.ndarray) -> np.ndarray:
        """FLOPs of the sound encoder over clips of so many embeddings (n,), attention among them included."""
        num_tokens = np.asarray(num_tokens, np.int64)
        whole, rest = np.divmod(num_tokens, self.audio_chunk)
        squares = whole * self.audio_chunk**2 + rest**2
        chunks = whole + (rest > 0)
        return num_tokens * self.audio_token + (squares - num_tokens) * self.audio_square + chunks * self.audio_item

    def batch(self, batch: PackedBatch) -> int:
        """FLOPs of a training step over a packed batch, from what the host knows of it."""
        layout, media = batch.layout, batch.media
        lengths = np.array(layout.lengths, np.int64)
        total = batch.num_tokens * self.token
        total += sum(len(positions) for positions in batch.label_positions.values()) * self.label
        start = np.zeros_like(lengths)
        start[:1] = batch.stream_start or 0
        total += int(self.attention(lengths[: layout.num_causal], causal=True, start=start[: layout.num_causal]).sum())
        total += int(self.attention(lengths[layout.num_causal :], causal=False).sum())
        if "image" in media:
            total += int(self.pictures(np.array(media["image"].num_tokens)).sum())
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
    sight = ImageEncoder.flops(image, trunk.width) if image else None
    sound = SOUND_ENCODERS[audio.kind].flops(audio, trunk.width) if audio else None
    rows = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return Work(
        token=2 * FORWARD_AND_BACKWARD * trunk_matrices(trunk),
        label=2 * FORWARD_AND_BACKWARD * (rows + trunk.width * trunk.head_transform) * trunk.width,
        image=FORWARD_AND_BACKWARD * sight.item if sight else 0,
        audio_token=FORWARD_AND_BACKWARD * sound.token if sound else 0,
        windows=tuple(trunk.layer_window(layer) for layer in range(trunk.depth)),
        width=trunk.num_heads * trunk.head_width,
        audio_square=FORWARD_AND_BACKWARD * sound.square if sound else 0,
        audio_chunk=audio.chunk_tokens if audio else 1,
        audio_item=FORWARD_AND_BACKWARD * sound.item if sound else 0,
        image_token=FORWARD_AND_BACKWARD * sight.token if sight else 0,
        image_square=FORWARD_AND_BACKWARD * sight.square if sight else 0,
        memory=trunk.memory,
    )


def trunk_matrices(config: TransformerConfig) -> int:
    """Parameters of the matrices that every token passes."""
    heads = 2 * config.num_heads + 2 * config.kv_heads  # queries and output, keys and values
    mlp = 3 if config.activation == "swiglu" else 2
    return config.depth * config.width * (heads * config.head_width + mlp * config.mlp_width)
