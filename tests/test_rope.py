"""Rotary positions against `transformers.modeling_rope_utils` and Transformers' Llama."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from test_transformer import copy_weights, positions
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mmctx.config import build_config
from mmctx.errors import ConfigError
from mmctx.layout import DocumentLayout
from mmctx.rope import RopeConfig, Rotary, rope_frequencies, rotate
from mmctx.transformer import Transformer, TransformerConfig

CONTEXT = 512  # of the weights before stretching

YARN = {
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "truncate": False,
    "attention_factor": 1.3,
    "mscale": 0.7,
    "mscale_all_dim": 1.1,
}


def their_parameters(config: RopeConfig) -> dict:
    """`rope_parameters` of Transformers for the same positions."""
    extra = {
        "none": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": config.factor},
        # Dynamic NTK of factor 1 at a text of s tokens stretches by s / max_position_embeddings: see `their_frequencies`.
        "ntk": {"rope_type": "dynamic", "factor": 1.0},
        "yarn": {
            "rope_type": "yarn",
            "factor": config.factor,
            "original_max_position_embeddings": config.original_context,
            **{name: value for name in YARN if (value := getattr(config, name)) is not None},
        },
        "llama3": {
            "rope_type": "llama3",
            "factor": config.factor,
            "original_max_position_embeddings": config.original_context,
            "low_freq_factor": config.low_freq_factor,
            "high_freq_factor": config.high_freq_factor,
        },
    }
    return {"rope_theta": config.base, **extra[config.scaling]}


def their_config(config: RopeConfig, head_dim: int, heads: int = 2) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=10,
        hidden_size=head_dim * heads,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-6,
        rope_parameters=their_parameters(config),
    )


def check(config: RopeConfig, head_dim: int) -> None:
    got, got_scale = rope_frequencies(config, head_dim)
    if config.scaling == "none":
        want, want_scale = config.base ** -(torch.arange(0, head_dim, 2).double() / head_dim), 1.0
    else:
        kind = their_parameters(config)["rope_type"]
        length = round(config.factor * CONTEXT)
        want, want_scale = ROPE_INIT_FUNCTIONS[kind](their_config(config, head_dim), "cpu", seq_len=length)
    torch.testing.assert_close(got, want.double(), rtol=1e-6, atol=1e-12)
    assert got_scale == pytest.approx(want_scale, rel=1e-6)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("scaling", ["none", "linear", "ntk", "yarn", "llama3"])
def test_frequencies_equal_transformers(scaling: str, head_dim: int) -> None:
    for base, factor in itertools.product((10_000.0, 500_000.0, 10_000_000.0), (1.0, 1.5, 4.0, 32.0)):
        check(RopeConfig(base=base, scaling=scaling, factor=factor, original_context=CONTEXT), head_dim)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"beta_fast": 16.0, "beta_slow": 2.0},
        {"truncate": False},
        {"attention_factor": 1.3},
        {"mscale": 0.7, "mscale_all_dim": 1.1},
        {"mscale": 0.7, "mscale_all_dim": 1.1, "attention_factor": 0.9},
        {"original_context": 8},  # the limits of the ramp meet at dimension 0
        {"original_context": 100_000},
    ],
)
def test_yarn_options_equal_transformers(options: dict) -> None:
    for factor in (1.0, 8.0):
        check(RopeConfig(scaling="yarn", factor=factor, **{"original_context": CONTEXT} | options), 64)


def test_llama3_options_equal_transformers() -> None:
    llama = {"base": 500_000.0, "factor": 8.0, "original_context": 8192}  # of Llama 3.1
    check(RopeConfig(scaling="llama3", **llama), 128)  # type: ignore[arg-type]
    check(RopeConfig(scaling="llama3", low_freq_factor=0.5, high_freq_factor=6.0, **llama), 128)  # type: ignore[arg-type]


def test_ntk_is_transformers_dynamic_form_at_a_fixed_length() -> None:
    """At their factor f and a text of s tokens, ours is f * s / context - (f - 1)."""
    config = RopeConfig(scaling="ntk", factor=2.0 * 3 - 1)
    theirs = their_config(config, 64)
    theirs.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": config.base}
    want, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, "cpu", seq_len=3 * CONTEXT)
    torch.testing.assert_close(rope_frequencies(config, 64)[0], want.double(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn", "llama3"])
def test_whole_llama_equals_transformers(scaling: str) -> None:
    """Texts longer than the original context; the last of exactly the stretched one, where dynamic NTK turns into ours."""
    torch.manual_seed(0)
    factor, options = 1.5, {"mscale": 2.0, "mscale_all_dim": 0.5} if scaling == "yarn" else {}
    rope = RopeConfig(scaling=scaling, factor=factor, original_context=CONTEXT, **options)  # type: ignore[arg-type]
    config = TransformerConfig(
        width=32, depth=2, num_heads=2, num_kv_heads=1, mlp_width=80, qk_norm=False, norm_eps=1e-6, rope=rope
    )
    theirs = transformers.LlamaModel(their_config(rope, 16)).double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = Transformer(config).double().eval()
    copy_weights(ours, theirs)
    lengths = [int(factor * CONTEXT)] * 2
    layout = DocumentLayout.from_lengths(lengths, 2)
    x = torch.randn(layout.num_tokens, 32, dtype=torch.float64)
    with torch.no_grad():
        got = ours(x, positions(layout), layout)
        want = torch.cat([theirs(inputs_embeds=part[None]).last_hidden_state[0] for part in x.split(lengths)])
        plain = Transformer(config.model_copy(update={"rope": RopeConfig()})).double().eval()
        plain.load_state_dict(ours.state_dict())
        unscaled = plain(x, positions(layout), layout)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)  # theirs computes angles of 768 positions in fp32
    assert (unscaled - want).abs().max() > 0.05  # the scaling matters here


def test_rotation_is_its_own_gradient_backwards() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 3, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = Rotary(RopeConfig(scaling="yarn", factor=4.0), 8)(torch.arange(7), x.dtype)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))


def test_angles_stay_exact_under_low_precision() -> None:
    """bf16 has 8 bits: positions of thousands would not survive it."""
    rotary = Rotary(RopeConfig(), 64)
    cos, sin = rotary(torch.tensor([40_001]), torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.float32
    want = (40_001 * rotary.frequencies).cos()
    torch.testing.assert_close(cos[0, 0].double(), want, atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scaling": "yarn", "beta_fast": 1.0, "beta_slow": 2.0}, "beta_slow 2.0 must be less than beta_fast 1.0"),
        ({"scaling": "llama3", "low_freq_factor": 4.0}, "low_freq_factor 4.0 must be less than high_freq_factor 4.0"),
        ({"mscale": 1.0}, "set both or neither"),
    ],
)
def test_contradictions_are_named(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_config(RopeConfig, options, where="test")
