"""Whisper's and AST's encoders from Transformers folders: features equal Transformers' own, packed clips see nothing of each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from sound_models import save_ast, save_whisper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmctx.config import build_config
from mmctx.encoders.audio_front_end import AudioPreprocessor
from mmctx.encoders.log_mel import AudioEncoderConfig
from mmctx.encoders.sound import AnySoundConfig, build_sound_encoder
from mmctx.encoders.sound_config import ASTConfig, WhisperConfig
from mmctx.errors import ConfigError, DataError
from mmctx.model import ModelConfig
from mmctx.pack import MediaBatch, MediaItem

KINDS = ("whisper", "ast")
CONFIGS: dict[str, Any] = {"whisper": WhisperConfig, "ast": ASTConfig}
SMALL: dict[str, dict[str, Any]] = {
    "whisper": {"num_mels": 20, "width": 16, "depth": 2, "num_heads": 2, "mlp_width": 24, "max_positions": 100},
    "ast": {"num_mels": 36, "width": 16, "depth": 2, "num_heads": 2, "mlp_width": 24, "max_frames": 200},
}
RATE = 16_000


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folder and model of each kind."""
    root = tmp_path_factory.mktemp("sound")
    return {
        "whisper": (root / "whisper", save_whisper(root / "whisper")),
        "ast": (root / "ast", save_ast(root / "ast")),
    }


def small(kind: str, **changes: Any) -> Any:
    return CONFIGS[kind](**SMALL[kind] | changes)


def noise(num_samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_samples, generator=torch.Generator().manual_seed(seed)) * 0.1


def batch_of(items: list[MediaItem], dtype: torch.dtype = torch.float32) -> MediaBatch:
    nowhere = torch.zeros(0, dtype=torch.int64)
    return MediaBatch(
        values=torch.cat([item.values for item in items]).to(dtype),
        lengths=tuple(len(item.values) for item in items),
        num_tokens=tuple(item.num_tokens for item in items),
        slots=nowhere,
        rows=nowhere,
    )


def theirs(kind: str, folder: Path, waveform: torch.Tensor) -> torch.Tensor:
    """What Transformers' feature extractor makes of a clip: (1, M, F) for Whisper, (1, F, M) for AST."""
    from transformers import AutoFeatureExtractor

    extractor = AutoFeatureExtractor.from_pretrained(folder)
    made = extractor(waveform.numpy(), sampling_rate=RATE, return_tensors="pt")
    return made["input_features" if kind == "whisper" else "input_values"]


def their_features(kind: str, model: Any, inputs: torch.Tensor) -> torch.Tensor:
    """(embeddings, features), AST's patches gathered by time step."""
    with torch.no_grad():
        if kind == "whisper":
            return model.model.encoder(inputs).last_hidden_state[0]
        patches = model(inputs).last_hidden_state[0, 2:]
        bands = (model.config.num_mel_bins - 16) // 10 + 1
        return patches.unflatten(0, (bands, -1)).transpose(0, 1).flatten(1)


class TestAgainstTransformers:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("padding", ["none", "silence"])
    def test_features_of_a_full_clip(self, saved, kind, padding):
        folder, model = saved[kind]
        config = CONFIGS[kind](pretrained=str(folder), padding=padding)
        waveform = noise(2 * RATE + (240 if kind == "ast" else 0))  # Kaldi's windows do not reach over the end
        item = AudioPreprocessor(config)(waveform, RATE)
        assert item.num_tokens == config.chunk_tokens == {"whisper": 100, "ast": 19}[kind]
        encoder = build_sound_encoder(config, 8).eval()
        found = encoder.features(item.values, [item.num_tokens])
        expected = their_features(kind, model, theirs(kind, folder, waveform))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # frames differ in their last digits
        exact = theirs(kind, folder, waveform)[0]
        exact = exact.T if kind == "whisper" else exact[: config.frames_of(19)]
        torch.testing.assert_close(encoder.features(exact, [item.num_tokens]), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_short_clip_in_silence(self, saved, kind):
        """Transformers pads each clip to the length of its training; we hand on what covers the sound."""
        folder, model = saved[kind]
        config = CONFIGS[kind](pretrained=str(folder), padding="silence")
        waveform = noise(11_111)
        item = AudioPreprocessor(config)(waveform, RATE)
        found = build_sound_encoder(config, 8).features(item.values, [item.num_tokens])
        expected = their_features(kind, model, theirs(kind, folder, waveform))[: item.num_tokens]
        assert len(found) == {"whisper": 35, "ast": 6}[kind]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_frames(self, saved, kind):
        folder, _ = saved[kind]
        waveform = noise(32_000)
        waveform[:20_000] *= torch.linspace(0, 1, 20_000)
        found = AudioPreprocessor(CONFIGS[kind](pretrained=str(folder), padding="silence"))(waveform, RATE).values
        expected = theirs(kind, folder, waveform)[0]
        expected = expected.T if kind == "whisper" else expected[: len(found)]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_without_padding_positions_are_cut(self, saved, tmp_path, kind):
        """The reference is a model that was built for clips of just this length, with the same weights."""
        folder, model = saved[kind]
        config = CONFIGS[kind](pretrained=str(folder))
        item = AudioPreprocessor(config)(noise(11_111), RATE)
        if kind == "whisper":
            shorter = save_whisper(tmp_path, max_source_positions=item.num_tokens)
            weights = model.state_dict()
            weights["model.encoder.embed_positions.weight"] = weights["model.encoder.embed_positions.weight"][
                : item.num_tokens
            ]
            inputs = item.values.T[None]
        else:
            shorter = save_ast(tmp_path, max_length=len(item.values))
            weights = model.state_dict()
            whole = weights["embeddings.position_embeddings"]
            grid = whole[:, 2:].unflatten(1, (3, 19))[:, :, : item.num_tokens].flatten(1, 2)
            weights["embeddings.position_embeddings"] = torch.cat([whole[:, :2], grid], dim=1)
            inputs = item.values[None]
        shorter.load_state_dict(weights)
        found = build_sound_encoder(config, 8).features(item.values, [item.num_tokens])
        torch.testing.assert_close(found, their_features(kind, shorter, inputs), rtol=0, atol=1e-5)

    def test_other_classes_of_the_same_encoder(self, saved, tmp_path):
        from transformers import ASTConfig as TheirASTConfig
        from transformers import ASTForAudioClassification

        folder, model = saved["ast"]
        classifier = ASTForAudioClassification(TheirASTConfig.from_pretrained(folder))
        classifier.audio_spectrogram_transformer.load_state_dict(model.state_dict())
        classifier.save_pretrained(tmp_path, max_shard_size="20KB")  # in several files
        (tmp_path / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
        assert (tmp_path / "model.safetensors.index.json").exists()
        ours, same = (build_sound_encoder(ASTConfig(pretrained=str(p)), 8).state_dict() for p in (folder, tmp_path))
        for name in filter(lambda name: not name.startswith("projector."), ours):
            assert torch.equal(ours[name], same[name]), name


class TestPacking:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("padding", ["none", "silence"])
    @pytest.mark.parametrize("shuffle", [1, 2])
    def test_packed_clips_equal_each_clip_alone(self, kind, padding, shuffle):
        torch.manual_seed(0)
        short = {"max_positions": 20} if kind == "whisper" else {"max_frames": 56}
        config = small(kind, padding=padding, shuffle=shuffle, **short)
        encoder = build_sound_encoder(config, 6).double()
        sizes = (300, 20_000, 7_000, 2_000)  # the second is longer than two chunks
        items = [AudioPreprocessor(config)(noise(n, seed=n), RATE) for n in sizes]
        clips = [item.values.double().requires_grad_() for item in items]
        wanted = [*encoder.parameters(), *clips]

        def encoded(numbers: list[int]) -> torch.Tensor:
            return encoder(
                batch_of([MediaItem("audio", clips[n], items[n].num_tokens) for n in numbers], torch.float64)
            )

        together = encoded([0, 1, 2, 3])
        weights = torch.randn_like(together)
        grads = torch.autograd.grad((together * weights).sum(), wanted)
        alone = torch.cat([encoded([n]) for n in range(4)])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
        torch.testing.assert_close(grads, torch.autograd.grad((alone * weights).sum(), wanted), rtol=0, atol=1e-9)
        encoder.chunk = 2
        chunked = encoder.train()(
            batch_of([MediaItem("audio", c, i.num_tokens) for c, i in zip(clips, items, strict=True)], torch.float64)
        )
        torch.testing.assert_close(chunked, together, rtol=0, atol=1e-10)
        torch.testing.assert_close(torch.autograd.grad((chunked * weights).sum(), wanted), grads, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_chunks_of_a_long_clip_stand_alone(self, kind):
        config = small(kind)
        encoder = build_sound_encoder(config, 6).double()
        waveform = noise(75_000)
        item = AudioPreprocessor(config)(waveform, RATE)
        full = config.chunk_tokens
        step = 320 if kind == "whisper" else 1600  # samples of an embedding
        beyond = 0 if kind == "whisper" else 6 * 160 + 240  # frames of a patch, and samples of a window, reach further
        assert item.num_tokens > 2 * full
        parts = [waveform[full * step * n :][: full * step + beyond] for n in range(3)]
        chunks = [AudioPreprocessor(config)(part, RATE) for part in parts]
        assert sum(chunk.num_tokens for chunk in chunks) == item.num_tokens
        torch.testing.assert_close(item.values, torch.cat([chunk.values for chunk in chunks]), rtol=0, atol=1e-5)
        whole = encoder(batch_of([item], torch.float64))
        alone = torch.cat([encoder(batch_of([chunk], torch.float64)) for chunk in chunks])
        torch.testing.assert_close(whole, alone, rtol=0, atol=1e-4)

    @settings(deadline=None, max_examples=20)
    @given(
        num_samples=st.integers(1, 50_000),
        rate=st.sampled_from([8_000, 16_000, 22_050]),
        shuffle=st.integers(1, 3),
        kind=st.sampled_from(KINDS),
        padding=st.sampled_from(["none", "silence"]),
    )
    def test_any_clip_becomes_the_predicted_number_of_tokens(self, num_samples, rate, shuffle, kind, padding):
        config = small(kind, shuffle=shuffle, padding=padding, depth=1)
        preprocess = AudioPreprocessor(config)
        item = preprocess(noise(num_samples), rate)
        assert item.num_tokens == preprocess.num_tokens(np.array([num_samples]), np.array([rate]))[0]
        assert build_sound_encoder(config, 4)(batch_of([item])).shape == (item.num_tokens, 4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_frame_matters_and_every_parameter_gets_a_gradient(self, kind):
        config = small(kind)
        encoder = build_sound_encoder(config, 6)
        item = AudioPreprocessor(config)(noise(75_000), RATE)
        clip = item.values.clone().requires_grad_()
        encoder(batch_of([MediaItem("audio", clip, item.num_tokens)])).square().sum().backward()
        assert (clip.grad.abs().sum(1) > 0).all()
        encoder.zero_grad()
        out = encoder(encoder.empty_batch("cpu"))
        assert out.shape == (1, 6)
        (out.sum() * 0).backward()
        assert all(p.grad is not None for p in encoder.parameters())

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_batch_made_for_another_encoder_is_refused(self, kind):
        encoder = build_sound_encoder(small(kind), 6)
        item = AudioPreprocessor(small(kind, shuffle=2))(noise(9_000), RATE)
        with pytest.raises(DataError, match="differ in their config"):
            encoder(batch_of([item]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", ["none", "silence"])
@pytest.mark.parametrize("changes", [{"shuffle": 3}, {"projector": "linear"}])
def test_flops_are_what_pytorch_counts(kind, padding, changes):
    config = small(kind, padding=padding, **changes)
    encoder = build_sound_encoder(config, 10)
    cost = type(encoder).flops(config, 10)
    for num_samples in (5_000, 20_000):
        item = AudioPreprocessor(config)(noise(num_samples), RATE)
        t = item.num_tokens
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(batch_of([item]))
        assert counter.get_total_flops() == cost.item + t * cost.token + (t * t - t) * cost.square


class TestConfig:
    def test_kinds(self):
        adapter = TypeAdapter(AnySoundConfig)
        assert isinstance(adapter.validate_python({}), AudioEncoderConfig)
        assert isinstance(adapter.validate_python({"width": 64, "num_heads": 4}), AudioEncoderConfig)
        assert isinstance(adapter.validate_python({"kind": "whisper"}), WhisperConfig)
        assert isinstance(adapter.validate_python({"kind": "ast"}), ASTConfig)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_resolved_config_needs_the_folder_no_more(self, saved, kind):
        folder, _ = saved[kind]
        config = ModelConfig.model_validate({"audio": {"kind": kind, "pretrained": str(folder), "shuffle": 2}})
        assert (config.audio.width, config.audio.mlp_width, config.audio.shuffle) == (32, 48, 2)
        gone = {**config.model_dump(mode="json")}
        gone["audio"]["pretrained"] = "/nowhere"
        assert ModelConfig.model_validate(gone).audio.num_mels == config.audio.num_mels

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"pretrained": "/nowhere"}, r"model.yaml.*audio.*/nowhere/config.json is missing"),
            ({"width": 64}, r"width is 32 in .*, the config says 64"),
            ({"kind": "ast"}, r"holds a model of type 'whisper', expected 'audio-spectrogram-transformer'"),
            ({"shuffel": 2}, r"unknown key 'audio.shuffel'; did you mean 'shuffle'"),
            ({"kind": "wisper"}, r"audio.*wisper.*logmel"),
        ],
    )
    def test_what_does_not_fit_says_why(self, saved, changes, message):
        tree = {"audio": {"kind": "whisper", "pretrained": str(saved["whisper"][0]), **changes}}
        with pytest.raises(ConfigError, match=message):
            build_config(ModelConfig, tree, where="model.yaml")

    def test_weights_that_do_not_fit(self, saved, tmp_path):
        folder, _ = saved["whisper"]
        config = WhisperConfig(pretrained=str(folder))
        with pytest.raises(
            ConfigError, match=r"blocks.0.mlp.0.weight has the shape \(48, 32\), the config makes \(50, 32\)"
        ):
            build_sound_encoder(config.model_copy(update={"mlp_width": 50}), 8)
        with pytest.raises(ConfigError, match=r"has no tensor 'layers.2"):
            build_sound_encoder(config.model_copy(update={"depth": 3}), 8)
        with pytest.raises(ConfigError, match="cannot be read"):
            build_sound_encoder(config.model_copy(update={"pretrained": str(tmp_path)}), 8)
