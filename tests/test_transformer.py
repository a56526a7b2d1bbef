"""The trunk against Transformers' own Llama, Qwen2 and Qwen3, and its cache against itself without one."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from mmctx.kv_cache import KVCache
from mmctx.layout import DocumentLayout
from mmctx.transformer import Transformer, TransformerConfig

SHAPE = {"width": 48, "depth": 3, "num_heads": 6, "num_kv_heads": 2, "mlp_width": 80, "norm_eps": 1e-6}


def positions(layout: DocumentLayout) -> Tensor:
    return torch.cat([torch.arange(n) for n in layout.lengths])


def copy_weights(ours: Transformer, theirs: torch.nn.Module) -> None:
    """Transformers' layer weights into our fused ones."""
    for mine, other in zip(ours.blocks, theirs.layers, strict=True):  # type: ignore[arg-type]
        attention, mlp = other.self_attn, other.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        mine.attention.qkv.weight.data = torch.cat([p.weight for p in projections])
        if mine.attention.qkv.bias is not None:
            mine.attention.qkv.bias.data = torch.cat([p.bias for p in projections])
        mine.attention.out.weight.data = attention.o_proj.weight
        if hasattr(attention, "q_norm"):
            mine.attention.q_norm.weight.data = attention.q_norm.weight
            mine.attention.k_norm.weight.data = attention.k_norm.weight
        mine.mlp.gate_up.weight.data = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        mine.mlp.down.weight.data = mlp.down_proj.weight
        mine.attention_norm.weight.data = other.input_layernorm.weight
        mine.mlp_norm.weight.data = other.post_attention_layernorm.weight
    ours.norm.weight.data = theirs.norm.weight  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {"qk_norm": False}),
        ("Qwen2", {"qk_norm": False, "qkv_bias": True}),
        ("Qwen3", {"qk_norm": True, "head_dim": 16}),
    ],
)
def test_equals_transformers(family: str, options: dict) -> None:
    torch.manual_seed(0)
    config = TransformerConfig(**SHAPE, **options)
    their_config = getattr(transformers, f"{family}Config")(
        vocab_size=10,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_width,
        rms_norm_eps=config.norm_eps,
    )
    theirs = getattr(transformers, f"{family}Model")(their_config).double().eval()
    for parameter in theirs.parameters():  # biases and norms away from their neutral start
        torch.nn.init.normal_(parameter, std=0.3)
    ours = Transformer(config).double().eval()
    copy_weights(ours, theirs)
    layout = DocumentLayout.from_lengths([5, 1, 17], 3)
    x = torch.randn(23, config.width, dtype=torch.float64)
    got = ours(x, positions(layout), layout)
    want = torch.cat([theirs(inputs_embeds=part[None]).last_hidden_state[0] for part in x.split([5, 1, 17])])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)  # theirs computes rotary angles in fp32


@pytest.mark.parametrize("window", [None, 4])
def test_decoding_with_cache_equals_decoding_without(window: int | None) -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SHAPE, windows=(None, window))).double().eval()
    prompts = [torch.randn(n, 48, dtype=torch.float64) for n in (3, 9, 1)]
    new = torch.randn(5, 3, 48, dtype=torch.float64)  # five steps of one token for each prompt
    cache = KVCache(max_new_tokens=5)
    layout = DocumentLayout.from_lengths([len(p) for p in prompts], 3)
    model(torch.cat(prompts), cache.advance(layout), layout, cache)
    one_each = DocumentLayout.from_lengths([1, 1, 1], 3)
    stepped = [model(step, cache.advance(one_each), one_each, cache) for step in new]  # (3, D) each
    for number, prompt in enumerate(prompts):
        whole = torch.cat([prompt, new[:, number]])
        alone = DocumentLayout.from_lengths([len(whole)], 1)
        want = model(whole, positions(alone), alone)[len(prompt) :]
        torch.testing.assert_close(torch.stack([s[number] for s in stepped]), want)
