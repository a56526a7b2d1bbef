"""Small models of Transformers with random weights, by names."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCAB = 90

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e6, "beta_fast": 8.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 5e5,
}
GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 40, "vocab_size": VOCAB, "eos_token_id": 0}
GPT2 |= {"bos_token_id": 0}
BERT = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6}
BERT |= {"max_position_embeddings": 40, "vocab_size": VOCAB}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SMALL),
    "llama-tied-biased": (
        "LlamaForCausalLM",
        SMALL | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6},
    ),
    "llama-llama3": ("LlamaForCausalLM", SMALL | {"rope_parameters": LLAMA3}),
    "llama-linear": (
        "LlamaForCausalLM",
        SMALL | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "head_dim": 10},
    ),
    "mistral": ("MistralForCausalLM", SMALL | {"sliding_window": None}),
    "mistral-window": ("MistralForCausalLM", SMALL | {"sliding_window": 7, "head_dim": 12}),
    "qwen2": ("Qwen2ForCausalLM", SMALL | {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        SMALL | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("Qwen2ForCausalLM", SMALL | {"rope_parameters": YARN}),
    "qwen3": ("Qwen3ForCausalLM", SMALL | {"head_dim": 16}),
    "qwen3-tied-biased-windows": (
        "Qwen3ForCausalLM",
        SMALL
        | {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True, "use_sliding_window": True}
        | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-untied": (
        "GPT2LMHeadModel",
        GPT2 | {"tie_word_embeddings": False, "n_inner": 70, "activation_function": "gelu"},
    ),
    "bert": ("BertForMaskedLM", BERT),
    "bert-untied": ("BertForMaskedLM", BERT | {"tie_word_embeddings": False, "hidden_act": "gelu_new"}),
}


def make_model(kind: str, options: dict[str, Any], seed: int = 0) -> Any:
    """A model of random weights: norms and biases away from their neutral start, logits of about 1."""
    torch.manual_seed(seed)
    cls = getattr(transformers, kind)
    return fill(cls(cls.config_class(**options)).eval())


@torch.no_grad()
def fill(model: Any) -> Any:
    """The model with weights of which none could be left out unseen."""
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.2)
        if "norm" in name.lower() or "ln_" in name:
            parameter.add_(name.endswith("weight"))
    return model
