"""Random small Whisper and AST models, saved as Transformers saves them, with their feature extractors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_whisper(folder: Path, seconds: int = 2, **changes: Any) -> Any:
    """A `WhisperForConditionalGeneration` of clips of `seconds`, in evaluation mode."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    torch.manual_seed(0)
    shape = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 48,
        "num_mel_bins": 20,
        "max_source_positions": 50 * seconds,
        "max_target_positions": 8,
        "vocab_size": 60,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    model = WhisperForConditionalGeneration(WhisperConfig(**shape | changes)).eval()
    shaken(model, skip="embed_positions")
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=shape["num_mel_bins"], chunk_length=seconds).save_pretrained(folder)
    return model


def save_ast(folder: Path, **changes: Any) -> Any:
    """An `ASTModel` of clips of two seconds, in evaluation mode."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "num_mel_bins": 36,
        "max_length": 200,
    }
    model = ASTModel(ASTConfig(**shape | changes)).eval()
    shaken(model)
    model.save_pretrained(folder)
    ASTFeatureExtractor(num_mel_bins=36, max_length=200).save_pretrained(folder)
    return model


def shaken(model: torch.nn.Module, skip: str = "-") -> None:
    """Fresh models have zeros for biases and tokens and ones for norms, which would hide a mix-up."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if skip not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
