"""Configs of sound encoders that come with weights: Whisper's and AST's, from folders that Transformers wrote.

What the folder says is read when the config is built, and stands in it from then on: a checkpoint needs the folder no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, model_validator

from mmctx.config import StrictModel
from mmctx.encoders.projector import ProjectorKind
from mmctx.encoders.transformers_folder import model_type, read_json
from mmctx.errors import ConfigError

SoundPadding = Literal["none", "silence"]


class WhisperConfig(StrictModel):
    """Whisper's encoder (Radford et al. 2022): log-mel frames, two convolutions, sinusoidal positions, pre-norm blocks."""

    kind: Literal["whisper"] = "whisper"
    pretrained: str | None = None
    """Folder of a `WhisperModel` or `WhisperForConditionalGeneration` with its feature extractor; null for random weights."""
    padding: SoundPadding = "none"
    """none: a clip is as long as it is, and sees its own positions alone. silence: each chunk is filled up with silence as in Whisper's
    training, and only embeddings of the sound are handed on: to the letter what Transformers computes, at the price of a whole chunk, which
    `data.bin_audio_frames` does not count."""
    shuffle: int = Field(default=1, ge=1)
    """r: neighbouring positions (20 ms) that are merged into one embedding behind the transformer."""
    projector: ProjectorKind = "mlp"
    """How features become embeddings: `linear` or two layers (`mlp`)."""
    sample_rate: int = Field(default=16_000, ge=1)
    """Samples per second; this and all that follows is the folder's where not given."""
    n_fft: int = Field(default=400, ge=2)
    """Window of the Fourier transform, samples."""
    hop_length: int = Field(default=160, ge=1)
    """Samples from one frame to the next."""
    num_mels: int = Field(default=80, ge=1)
    """M: mel bins per frame."""
    width: int = Field(default=384, ge=2)
    """Channels."""
    depth: int = Field(default=4, ge=1)
    """Transformer blocks."""
    num_heads: int = Field(default=6, ge=1)
    """Attention heads; they divide `width`."""
    mlp_width: int = Field(default=1536, ge=1)
    """Inner channels of the feed-forward layers."""
    max_positions: int = Field(default=1500, ge=1)
    """Positions of a full chunk, two frames each: 1500 are 30 s. Longer clips are encoded in chunks of it, each blind to the others."""

    @model_validator(mode="before")
    @classmethod
    def _from_folder(cls, given: Any) -> Any:
        return fill_from_folder(given, _read_whisper)

    @model_validator(mode="after")
    def _check(self) -> WhisperConfig:
        check_shape(self.width, self.num_heads, self.shuffle, self.max_positions)
        if 2 * self.hop_length <= self.n_fft // 2:
            raise ValueError(
                f"hop_length {self.hop_length} is too short for n_fft {self.n_fft}: two hops must exceed half of it"
            )
        return self

    @property
    def frames_per_token(self) -> int:
        """Frames that become one embedding."""
        return 2 * self.shuffle

    @property
    def chunk_tokens(self) -> int:
        """Embeddings of a full chunk."""
        return self.max_positions // self.shuffle

    def frames_of(self, tokens: int) -> int:
        """Frames of a chunk of so many embeddings."""
        return self.frames_per_token * tokens

    def positions_of(self, tokens: int) -> int:
        """Positions of the transformer for a chunk of so many embeddings."""
        return self.shuffle * tokens


class ASTConfig(StrictModel):
    """The audio spectrogram transformer (Gong et al. 2021): patches of log-mel filter banks, learned positions, pre-norm blocks.

    The patches of one time step, over all frequencies, become one embedding (100 ms).
    """

    kind: Literal["ast"] = "ast"
    pretrained: str | None = None
    """Folder of an `ASTModel` or `ASTForAudioClassification` with its feature extractor; null for random weights."""
    padding: SoundPadding = "none"
    """As in `WhisperConfig`: none cuts the positions, silence fills each chunk up as in training."""
    shuffle: int = Field(default=1, ge=1)
    """r: neighbouring time steps that are merged into one embedding behind the transformer."""
    projector: ProjectorKind = "mlp"
    """How features become embeddings: `linear` or two layers (`mlp`)."""
    sample_rate: int = Field(default=16_000, ge=1)
    """Samples per second; this and all that follows is the folder's where not given."""
    num_mels: int = Field(default=128, ge=1)
    """M: mel bins per frame."""
    mean: float = -4.2677393
    """Mean of the log-mel values that the weights were trained with."""
    std: float = Field(default=4.5689974, gt=0)
    """Their standard deviation."""
    patch_size: int = Field(default=16, ge=1)
    """Mel bins, and frames, of a patch."""
    frequency_stride: int = Field(default=10, ge=1)
    """Mel bins from one patch to the next."""
    time_stride: int = Field(default=10, ge=1)
    """Frames from one time step to the next."""
    max_frames: int = Field(default=1024, ge=1)
    """Frames of a full chunk (10.24 s). Longer clips are encoded in chunks of its time steps, each blind to the others."""
    width: int = Field(default=768, ge=2)
    """Channels."""
    depth: int = Field(default=12, ge=1)
    """Transformer blocks."""
    num_heads: int = Field(default=12, ge=1)
    """Attention heads; they divide `width`."""
    mlp_width: int = Field(default=3072, ge=1)
    """Inner channels of the feed-forward layers."""
    qkv_bias: bool = True
    """Whether queries, keys and values have biases."""
    norm_eps: float = Field(default=1e-12, gt=0)
    """Of the layer norms."""

    @model_validator(mode="before")
    @classmethod
    def _from_folder(cls, given: Any) -> Any:
        return fill_from_folder(given, _read_ast)

    @model_validator(mode="after")
    def _check(self) -> ASTConfig:
        if self.patch_size > min(self.num_mels, self.max_frames):
            raise ValueError(
                f"patch_size {self.patch_size} exceeds num_mels {self.num_mels} or max_frames {self.max_frames}"
            )
        check_shape(self.width, self.num_heads, self.shuffle, self.time_steps)
        return self

    @property
    def bands(self) -> int:
        """Patches of one time step."""
        return (self.num_mels - self.patch_size) // self.frequency_stride + 1

    @property
    def time_steps(self) -> int:
        """Time steps of a full chunk."""
        return (self.max_frames - self.patch_size) // self.time_stride + 1

    @property
    def frames_per_token(self) -> int:
        """Frames from one embedding to the next; each sees a few of the next one's, too."""
        return self.time_stride * self.shuffle

    @property
    def chunk_tokens(self) -> int:
        """Embeddings of a full chunk."""
        return self.time_steps // self.shuffle

    def frames_of(self, tokens: int) -> int:
        """Frames of a chunk of so many embeddings."""
        return self.time_stride * (self.shuffle * tokens - 1) + self.patch_size

    def positions_of(self, tokens: int) -> int:
        """Positions of the transformer for a chunk of so many embeddings: two of the chunk as a whole, then its patches."""
        return 2 + self.bands * self.shuffle * tokens


PretrainedSoundConfig = WhisperConfig | ASTConfig


def check_shape(width: int, num_heads: int, shuffle: int, positions: int) -> None:
    """Raises ValueError where sizes do not fit each other."""
    if width % num_heads or width % 2:
        raise ValueError(f"num_heads {num_heads} does not divide width {width}, or it is odd")
    if shuffle > positions:
        raise ValueError(f"shuffle {shuffle} exceeds the {positions} positions of a chunk")


def fill_from_folder(given: Any, read: Callable[[str], dict[str, Any]]) -> Any:
    """What the folder says for all keys that are not given.

    Raises:
        ValueError: a key says otherwise than the folder, or the folder cannot be read.
    """
    if not isinstance(given, dict) or not given.get("pretrained"):
        return given
    if set(given) >= _FROM_FOLDER[read]:  # a config that was resolved before: the folder may be gone
        return given
    try:
        found = read(given["pretrained"])
    except ConfigError as error:
        raise ValueError(str(error)) from None
    for key, value in found.items():
        if key in given and given[key] != value:
            raise ValueError(f"{key} is {value} in {given['pretrained']}, the config says {given[key]}; leave it out")
    return {**given, **found}


def _read_whisper(folder: str) -> dict[str, Any]:
    _, model = model_type(folder, ["whisper"])
    front = read_json(folder, "preprocessor_config.json")
    _must_be(folder, "activation_function", model.get("activation_function", "gelu"), "gelu")
    _must_be(folder, "sampling_rate", front["sampling_rate"], 16_000)  # its filters end at 8 kHz whatever the rate
    return {
        "sample_rate": front["sampling_rate"],
        "n_fft": front["n_fft"],
        "hop_length": front["hop_length"],
        "num_mels": model["num_mel_bins"],
        "width": model["d_model"],
        "depth": model["encoder_layers"],
        "num_heads": model["encoder_attention_heads"],
        "mlp_width": model["encoder_ffn_dim"],
        "max_positions": model["max_source_positions"],
    }


def _read_ast(folder: str) -> dict[str, Any]:
    _, model = model_type(folder, ["audio-spectrogram-transformer"])
    front = read_json(folder, "preprocessor_config.json")
    _must_be(folder, "hidden_act", model.get("hidden_act", "gelu"), "gelu")
    normalized = front.get("do_normalize", True)
    return {
        "sample_rate": front["sampling_rate"],
        "num_mels": model["num_mel_bins"],
        "mean": front["mean"] if normalized else 0.0,
        "std": front["std"] if normalized else 0.5,  # which values are divided by twice
        "patch_size": model["patch_size"],
        "frequency_stride": model["frequency_stride"],
        "time_stride": model["time_stride"],
        "max_frames": model["max_length"],
        "width": model["hidden_size"],
        "depth": model["num_hidden_layers"],
        "num_heads": model["num_attention_heads"],
        "mlp_width": model["intermediate_size"],
        "qkv_bias": model.get("qkv_bias", True),
        "norm_eps": model["layer_norm_eps"],
    }


def _must_be(folder: str, key: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ConfigError(f"pretrained: {folder}: {key} is {found!r}, only {expected!r} is supported")


_OWN = {"kind", "pretrained", "padding", "shuffle", "projector"}
_FROM_FOLDER: dict[Any, set[str]] = {
    _read_whisper: set(WhisperConfig.model_fields) - _OWN,
    _read_ast: set(ASTConfig.model_fields) - _OWN,
}
