"""What a run reads, and how it is cut into steps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mmctx.config import StrictModel
from mmctx.datasets.augment.config import AugmentConfig
from mmctx.datasets.planning.split import LongDocuments
from mmctx.datasets.remote.block_cache import BlockCache

NO_LIMIT = 1 << 60
"""Stands for a limit that is not set."""


class SourceConfig(StrictModel):
    """One set of WebDataset shards."""

    shards: str
    """A path or url with braces or wildcards, such as `data/train/{000000..000099}.tar`; over HTTP with braces alone."""
    objectives: tuple[str, ...]
    """Names of the objectives that every sample of this source serves."""
    texts: tuple[str, ...] = ("txt",)
    """Where texts stand: a member's extension, or `json:dotted.path` inside `KEY.json`. Numbered text0, text1, ... in this order."""
    weight: float | None = Field(default=None, gt=0)
    """Share of samples (or of tokens, see `weight_by`) drawn from this source. Give it for all sources, or for none: then every
    sample comes once an epoch."""
    long_documents: LongDocuments = "drop"
    """What becomes of documents longer than the context: `drop` (listed in `skips.jsonl`), `truncate`, `split`, or `stream`: read piece by
    piece, one piece for each bin of a step, with a memory. Media are never cut."""
    lengths: tuple[int, int | None] = (1, None)
    """Shortest and longest sample that is read, by the tokens of its longest document before any cutting. Sources of the same shards with
    other `lengths` are buckets: each has its own weight, in each stage of a schedule. Samples outside are counted, not listed."""
    augment: AugmentConfig | None = None
    """Change pictures, sound and text, otherwise in each epoch; null leaves them as they are. Held-out sources cannot have it."""

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        if not self.texts:
            raise ValueError("texts must name at least one member, for example [txt]")
        shortest, longest = self.lengths
        if shortest < 1 or (longest is not None and longest < shortest):
            raise ValueError(
                f"lengths {list(self.lengths)} must be [shortest, longest] tokens with 1 <= shortest <= longest"
            )
        if not self.objectives:
            raise ValueError("objectives must name at least one objective")
        return self


class DataConfig(StrictModel):
    """Sources, sizes and loading."""

    tokenizer: str
    """Folder of a Transformers fast tokenizer."""
    sources: dict[str, SourceConfig]
    """Named sources."""
    bos: bool = False
    """Whether every document begins with the tokenizer's `bos_token`, as weights of Llama and Mistral are used to. It is read, never
    predicted, and counts among the document's tokens. Documents that begin with `[CLS]` do not have it."""
    context_length: int = Field(default=2048, ge=1)
    """Longest document in tokens; `long_documents` of its source says what becomes of longer ones."""
    bin_tokens: int = Field(default=8192, ge=1)
    """Tokens that one packed batch holds at most: what one rank takes in one micro-batch."""
    bin_images: int | None = Field(default=None, ge=1)
    """Pictures that one packed batch holds at most; null for no limit."""
    bin_audio_frames: int | None = Field(default=None, ge=1)
    """Log-mel frames that one packed batch holds at most; null for no limit."""
    bin_pairs: int | None = Field(default=None, ge=1)
    """Samples with views to compare that one packed batch holds at most; null for no limit."""
    bins_per_step: int = Field(default=1, ge=1)
    """Packed batches of one global step, shared out among the ranks; must be a multiple of their number. Where a window draws more than its
    bins hold, single steps take twice as many."""
    window_steps: int | None = Field(default=None, ge=1)
    """Steps that are packed together: larger windows fill bins better and more evenly. null: as few as fill bins to 98.5%."""
    weight_by: Literal["samples", "tokens"] = "samples"
    """What the weights of sources are shares of."""
    block_size: int = Field(default=16, ge=1)
    """Neighbouring samples of a shard that are read together."""
    blocks_in_flight: int = Field(default=64, ge=1)
    """Blocks among which samples are shuffled."""
    quarantine: str | None = None
    """File of samples that must not be used, as `mmctx data check --write` makes it."""
    num_workers: int = Field(default=0, ge=0)
    """Loader processes a rank."""
    prefetch: int = Field(default=2, ge=1)
    """Batches that each worker prepares ahead."""
    worker_timeout: float | None = Field(default=600.0, gt=0)
    """Seconds that a loader process may take for a batch before the run stops and says what it was reading; null waits for ever. Without
    loader processes nobody watches."""
    cache_mb: int = Field(default=0, ge=0)
    """MiB of decoded samples that each loading process keeps, for sets that are read many times and fit. They are not decoded again."""
    remote_cache_dir: str | None = None
    """Folder on a local disk for blocks and indexes of remote shards, shared by all processes of a host.

    By default `$XDG_CACHE_HOME/mmctx`, which is `~/.cache/mmctx` where that is not set. Local shards do not use it."""
    remote_cache_gb: float = Field(default=20.0, gt=0)
    """GiB that blocks of remote shards may take there; those that were not read for longest go first."""
    skip_budget: float = Field(default=0.01, ge=0, le=1)
    """Largest share of samples that may be skipped while training before the run stops."""

    @property
    def limits(self) -> tuple[int, int, int, int]:
        """Largest tokens, pictures, audio frames and pairs of a bin, in the order of `table.LIMITED`; where there are streams, of what
        stands beside a piece.
        """
        optional = (self.bin_images, self.bin_audio_frames, self.bin_pairs)
        room = self.context_length if self.streamed and len(self.streamed) < len(self.sources) else 0
        return (self.bin_tokens - room, *(NO_LIMIT if limit is None else limit for limit in optional))  # type: ignore[return-value]

    @property
    def streamed(self) -> tuple[str, ...]:
        """Sources whose documents are streamed."""
        return tuple(name for name, source in self.sources.items() if source.long_documents == "stream")

    @property
    def remote_cache(self) -> BlockCache:
        """Where blocks of remote shards are kept."""
        return BlockCache.at(self.remote_cache_dir, self.remote_cache_gb)

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if not self.sources:
            raise ValueError("sources must name at least one source")
        if self.bin_tokens < self.context_length:
            raise ValueError(
                f"bin_tokens {self.bin_tokens} is less than context_length {self.context_length}: no bin could hold the longest document"
            )
        self._check_streams()
        others = self.sources.keys() - set(self.streamed)
        weighted = [name for name, source in self.sources.items() if source.weight is not None]
        if weighted and len(weighted) < len(others):
            missing = sorted(others - set(weighted))
            raise ValueError(f"sources {weighted} have a weight and {missing} have none; give all of them one, or none")
        return self

    def _check_streams(self) -> None:
        if not self.streamed:
            return
        name = self.streamed[0]
        if (weight := self.sources[name].weight) is not None:
            raise ValueError(
                f"sources.{name}: weight {weight} has no meaning for a stream, of which each bin takes one piece a step; remove it"
            )
        if limits := [k for k in ("bin_images", "bin_audio_frames", "bin_pairs") if getattr(self, k) is not None]:
            raise ValueError(
                f"{limits[0]} cannot be held with long_documents: stream of sources.{name}, whose pieces are cut by tokens alone; "
                f"lower context_length {self.context_length} instead"
            )
        if len(self.streamed) < len(self.sources) and self.bin_tokens < 2 * self.context_length:
            raise ValueError(
                f"bin_tokens {self.bin_tokens} must hold a piece of a stream (sources.{name}) and the longest document beside it: set it "
                f"to at least 2 * context_length = {2 * self.context_length}"
            )
