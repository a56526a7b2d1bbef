"""The kinds of sound encoder: what a config may be, and the module of each."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag
from torch import nn

from mmctx.encoders.audio import AudioEncoder
from mmctx.encoders.audio_front_end import AudioPreprocessor
from mmctx.encoders.log_mel import AudioEncoderConfig
from mmctx.encoders.sound_config import ASTConfig, WhisperConfig
from mmctx.encoders.sound_transformer import PretrainedSoundEncoder

__all__ = ["SOUND_ENCODERS", "AnySoundConfig", "AudioPreprocessor", "build_sound_encoder"]


def _kind(given: Any) -> Any:
    """`logmel`, from scratch, where none is named."""
    return given.get("kind", "logmel") if isinstance(given, dict) else getattr(given, "kind", None)


AnySoundConfig = Annotated[
    Annotated[AudioEncoderConfig, Tag("logmel")]
    | Annotated[WhisperConfig, Tag("whisper")]
    | Annotated[ASTConfig, Tag("ast")],
    Discriminator(_kind),
]

SOUND_ENCODERS: dict[str, Any] = {
    "logmel": AudioEncoder,
    "whisper": PretrainedSoundEncoder,
    "ast": PretrainedSoundEncoder,
}


def build_sound_encoder(config: Any, dim: int) -> nn.Module:
    """The encoder of a config, for a trunk of width `dim`."""
    return SOUND_ENCODERS[config.kind](config, dim)
