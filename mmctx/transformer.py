"""The trunk: a causal or bidirectional transformer over one flat sequence of packed documents.

A superset of Llama, Mistral, Qwen2 and Qwen3: RMSNorm (or LayerNorm), rotary positions with scaling, grouped-query attention,
optional query/key norm and biases, SwiGLU, per-layer windows. And of GPT-2 and BERT: learned positions, GELU, norms behind instead of
before.

Shapes: T tokens, D width, H query heads, K key/value heads, d head width, F feed-forward width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Annotated, Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, model_validator
from torch import Tensor, nn

from mmctx.activations import KEEP_ALL, ActivationsConfig, in_tiles, recompute
from mmctx.compiling import run
from mmctx.config import StrictModel
from mmctx.feed_forward import Activation, build_feed_forward
from mmctx.kv_cache import Branches, KVCache
from mmctx.layout import DocumentLayout
from mmctx.learned_positions import LearnedPositions, Resize
from mmctx.offload import HostOffload
from mmctx.parallel.dropout import shard_dropout
from mmctx.parallel.exchange import TokenShards
from mmctx.parallel.ulysses import sequence_attention
from mmctx.ranges import timed
from mmctx.rope import RopeConfig, Rotary, rotate


class TransformerConfig(StrictModel):
    """Shape of the trunk."""

    pretrained: str | None = None
    """Folder of a Transformers model (Llama, Mistral, Qwen2, Qwen3, GPT-2 or BERT) whose weights a fresh run starts from. The shape comes
    from its `config.json`: what is written here beside must agree, but for `rope`, `windows` and `learned_positions`, which may change."""
    width: int = Field(default=192, ge=1)
    """D."""
    depth: int = Field(default=4, ge=1)
    """Number of blocks."""
    num_heads: int = Field(default=4, ge=1)
    """H."""
    num_kv_heads: int | None = None
    """K; null means H (no grouping)."""
    head_dim: int | None = None
    """d; null means D / H."""
    mlp_width: int = Field(default=512, ge=1)
    """F."""
    activation: Activation = "swiglu"
    """Of the MLP: `swiglu` is gated, `gelu` and `gelu_tanh` (GELU's approximation by tanh, GPT-2's) are not."""
    mlp_bias: bool = False
    """Biases in the MLP."""
    rope: RopeConfig = RopeConfig()
    """Positions."""
    learned_positions: int | None = Field(default=None, ge=1)
    """Learned position embeddings, so many, in place of `rope`: no document may be longer."""
    resize_positions: Resize | None = None
    """What becomes of a folder's learned positions if `learned_positions` asks for more of them, see `mmctx.learned_positions`."""
    picture_positions: Literal["sequence", "grid"] = "sequence"
    """sequence: a picture's tokens count on as text does. grid: half of the frequencies turn by row and column instead (for comparison)."""
    qk_norm: bool = True
    """A norm on every head's queries and keys before rotation, as in Qwen3."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections, as in Qwen2."""
    out_bias: bool = False
    """A bias on the output projection of attention."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (Zhang and Sennrich 2019), or LayerNorm, which on CPU has a fused kernel and takes a fifth of the time."""
    norm_eps: float = 1e-6
    """Epsilon of every norm."""
    norm_place: Literal["pre", "post"] = "pre"
    """Norms before attention and MLP and one at the end; or `post`, behind what each adds to the stream, as in BERT."""
    embedding_norm: bool = False
    """A norm on the embeddings, positions included, as in BERT."""
    head_transform: bool = False
    """Before the output head a dense layer, GELU and a norm, and biases on the logits, as BERT's masked LM head."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on what each attention and MLP adds to the residual stream."""
    tie_embeddings: bool = True
    """The output head is the input embedding."""
    windows: tuple[Annotated[int, Field(ge=1)] | None, ...] = Field(default=(None,), min_length=1)
    """Tokens that each layer sees, itself included, null for all; repeated over the depth: `[512, 512, 512, null]` makes every fourth
    layer global."""
    attention: str = "auto"
    """Attention backend, one of those that `mmctx doctor` lists."""

    @model_validator(mode="wrap")
    @classmethod
    def _from_folder(cls, tree: Any, build: ModelWrapValidatorHandler[TransformerConfig]) -> TransformerConfig:
        """Shape from `pretrained`. A tree that says everything, as checkpoints do, needs no folder."""
        told = isinstance(tree, Mapping) and tree.get("pretrained") is not None
        if not told or cls.model_fields.keys() <= tree.keys():
            return build(tree)
        from mmctx.pretrained.shape import fill_in  # slow to import

        return fill_in(tree, build)

    @model_validator(mode="after")
    def _check(self) -> TransformerConfig:
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} is not a multiple of num_heads {self.num_heads}; set head_dim or change one"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}")
        if self.learned_positions is None and self.head_width % 2:
            raise ValueError(f"the head width {self.head_width} must be even for rotary positions")
        if self.learned_positions is not None and self.picture_positions == "grid":
            raise ValueError("picture_positions: grid turns by rope, but learned_positions is set; remove one of them")
        if self.picture_positions == "grid" and self.head_width % 8:
            raise ValueError(f"the head width {self.head_width} must be a multiple of 8 for picture_positions: grid")
        return self

    @property
    def kv_heads(self) -> int:
        """K, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """d, resolved."""
        return self.head_dim or self.width // self.num_heads

    def make_norm(self, size: int) -> nn.Module:
        """A norm over the last `size` channels."""
        return {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[self.norm](size, eps=self.norm_eps)

    def layer_window(self, layer: int) -> int | None:
        """Window of one layer, None for a global one."""
        return self.windows[layer % len(self.windows)]


class Attention(nn.Module):
    """Grouped-query self-attention within documents: (T, D) -> (T, D), in the steps that `Block` takes."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_width
        self.window, self.backend = config.layer_window(layer), config.attention
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(self.heads * self.head_dim, config.width, bias=config.out_bias)
        self.q_norm = config.make_norm(self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = config.make_norm(self.head_dim) if config.qk_norm else nn.Identity()

    def project(self, x: Tensor, rope: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (T, H, d) and keys (T, K, d), values (T, K, d).

        `rope` holds cosines and sines (T, 1, d / 2); nothing where positions are learned.
        """
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (T, H + 2K, d)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        return (rotate(q, *rope), rotate(k, *rope), v) if rope else (q, k, v)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, cache: KVCache | Branches | None
    ) -> Tensor:
        """What the tokens of a document tell each other: (T, H, d)."""
        if cache is None:
            return sequence_attention(q, k, v, layout, window=self.window, backend=self.backend)
        return cache.attend(self.layer, q, k, v, layout, window=self.window, backend=self.backend)


class Block(nn.Module):
    """Attention and MLP, each added to the stream, with a norm before or after: (T, D) -> (T, D).

    Attributes:
        activations: what is kept for the backward pass.
        compiler: backend of `torch.compile` for all but attention, which stays outside: it knows document lengths as host integers.
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = config.make_norm(config.width)
        self.attention = Attention(config, layer)
        self.mlp_norm = config.make_norm(config.width)
        self.mlp = build_feed_forward(config.width, config.mlp_width, config.activation, config.mlp_bias)
        self.pre_norm = config.norm_place == "pre"
        self.dropout = config.dropout
        self.layer, self.activations = layer, KEEP_ALL
        self.compiler: str | None = None

    @property
    def recomputes(self) -> bool:
        """Whether the forward pass keeps little and the backward pass computes it again."""
        return self.training and self.activations.recomputes(self.layer)

    def project(self, x: Tensor, rope: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the stream (T, D), see `Attention.project`."""
        return self.attention.project(self.attention_norm(x) if self.pre_norm else x, rope)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, ...], layout: DocumentLayout, cache: KVCache | Branches | None = None
    ) -> Tensor:
        """See the class."""
        compiler = self.compiler if cache is None else None  # generation calls with sizes of its own

        def attend(x: Tensor) -> Tensor:
            with timed("trunk: attention"):
                q, k, v = run(compiler, _project, self, x, *rope)
                mixed = self.attention.attend(q, k, v, layout, cache)
                return run(compiler, _merge, self, x, mixed, shards=layout.shards)

        def feed_forward(x: Tensor) -> Tensor:
            with timed("trunk: MLP"):
                return run(compiler, _feed_forward, self, x, shards=layout.shards)

        random = self.dropout > 0
        tile = self.activations.mlp_tile if self.training else None
        first = attend if tile is not None else lambda x: feed_forward(attend(x))
        if self.recomputes:
            x = recompute(first, x, keep_attention=self.activations.checkpoint == "selective", random=random)
        else:
            x = first(x)
        return x if tile is None else in_tiles(feed_forward, x, tile, random=random)


def _project(block: Block, x: Tensor, *rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The stream (T, D) -> queries (T, H, d), keys and values (T, K, d)."""
    return block.project(x, rope)


def _merge(block: Block, x: Tensor, mixed: Tensor, shards: TokenShards | None) -> Tensor:
    """The stream (T, D) and what attention gave (T, H, d) -> (T, D)."""
    x = x + shard_dropout(block.attention.out(mixed.flatten(1)), block.dropout, block.training, shards)
    return x if block.pre_norm else block.attention_norm(x)


def _feed_forward(block: Block, x: Tensor, shards: TokenShards | None) -> Tensor:
    """The second half of a block, which treats every token by itself: (T, D) -> (T, D)."""
    added = block.mlp(block.mlp_norm(x) if block.pre_norm else x)
    x = x + shard_dropout(added, block.dropout, block.training, shards)
    return x if block.pre_norm else block.mlp_norm(x)


class Transformer(nn.Module):
    """The stack of blocks and the final norm: embeddings (T, D) -> hidden states (T, D)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.norm = config.make_norm(config.width) if config.norm_place == "pre" else nn.Identity()
        num_positions = config.learned_positions
        self.positions = LearnedPositions(num_positions, config.width) if num_positions else None
        self.embedding_norm = config.make_norm(config.width) if config.embedding_norm else nn.Identity()
        self.rope = Rotary(config.rope, config.head_width) if self.positions is None else None
        self.activations = KEEP_ALL
        self.apply(self._initialise)

    def set_context(self, config: TransformerConfig) -> None:
        """Takes over positions (`rope`) and `windows` of a config that is equal otherwise: the weights stay."""
        self.config = config
        self.rope = Rotary(config.rope, config.head_width) if self.positions is None else None
        for layer, block in enumerate(self.blocks):
            block.attention.window = config.layer_window(layer)  # type: ignore[union-attr]

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(
            module, Block
        ):  # residual branches start small, so that depth does not blow up the stream (GPT-2)
            for out in (module.attention.out, module.mlp.down):
                nn.init.normal_(out.weight, std=0.02 / math.sqrt(2 * self.config.depth))

    def enter(
        self, embeddings: Tensor, position_ids: Tensor, layout: DocumentLayout, cache: KVCache | Branches | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the first block reads, (T, D), and the cosines and sines for all of them; see `forward`."""
        if self.positions is not None:
            self.positions.check(layout, cache)
            embeddings = embeddings + self.positions(position_ids)
        rope = self.rope(position_ids, embeddings.dtype) if self.rope is not None else ()
        return self.embedding_norm(embeddings), rope

    def forward(
        self, embeddings: Tensor, position_ids: Tensor, layout: DocumentLayout, cache: KVCache | Branches | None = None
    ) -> Tensor:
        """See the class.

        Args:
            embeddings: (T, D).
            position_ids: (T,) int64, restarting at 0 in each document; or (T, 3), see `grid_positions`.
            layout: document boundaries.
            cache: keys and values of earlier calls, for generation and for the scoring of answers.
        """
        x, rope = self.enter(embeddings, position_ids, layout, cache)
        offload = HostOffload(x.device) if self.activations.offload and x.is_cuda else None
        for block in self.blocks:
            with offload.layer() if offload is not None and block.recomputes else nullcontext():
                x = block(x, rope, layout, cache)
        return self.norm(x)

    def set_activations(self, config: ActivationsConfig) -> None:
        """How much every block keeps for the backward pass from now on; see `mmctx.activations`."""
        self.activations = config
        for block in self.blocks:
            block.activations = config  # type: ignore[assignment]

    def set_compiler(self, backend: str | None) -> None:
        """Compiles the blocks by this backend of `torch.compile` when they run next; None runs them as they are."""
        for block in self.blocks:
            block.compiler = backend  # type: ignore[assignment]
