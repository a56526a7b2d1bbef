"""Sound encoder: exact token counts, no leaks between clips or chunks, log-mel frames equal to Whisper's."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmctx.config import build_config
from mmctx.encoders.audio import AudioEncoder, Slots, cut_clips
from mmctx.encoders.audio_front_end import AudioPreprocessor, resample
from mmctx.encoders.log_mel import AudioEncoderConfig, log_mel
from mmctx.errors import ConfigError, DataError, SampleError
from mmctx.pack import MediaBatch

RATES = [8_000, 16_000, 22_050, 44_100]


def config(**changes) -> AudioEncoderConfig:
    return AudioEncoderConfig(**{"num_mels": 12, "width": 16, "depth": 2, "num_heads": 2, **changes})


def batch_of(clips: list[torch.Tensor], per_token: int = 8) -> MediaBatch:
    nowhere = torch.zeros(0, dtype=torch.int64)
    return MediaBatch(
        values=torch.cat(clips),
        lengths=tuple(len(clip) for clip in clips),
        num_tokens=tuple(-(-len(clip) // per_token) for clip in clips),
        slots=nowhere,
        rows=nowhere,
    )


def noise(num_samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_samples, generator=torch.Generator().manual_seed(seed)) * 0.1


class TestPreprocessor:
    @settings(deadline=None, max_examples=40)
    @given(
        num_samples=st.integers(1, 12_000),
        rate=st.sampled_from(RATES),
        stride=st.sampled_from([2, 8, 16]),
        shuffle=st.integers(1, 3),
    )
    def test_any_clip_becomes_the_predicted_number_of_tokens(self, num_samples, rate, stride, shuffle):
        made = config(stride=stride, shuffle=shuffle)
        preprocess = AudioPreprocessor(made)
        item = preprocess(noise(num_samples), rate)
        assert item.num_tokens == preprocess.num_tokens(np.array([num_samples]), np.array([rate]))[0]
        encoder = AudioEncoder(made, dim=4)
        batch = batch_of([item.values], stride * shuffle)
        assert encoder(batch).shape == (item.num_tokens, 4)

    def test_num_tokens_is_vectorised_and_counts_empty_clips_as_zero(self):
        found = AudioPreprocessor(config()).num_tokens(np.array([0, 1, 16_000, 480_000]), np.array([16_000] * 4))
        assert found.tolist() == [0, 1, 13, 375]
        assert found.dtype == np.int64

    def test_frames_equal_whispers(self):
        WhisperFeatureExtractor = pytest.importorskip("transformers").WhisperFeatureExtractor
        waveform = noise(480_000)
        waveform[:200_000] *= torch.linspace(0, 1, 200_000)
        expected = WhisperFeatureExtractor(feature_size=80)(waveform.numpy(), sampling_rate=16_000)
        found = log_mel(waveform, config(num_mels=80))
        assert found.shape == (3000, 80)
        torch.testing.assert_close(found.T.numpy(), expected["input_features"][0], rtol=0, atol=1e-3)

    def test_frames_do_not_depend_on_clips_seen_before(self):
        preprocess = AudioPreprocessor(config())
        first = preprocess(noise(5_000), 8_000).values
        preprocess(noise(9_000, seed=1) * 50, 8_000)
        assert torch.equal(preprocess(noise(5_000), 8_000).values, first)
        assert torch.equal(pickle.loads(pickle.dumps(preprocess))(noise(5_000), 8_000).values, first)

    def test_resampling_keeps_a_tone(self):
        seconds = torch.arange(22_050) / 22_050
        tone = resample(torch.sin(2 * torch.pi * 440 * seconds), 22_050, 16_000)
        expected = torch.sin(2 * torch.pi * 440 * torch.arange(16_000) / 16_000)
        torch.testing.assert_close(tone[200:-200], expected[200:-200], rtol=0, atol=1e-2)

    def test_length_is_exact_beyond_float32(self):
        assert len(resample(torch.zeros(2**24 + 1), 32_000, 16_000)) == 2**23 + 1

    def test_what_is_no_clip_is_refused(self):
        preprocess = AudioPreprocessor(config())
        with pytest.raises(SampleError, match="empty"):
            preprocess(torch.zeros(0), 16_000)
        with pytest.raises(SampleError, match=r"bad_audio.*1 of 500 samples"):
            preprocess(torch.zeros(500).index_fill(0, torch.tensor([3]), float("nan")), 16_000)
        with pytest.raises(SampleError, match=r"bad_audio.*\(2, 500\)"):
            preprocess(torch.zeros(2, 500), 16_000)


class TestEncoder:
    @pytest.mark.parametrize("stride", [2, 4, 8])
    @pytest.mark.parametrize("order", ["up", "down"])
    @pytest.mark.parametrize("shuffle", [1, 3])
    def test_packed_clips_equal_each_clip_alone(self, stride, order, shuffle):
        torch.manual_seed(0)
        per_token = stride * shuffle
        encoder = AudioEncoder(config(stride=stride, shuffle=shuffle), dim=6).double()
        lengths = range(1, 41) if order == "up" else range(40, 0, -1)
        clips = [torch.randn(length, 12, dtype=torch.float64, requires_grad=True) for length in lengths]
        wanted = [*encoder.parameters(), *clips]
        together = encoder(batch_of(clips, per_token))
        weights = torch.randn_like(together)
        grads = torch.autograd.grad((together * weights).sum(), wanted)
        alone = torch.cat([encoder(batch_of([clip], per_token)) for clip in clips])
        grads_alone = torch.autograd.grad((alone * weights).sum(), wanted)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
        torch.testing.assert_close(grads, grads_alone, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("stride", [2, 8])
    def test_convolutions_are_conv1d_on_each_clip_alone(self, stride):
        """All clips packed in ours, torch's own `conv1d` with zero padding clip by clip as the reference."""
        torch.manual_seed(0)
        encoder = AudioEncoder(config(stride=stride), dim=6).double()
        clips = [torch.randn(length, 12, dtype=torch.float64) for length in range(1, 41)]
        slots = Slots.of_chunks(cut_clips([len(clip) for clip in clips], 64), per_token=stride)
        ours = encoder.embed_frames(torch.cat(clips), slots)
        theirs = []
        for clip in clips:
            x = clip.T[None]  # (1, M, F)
            for conv in encoder.convs:
                weight = conv.linear.weight.unflatten(1, (3, -1)).transpose(1, 2)
                x = torch.nn.functional.gelu(torch.conv1d(x, weight, conv.linear.bias, stride=2, padding=1))
            theirs.append(encoder.stem_norm(x[0].T) + encoder.positions[: x.shape[2]])
        torch.testing.assert_close(ours, torch.cat(theirs), rtol=0, atol=1e-10)

    def test_long_clips_are_cut_into_chunks_that_stand_alone(self):
        made = config(chunk_seconds=30)
        encoder = AudioEncoder(made, dim=6).double()
        item = AudioPreprocessor(made)(noise(65 * 16_000), 16_000)
        assert item.values.shape == (6500, 12)
        assert item.num_tokens == 375 + 375 + 63
        chunks = [item.values[:3000], item.values[3000:6000], item.values[6000:]]
        whole = encoder(batch_of([item.values.double()]))
        alone = torch.cat([encoder(batch_of([chunk.double()])) for chunk in chunks])
        assert whole.shape == (813, 6)
        torch.testing.assert_close(whole, alone, rtol=0, atol=1e-10)

    @given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=6), stride=st.sampled_from([2, 8]))
    def test_slots_hold_every_frame_once(self, lengths, stride):
        slots = Slots.of_chunks(cut_clips(lengths, 32), per_token=stride)
        assert slots.real.sum() == sum(lengths)
        assert len(slots.real) == stride * sum(slots.num_tokens)
        assert sum(slots.num_tokens) == sum(-(-length // stride) for length in lengths)
        assert slots.real[::stride].all()

    def test_every_frame_matters(self):
        encoder = AudioEncoder(config(chunk_seconds=0.32), dim=6)
        clip = torch.randn(71, 12, requires_grad=True)
        encoder(batch_of([clip])).square().sum().backward()
        assert (clip.grad.abs().sum(1) > 0).all()

    def test_the_empty_batch_gives_every_parameter_a_gradient(self):
        encoder = AudioEncoder(config(), dim=6)
        out = encoder(encoder.empty_batch("cpu"))
        assert out.shape == (1, 6)
        (out.sum() * 0).backward()
        assert all(p.grad is not None for p in encoder.parameters())

    def test_a_batch_made_for_another_encoder_is_refused(self):
        encoder = AudioEncoder(config(), dim=6)
        with pytest.raises(DataError, match=r"20 frames become 3 embeddings of 8 frames, but the batch has room for 5"):
            encoder(batch_of([torch.zeros(20, 12)], per_token=4))
        with pytest.raises(DataError, match=r"\(20, 12\) frames, found \(20, 80\)"):
            encoder(batch_of([torch.zeros(20, 80)]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 6}, "stride 6 is not a power of two"),
        ({"width": 16, "num_heads": 3}, "num_heads 3 does not divide width 16"),
        ({"width": 15, "num_heads": 3}, "width 15 is odd"),
        ({"chunk_seconds": 0.05}, "chunk_seconds 0.05 is shorter than one embedding"),
        ({"hop_lenght": 160}, "did you mean 'hop_length'"),
    ],
)
def test_configs_that_cannot_be_built_say_why(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_config(AudioEncoderConfig, changes, where="run.yaml")
