"""The whole model: encoders put media embeddings between text embeddings, the trunk reads the flat sequence, objectives read its states.

Shapes: T tokens, D width, V vocabulary, S media slots, R rows of an encoder's output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmctx.activations import ActivationsConfig
from mmctx.config import StrictModel
from mmctx.encoders.audio import AudioEncoder, AudioEncoderConfig
from mmctx.encoders.image import ImageEncoder, ImageEncoderConfig
from mmctx.errors import ConfigError
from mmctx.kv_cache import Branches, KVCache
from mmctx.layout import DocumentLayout
from mmctx.objectives import AnyObjective, ComparingHalf, LossSum, Roster, build_model_halves
from mmctx.objectives.output_head import HeadTransform, OutputHead
from mmctx.objectives.token_loss import TokenLoss
from mmctx.pack import PackedBatch
from mmctx.ranges import timed
from mmctx.rope import grid_positions
from mmctx.transformer import Transformer, TransformerConfig

ENCODERS: dict[str, type[nn.Module]] = {"image": ImageEncoder, "audio": AudioEncoder}
VOCAB_MULTIPLE = 64  # embedding rows are rounded up to this: aligned matrix products are faster


class ModelConfig(StrictModel):
    """Trunk and encoders."""

    transformer: TransformerConfig = TransformerConfig()
    """The trunk."""
    image: ImageEncoderConfig | None = None
    """Encoder of pictures; null for a model that sees none."""
    audio: AudioEncoderConfig | None = None
    """Encoder of sound; null for a model that hears none."""


class StepOutputs(NamedTuple):
    """What a micro-batch adds to a global step. Named tuples and dicts all through: wrappers look into them for tensors."""

    losses: dict[str, LossSum]
    """Of objectives whose loss is a sum over documents."""
    embedded: dict[str, dict[str, Tensor]]
    """Of each `ComparingHalf`, what it embedded."""


class MmctxModel(nn.Module):
    """Encoders, trunk and objective heads.

    Args:
        config: shapes.
        objectives: named objectives; each may own parameters.
        vocab_size: ids that the tokenizer knows, special tokens included.
    """

    def __init__(self, config: ModelConfig, objectives: Mapping[str, AnyObjective], vocab_size: int) -> None:
        super().__init__()
        width = config.transformer.width
        self.config, self.vocab_size = config, vocab_size
        num_rows = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.embedding = nn.Embedding(num_rows, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.encoders = nn.ModuleDict(
            {kind: ENCODERS[kind](part, width) for kind in ENCODERS if (part := getattr(config, kind)) is not None}
        )
        self.trunk = Transformer(config.transformer)
        self.objectives = build_model_halves(objectives, width)
        # Without an objective that predicts tokens a head would never get a gradient, which DDP does not allow.
        predicts, trunk = any(isinstance(m, TokenLoss) for m in self.objectives.values()), config.transformer
        self.head = nn.Linear(width, num_rows, bias=False) if predicts and not trunk.tie_embeddings else None
        self.head_transform = HeadTransform(trunk, num_rows) if predicts and trunk.head_transform else None

    def set_activations(self, config: ActivationsConfig) -> None:
        """What the trunk and the encoders keep for the backward pass from now on; losses and gradients stay the same."""
        self.trunk.set_activations(config)
        for encoder in self.encoders.values():
            encoder.chunk = config.media_chunk  # type: ignore[assignment]

    def set_compiler(self, backend: str | None) -> None:
        """Compiles the trunk's blocks from now on, by a backend of `torch.compile` such as `inductor`; None does not."""
        self.trunk.set_compiler(backend)

    @property
    def head_weight(self) -> Tensor:
        """(V, D) output head."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def output_head(self) -> OutputHead:
        """What makes logits of hidden states."""
        return OutputHead(self.head_weight, self.head_transform)

    def embed(self, batch: PackedBatch) -> Tensor:
        """Input embeddings (T, D): text by lookup, media by their encoder, scattered into their slots."""
        embeddings = self.embedding(batch.input_ids)  # (T, D)
        if unknown := set(batch.media) - set(self.encoders):
            raise ConfigError(
                f"the batch holds {sorted(unknown)} but model.{min(unknown)} is null; configure an encoder for it"
            )
        for kind, encoder in self.encoders.items():
            media = batch.media.get(kind)
            if media is None and not self.training:
                continue
            # Other ranks may have some: an encoder that sat out here would leave their gradient reduction hanging. Alone, too, so that
            # the optimizer sees zeros rather than no gradient, whatever the number of ranks.
            idle = media is None or not media.num_tokens
            with timed(f"{kind} encoder"):
                rows = encoder(encoder.empty_batch(embeddings.device) if idle else media).to(embeddings.dtype)  # type: ignore[operator]
            if idle:
                embeddings, rows = embeddings + rows.sum() * 0, rows[:0]
            if media is not None:
                rows = rows.index_select(0, media.rows)  # (S, D)
                rows = rows if media.exchange is None else media.exchange(rows)
                embeddings = embeddings.index_copy(0, media.slots, rows)
        return embeddings

    def positions(self, batch: PackedBatch) -> Tensor:
        """Positions (T,), or (T, 3) where pictures have rows and columns."""
        pictures = batch.media.get("image")
        if self.config.transformer.picture_positions == "sequence" or pictures is None:
            return batch.position_ids
        return grid_positions(batch.position_ids, pictures.slots, math.isqrt(pictures.num_tokens[0]))  # all are square

    def encode(self, batch: PackedBatch) -> Tensor:
        """Hidden states (T, D) of every token."""
        return self.trunk(self.embed(batch), self.positions(batch), batch.layout)

    def forward(self, batch: PackedBatch, embed_only: bool = False) -> StepOutputs:
        """What a micro-batch adds to the global step.

        Args:
            batch: of this rank.
            embed_only: leave out the losses, when only `embedded` is wanted.
        """
        hidden = self.encode(batch)
        if batch.lent is not None:
            hidden = batch.lent.append(hidden)
        losses: dict[str, LossSum] = {}
        embedded: dict[str, dict[str, Tensor]] = {}
        for name, objective in self.objectives.items():
            with timed(f"loss of {name}"):
                if isinstance(objective, ComparingHalf):
                    embedded[name] = objective.embed_batch(hidden, batch)
                elif not embed_only:
                    losses[name] = objective(hidden, batch, self.output_head)
        return StepOutputs(losses, embedded)

    def losses(self, batch: PackedBatch) -> dict[str, LossSum]:
        """Each objective's loss sum and count over the batch, as if it were a global step of its own."""
        outputs, roster = self(batch), Roster.of(batch)
        return {
            name: outputs.losses[name]
            if name in outputs.losses
            else LossSum(half.compare(outputs.embedded[name], roster), half.count_all(roster))  # type: ignore[operator]
            for name, half in self.objectives.items()
        }

    def next_token_logits(self, hidden: Tensor) -> Tensor:
        """Logits (N, vocab_size) of hidden states (N, D), for generation."""
        return self.output_head.logits(hidden, self.vocab_size)

    def prefill(self, prompts: PackedBatch, cache: KVCache) -> Tensor:
        """Reads prompts into an empty cache: the last hidden state of each, (B, D)."""
        cache.advance(prompts.layout)
        hidden = self.trunk(self.embed(prompts), self.positions(prompts), prompts.layout, cache)  # (T, D)
        return hidden[prompts.layout.cu_seqlens[1:].long() - 1]

    def branch(self, continuations: Sequence[Tensor], cache: KVCache, row: int) -> Tensor:
        """Hidden states (T, D) of several continuations of one prompt, laid end to end.

        Args:
            continuations: ids of each, text alone.
            cache: after `prefill`; it stays as it is.
            row: the prompt's number.
        """
        ids = torch.cat(list(continuations))
        lengths = [len(part) for part in continuations]
        layout = DocumentLayout.from_lengths(lengths, len(lengths), device=ids.device)
        branches = Branches(cache, row, layout)
        return self.trunk(self.embedding(ids), branches.positions, layout, branches)

    def step(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """One generation step: ids (B,) in, hidden states (B, D) out."""
        layout = DocumentLayout.from_lengths([1] * len(input_ids), len(input_ids), device=input_ids.device)
        return self.trunk(self.embedding(input_ids), cache.advance(layout), layout, cache)


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module, shared ones once."""
    return sum(p.numel() for p in module.parameters())
