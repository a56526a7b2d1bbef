"""What augmentation changes; a source without it is read as it is, and held-out sources always are."""

from __future__ import annotations

from pydantic import Field, model_validator

from mmctx.config import StrictModel


class ImageAugmentConfig(StrictModel):
    """Pictures, by torchvision's transforms (v2), in this order."""

    crop: tuple[float, float] | None = (0.5, 1.0)
    """Smallest and largest share of the picture's area that is shown (RandomResizedCrop; Szegedy et al. 2015), cut from the decoded picture
    before it is made smaller. null: the central square, as in evaluation."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Narrowest and widest shape of a crop, width over height."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a mirror image. Writing and words such as "left" do not survive it."""
    randaugment: int = Field(default=0, ge=0)
    """Operations of RandAugment (Cubuk et al. 2020); 0 for none."""
    magnitude: int = Field(default=9, ge=0, le=30)
    """Their strength."""
    jitter: tuple[float, float, float, float] | None = None
    """How far brightness, contrast, saturation and hue may move (ColorJitter), such as [0.4, 0.4, 0.4, 0.1]."""

    @model_validator(mode="after")
    def _check(self) -> ImageAugmentConfig:
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop {list(self.crop)} must be [smallest, largest] share of the area, above 0, up to 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {list(self.ratio)} must be [narrowest, widest], above 0")
        if self.jitter is not None and (min(self.jitter) < 0 or self.jitter[3] > 0.5):
            raise ValueError(f"jitter {list(self.jitter)} must not be negative, and its hue (the last) at most 0.5")
        return self


class AudioAugmentConfig(StrictModel):
    """Sound: the waveform first, by torchaudio, then bands and stretches of its log-mel frames (SpecAugment, Park et al. 2019)."""

    speeds: tuple[float, ...] = (1.0,)
    """Factors of speed and pitch, one of which is drawn (Ko et al. 2015), such as [0.9, 1.0, 1.1]. The clip keeps its length: a faster one
    is padded with silence, a slower one loses what no longer fits, at random sides."""
    noise_snr: tuple[float, float] | None = None
    """Lowest and highest ratio of signal to added white noise, dB, such as [10, 30]."""
    mel_masks: int = Field(default=1, ge=0)
    """Bands of mel bins to hide behind the clip's mean."""
    mel_width: int = Field(default=12, ge=1)
    """Widest band, in mel bins; each width is drawn from 0 up to this."""
    frame_masks: int = Field(default=2, ge=0)
    """Stretches of time to hide."""
    frame_width: int = Field(default=12, ge=1)
    """Longest stretch, in frames; never more than a fifth of the clip."""

    @model_validator(mode="after")
    def _check(self) -> AudioAugmentConfig:
        if not self.speeds or not all(0.5 <= speed <= 2 for speed in self.speeds):
            raise ValueError(f"speeds {list(self.speeds)} must name factors from 0.5 to 2, at least one")
        if any(
            abs(round(100 * speed) - 100 * speed) > 1e-9 for speed in self.speeds
        ):  # odd ratios need very long filters
            raise ValueError(f"speeds {list(self.speeds)} must be whole hundredths, such as 0.95")
        if self.noise_snr is not None and self.noise_snr[0] > self.noise_snr[1]:
            raise ValueError(f"noise_snr {list(self.noise_snr)} must be [lowest, highest], in dB")
        return self

    @property
    def changes_waveforms(self) -> bool:
        """Whether anything is to be done before the log-mel frames."""
        return self.speeds != (1.0,) or self.noise_snr is not None


class TextAugmentConfig(StrictModel):
    """Text, of which the numbers of tokens stay. Masking and replacing change what is read, never what is predicted."""

    mask: float = Field(default=0.1, ge=0, le=1)
    """Share of a document's text tokens that the mask stands for (word dropout, Bowman et al. 2016), rounded down."""
    replace: float = Field(default=0.0, ge=0, le=1)
    """Share that other tokens of the vocabulary stand for, rounded down."""
    pieces: int = Field(default=1, ge=1)
    """Pieces that each text is cut into, at random places, and that are put in random order; 1 leaves it in order. What is predicted is in
    that order, too."""

    @model_validator(mode="after")
    def _check(self) -> TextAugmentConfig:
        if self.mask + self.replace > 1:
            raise ValueError(f"mask {self.mask} and replace {self.replace} are more than the whole text together")
        return self


class AugmentConfig(StrictModel):
    """What each epoch shows otherwise; null leaves a modality alone."""

    image: ImageAugmentConfig | None = None
    """Pictures."""
    audio: AudioAugmentConfig | None = None
    """Sound."""
    text: TextAugmentConfig | None = None
    """Text."""
