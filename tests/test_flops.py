"""How much arithmetic a batch is: counted against brute force, real parameters, and what PyTorch counts while it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmctx.config import build_config, load_config
from mmctx.datasets.assemble import build_data
from mmctx.datasets.planning.plan import Plan
from mmctx.encoders.audio import AudioEncoderConfig
from mmctx.encoders.image import ImageEncoderConfig
from mmctx.flops import FORWARD_AND_BACKWARD, Work, count_pairs, estimate_work, trunk_matrices
from mmctx.model import ENCODERS, VOCAB_MULTIPLE, MmctxModel, ModelConfig
from mmctx.objectives import AnyObjective
from mmctx.objectives.captioning import CaptioningConfig
from mmctx.objectives.masked_lm import MaskedLMConfig
from mmctx.pack import IGNORE_INDEX, Document, MediaBatch, PackedBatch, pack_documents
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig
from mmctx.transformer import Transformer, TransformerConfig

VOCAB = 320
GROUPED = {"width": 32, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 48}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 40])
def test_pairs_are_those_of_the_mask(causal: bool, window: int | None) -> None:
    lengths = np.arange(14).reshape(2, 7)
    expected = []
    for length in lengths.flatten().tolist():
        query, key = np.indices((length, length))
        near = np.abs(query - key) < (window or length + 1)
        expected.append(int((near & ((key <= query) | (not causal))).sum()))
    np.testing.assert_array_equal(count_pairs(lengths, causal, window), np.reshape(expected, lengths.shape))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": None},
        {"head_dim": 6, "depth": 3, "qkv_bias": True},
        {"activation": "gelu", "mlp_bias": True},
    ],
)
def test_trunk_matrices_are_the_modules(changes: dict[str, Any]) -> None:
    config = TransformerConfig.model_validate(GROUPED | changes)
    with torch.device("meta"):
        trunk = Transformer(config)
    assert trunk_matrices(config) == sum(p.numel() for p in trunk.parameters() if p.ndim == 2)


def document(objective: str, length: int, causal: bool, num_labels: int) -> Document:
    ids = np.random.default_rng(length).integers(0, VOCAB, length)
    labels = np.where(np.arange(length) < num_labels, ids, IGNORE_INDEX)
    return Document(objective, ids, labels, causal)


def counted(trunk: TransformerConfig, documents: list[Document]) -> int:
    """FLOPs of a real forward and backward pass as PyTorch counts them; of fused attention on a CPU it counts none, so it is unfused."""
    objectives: dict[str, AnyObjective] = {"captioning": CaptioningConfig(), "masked_lm": MaskedLMConfig()}
    torch.manual_seed(0)
    model = MmctxModel(ModelConfig(transformer=trunk), objectives, VOCAB)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses = model.losses(pack_documents(documents, {}))
        torch.stack([loss.total for loss in losses.values()]).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": None, "head_dim": 6, "depth": 3},
        {"tie_embeddings": False},
        {"activation": "gelu", "learned_positions": 40, "norm_place": "post", "head_transform": True},
    ],
)
def test_a_text_model_costs_what_pytorch_counts(changes: dict[str, Any]) -> None:
    """To the last multiplication, but for one thing: unfused attention computes all pairs of a document, causal or not."""
    trunk = TransformerConfig.model_validate(GROUPED | changes)
    work = estimate_work(ModelConfig(transformer=trunk), VOCAB)
    found = counted(trunk, [document("captioning", 40, True, 39), document("masked_lm", 23, False, 5)])
    matrices = 63 * work.token + 44 * work.label
    assert found == matrices + work.attention(np.array([40, 23]), causal=False).sum()
    rows = -(-VOCAB // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    assert work.label == 6 * trunk.width * (rows + trunk.width * trunk.head_transform)


def test_causal_attention_counts_half_of_the_pairs_and_the_diagonal() -> None:
    work = estimate_work(ModelConfig(transformer=TransformerConfig.model_validate(GROUPED)), VOCAB)
    lengths = np.array([1, 2, 48, 1000])
    every = work.attention(lengths, causal=False)
    np.testing.assert_array_equal(2 * lengths * work.attention(lengths, causal=True), (lengths + 1) * every)


def test_attention_sums_over_layers_and_their_windows() -> None:
    trunk = TransformerConfig.model_validate(GROUPED | {"depth": 3, "windows": (4, None)})
    work = estimate_work(ModelConfig(transformer=trunk), VOCAB)
    assert work.windows == (4, None, 4)
    lengths = np.array([[3, 0], [10, 7]])
    pairs = 2 * count_pairs(lengths, True, 4) + count_pairs(lengths, True, None)
    np.testing.assert_array_equal(work.attention(lengths, causal=True), 12 * 4 * 8 * pairs)


def real_media(kind: str, config: Any, items: int) -> MediaBatch:
    """Real pixels or frames, of items as large as one embedding of sound or one picture."""
    nowhere = torch.zeros(0, dtype=torch.int64)
    if kind == "image":
        values = torch.randint(0, 256, (items, 3, config.image_size, config.image_size), dtype=torch.uint8)
        lengths, num_tokens = (1,) * items, ((config.image_size // 16) ** 2,) * items
    else:
        values = torch.randn(items * config.frames_per_token, config.num_mels)
        lengths, num_tokens = (config.frames_per_token,) * items, (1,) * items
    return MediaBatch(values=values, lengths=lengths, num_tokens=num_tokens, slots=nowhere, rows=nowhere)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_encoders_cost_what_pytorch_counts_on_real_media(tree: dict[str, Any], kind: str) -> None:
    config = build_config(RunConfig, tree, "tree").model
    part: ImageEncoderConfig | AudioEncoderConfig = getattr(config, kind)
    encoder: nn.Module = ENCODERS[kind](part, config.transformer.width)
    work = estimate_work(config, VOCAB)
    estimate = {"image": work.image, "audio": work.audio_token}[kind]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(real_media(kind, part, items=3))
    assert FORWARD_AND_BACKWARD * counter.get_total_flops() == 3 * estimate


def test_attention_inside_a_clip_is_counted_chunk_by_chunk(tree: dict[str, Any]) -> None:
    tree["model"]["audio"] |= {"shuffle": 2, "chunk_seconds": 0.8}  # 80 frames: 5 embeddings
    config = build_config(RunConfig, tree, "tree").model
    assert config.audio is not None
    part, counts = config.audio, (12, 3, 1)
    frames = tuple(count * part.frames_per_token for count in counts)
    clips = replace(real_media("audio", part, sum(counts)), lengths=frames, num_tokens=counts)
    encoder = ENCODERS["audio"](part, config.transformer.width)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(clips)
    estimate = estimate_work(config, VOCAB).clips(np.array(counts))
    assert FORWARD_AND_BACKWARD * counter.get_total_flops() == estimate.sum()
    assert estimate[0] > 12 * estimate[2]


def pytorch_counts(model: MmctxModel, batch: PackedBatch) -> int:
    """A training step over a batch; attention is unfused, because of fused one PyTorch counts nothing on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses = model.losses(batch).values()
        torch.stack([loss.total for loss in losses]).sum().backward()
    return counter.get_total_flops()


def check_batches(config: RunConfig, steps: int, tolerance: float) -> None:
    """Mixed batches of a run, as planned: unfused attention computes all pairs of causal documents, which model FLOPs count once."""
    data = build_data(config.data, config.data.sources, config.model, config.objectives, config.train.seed)
    plan = Plan(config.data, data.tables, config.train.seed)
    with torch.device("meta"):  # shapes are enough to count by
        model = build_model(config, len(data.tokenizer)).train()
    work = estimate_work(config.model, len(data.tokenizer))
    for step in range(steps):
        batch = data.dataset[plan.step(step)[0]]
        assert set(batch.media) == {"image", "audio"}
        causal = np.array(batch.layout.lengths[: batch.layout.num_causal])
        unseen = int(work.attention(causal, causal=False).sum() - work.attention(causal, causal=True).sum())
        counted = pytorch_counts(model, batch.to("meta"))
        print(f"step {step}: {(work.batch(batch) + unseen) / counted:.5f} of what PyTorch counts")
        assert work.batch(batch) + unseen == pytest.approx(counted, rel=tolerance)


def test_a_mixed_batch_costs_what_pytorch_counts(tree: dict[str, Any]) -> None:
    """So small a model spends a notable share on what is not counted: similarity, and pixels' gradients that are not computed."""
    check_batches(build_config(RunConfig, tree, "tree"), steps=1, tolerance=0.05)


DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"


@pytest.mark.slow
def test_the_demo_model_costs_what_pytorch_counts_within_a_hundredth(tree: dict[str, Any]) -> None:
    """The demo's model, objectives and bins, over pictures, sounds and texts that need not be built first."""
    demo = yaml.safe_load(DEMO.read_text())
    emoji, books = demo["data"]["sources"].values()
    emoji["shards"], books["shards"] = (tree["data"]["sources"][name]["shards"] for name in ("triples", "books"))
    emoji["texts"] = tree["data"]["sources"]["triples"]["texts"]
    demo["data"]["tokenizer"], demo["eval"] = tree["data"]["tokenizer"], {}
    check_batches(build_config(RunConfig, demo, "demo"), steps=3, tolerance=0.01)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("data/emoji/train").is_dir(), reason="needs the demo's data: mmctx data build emoji data/emoji"
)
def test_the_demo_costs_what_pytorch_counts_within_a_hundredth() -> None:
    check_batches(load_config(RunConfig, DEMO), steps=2, tolerance=0.01)


def test_a_model_without_encoders_spends_nothing_on_media() -> None:
    work = estimate_work(ModelConfig(transformer=TransformerConfig.model_validate(GROUPED)), VOCAB)
    assert isinstance(work, Work)
    assert (work.image, work.audio_token) == (0, 0)
