"""Towers of timm, open_clip and Transformers: features equal the library's own, preprocessing comes along with the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from mmctx.config import build_config
from mmctx.encoders.image import ImageEncoder, ImageEncoderConfig, ImagePreprocessor, image_geometry
from mmctx.encoders.vision_tower import build_tower
from mmctx.errors import ConfigError

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def random_pixels(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def every_parameter_is_used(encoder: ImageEncoder) -> bool:
    (encoder(encoder.empty_batch("cpu")).sum() * 0).backward()
    return all(p.grad is not None for p in encoder.parameters())


class TestTimm:
    @pytest.mark.parametrize(
        ("name", "options", "resize"),
        [
            ("vit_base_patch16_siglip_224", TINY, "crop"),
            ("vit_base_patch16_siglip_gap_224", TINY, "crop"),
            ("vit_base_patch16_clip_224", TINY, "crop"),
            ("vit_base_patch16_clip_384", TINY, "squash"),
            ("eva02_base_patch16_clip_224", TINY, "crop"),  # rotary positions
            ("eva_giant_patch14_clip_224", {**TINY, "patch_size": 16, "mlp_ratio": 2}, "crop"),
            ("vit_small_patch16_rope_224", TINY, "crop"),
            ("vit_small_patch16_dinov3", {**TINY, "embed_dim": 64}, "crop"),
        ],
    )
    def test_features_of_a_checkpoint_at_another_size(self, tmp_path, name, options, resize):
        """Trained at 64 x 64, used at 96 x 96: position embeddings are timm's own interpolation of those in the file."""
        torch.manual_seed(0)
        trained = timm.create_model(name, img_size=64, **options)
        torch.save(trained.state_dict(), tmp_path / "model.pth")
        config = ImageEncoderConfig(name=name, image_size=96, options=options, pretrained=str(tmp_path / "model.pth"))
        encoder = ImageEncoder(config, 8).eval()
        model = timm.create_model(
            name,
            img_size=96,
            num_classes=0,
            pretrained=True,
            pretrained_cfg_overlay={"file": str(tmp_path / "model.pth"), "num_classes": trained.num_classes},
            **options,
        ).eval()
        pixels = torch.randn(2, 3, 96, 96)
        expected = model.forward_features(pixels)[:, model.num_prefix_tokens :]
        torch.testing.assert_close(encoder.tower(pixels), expected, rtol=0, atol=1e-5)
        assert every_parameter_is_used(encoder)
        data = timm.data.resolve_model_data_config(model)
        geometry = encoder.geometry
        assert (geometry.mean, geometry.std) == (pytest.approx(data["mean"]), pytest.approx(data["std"]))
        assert (geometry.interpolation, geometry.resize) == (data["interpolation"], resize)

    def test_a_local_folder_is_read_once(self, tmp_path):
        """What timm saved for the hub: architecture, arguments, weights and preprocessing; a resolved config needs it no more."""
        from timm.models import save_for_hf

        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, pretrained_cfg_overlay={"crop_mode": "squash"}, **TINY
        )
        save_for_hf(model, tmp_path, model_args={**TINY, "img_size": 32})
        config = ImageEncoderConfig(name=f"local-dir:{tmp_path}", pretrained=True)
        assert (config.name, config.resize, config.options["depth"]) == ("vit_tiny_patch16_224", "squash", 2)
        pixels = torch.randn(1, 3, 32, 32)
        expected = model.forward_features(pixels)[:, 1:]
        torch.testing.assert_close(build_tower(config)(pixels), expected, rtol=0, atol=1e-5)
        again = ImageEncoderConfig.model_validate({**config.model_dump(mode="json"), "pretrained": False})
        for path in tmp_path.iterdir():
            path.unlink()
        assert image_geometry(again) == image_geometry(config)


class TestOpenClip:
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _small_models(cls, tmp_path_factory):
        open_clip = pytest.importorskip("open_clip")
        folder = tmp_path_factory.mktemp("open_clip")
        text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
        plain = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
        timm_tower = {"image_size": 32, "timm_proj": "none"}
        towers = {
            "siglip": {**timm_tower, "timm_model_name": "vit_test_patch16_siglip", "timm_pool": "map"},
            "eva": {**timm_tower, "timm_model_name": "eva02_test_patch16_clip", "timm_pool": "token"},
            "coca": {**plain, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        }
        for name, vision in towers.items():
            tree: dict[str, Any] = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
            if name == "coca":
                tree |= {"multimodal_cfg": {**text, "attn_pooler_heads": 2}, "custom_text": True}
                tree["text_cfg"] = {**text, "embed_cls": True, "output_tokens": True}
            path = folder / f"mmctx-{name}.json"
            path.write_text(json.dumps(tree))
            open_clip.add_model_config(path)

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _small_timm_models(cls):
        """open_clip passes no sizes on to timm, so small ones must have names."""
        from timm.models import register_model
        from timm.models.eva import _create_eva
        from timm.models.vision_transformer import _create_vision_transformer

        shape = {**TINY, "img_size": 32, "patch_size": 16}

        def vit_test_patch16_siglip(pretrained=False, **kwargs):
            options = {**shape, "class_token": False, "global_pool": "map", **kwargs}
            return _create_vision_transformer("vit_base_patch16_siglip_224", pretrained=pretrained, **options)

        def eva02_test_patch16_clip(pretrained=False, **kwargs):
            options = {**shape, "swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True, "global_pool": "token"}
            return _create_eva("eva02_base_patch16_clip_224", pretrained=pretrained, **options | kwargs)

        for entry in (vit_test_patch16_siglip, eva02_test_patch16_clip):
            entry.__module__ = "timm.models.vision_transformer"
            register_model(entry)

    @pytest.mark.parametrize("name", ["siglip", "eva", "coca"])
    def test_features_of_a_checkpoint(self, tmp_path, name):
        import open_clip

        torch.manual_seed(0)
        model = open_clip.create_model(f"mmctx-{name}").eval()
        torch.save(model.state_dict(), tmp_path / "clip.pt")
        made = ImageEncoderConfig(kind="open_clip", name=f"mmctx-{name}", pretrained=str(tmp_path / "clip.pt"))
        encoder = ImageEncoder(made, 8).eval()
        pixels = torch.randn(2, 3, 32, 32)
        if name == "coca":  # its caption pooler reads the tokens of the transformer, class token and all
            seen: list[torch.Tensor] = []
            model.visual.attn_pool.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            model.visual(pixels)
            expected = seen[0][:, 1:]
        else:
            expected = model.visual.trunk.forward_features(pixels)[:, model.visual.trunk.num_prefix_tokens :]
        torch.testing.assert_close(encoder.tower(pixels), expected, rtol=0, atol=1e-5)
        assert every_parameter_is_used(encoder)

    @pytest.mark.parametrize(
        ("name", "tag", "resize", "mean"),
        [("ViT-B-16", "openai", "crop", 0.48145466), ("ViT-B-16-SigLIP", "webli", "squash", 0.5)],
    )
    def test_preprocessing_is_that_of_the_weights(self, name, tag, resize, mean):
        """It stands in the config, which a checkpoint keeps when it lets go of the weights."""
        made = ImageEncoderConfig(kind="open_clip", name=name, pretrained=tag)
        geometry = image_geometry(made.model_copy(update={"pretrained": False}))
        assert (made.resize, made.interpolation, made.mean[0]) == (resize, "bicubic", mean)
        assert (geometry.resize, geometry.mean[0]) == (resize, mean)
        assert image_geometry(made.model_copy(update={"resize": "pad"})).resize == "pad"

    @pytest.mark.parametrize("name", ["eva", "coca"])
    def test_a_local_folder_is_read_once(self, tmp_path, name):
        """As open_clip saves models for the hub, but for the tokenizer."""
        import open_clip
        from open_clip.push_to_hf_hub import save_config_for_hf

        torch.manual_seed(0)
        model = open_clip.create_model(f"mmctx-{name}", force_preprocess_cfg={"resize_mode": "longest"}).eval()
        torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
        save_config_for_hf(model, tmp_path / "open_clip_config.json", open_clip.get_model_config(f"mmctx-{name}"))
        made = ImageEncoderConfig(kind="open_clip", name=f"local-dir:{tmp_path}", pretrained=True)
        assert made.resize == "pad"
        tower = build_tower(made).eval()
        for path in tmp_path.iterdir():
            path.unlink()
        again = build_tower(ImageEncoderConfig.model_validate({**made.model_dump(mode="json"), "pretrained": False}))
        again.eval().load_state_dict(tower.state_dict())
        pixels = torch.randn(1, 3, 32, 32)
        assert torch.equal(again(pixels), tower(pixels))
        ours = tower.model.blocks if name == "eva" else tower.visual.transformer
        theirs = model.visual.trunk.blocks if name == "eva" else model.visual.transformer
        assert all(
            torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        )


class TestTransformers:
    SHAPE = {  # noqa: RUF012
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }

    @pytest.fixture(scope="class")
    @classmethod
    def saved(cls, tmp_path_factory) -> dict[str, Path]:
        import transformers as tr

        torch.manual_seed(0)
        root = tmp_path_factory.mktemp("transformers")
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text |= {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
        models = {
            "clip": tr.CLIPModel(tr.CLIPConfig(vision_config=cls.SHAPE, text_config=text)),
            "clip_vision": tr.CLIPVisionModel(tr.CLIPVisionConfig(**cls.SHAPE)),
            "siglip": tr.SiglipModel(tr.SiglipConfig(vision_config=cls.SHAPE, text_config=text)),
            "siglip_vision": tr.SiglipVisionModel(tr.SiglipVisionConfig(**cls.SHAPE)),
            "vit": tr.ViTForImageClassification(tr.ViTConfig(**cls.SHAPE)),
        }
        for name, model in models.items():
            model.save_pretrained(root / name)
            processor = tr.CLIPImageProcessor if name[:4] == "clip" else tr.SiglipImageProcessor
            size = {"shortest_edge": 32} if name[:4] == "clip" else {"height": 32, "width": 32}
            extra = {"crop_size": {"height": 32, "width": 32}} if name[:4] == "clip" else {"resample": 2}
            processor(size=size, image_mean=[0.1, 0.2, 0.3], **extra).save_pretrained(root / name)
        return {name: root / name for name in models}

    def reference(self, name: str, folder: Path) -> Any:
        import transformers as tr

        cls = {"clip": tr.CLIPVisionModel, "sigl": tr.SiglipVisionModel, "vit": tr.ViTModel}[name[:4]]
        return cls.from_pretrained(folder).eval()

    @pytest.mark.parametrize("name", ["clip", "clip_vision", "siglip", "siglip_vision", "vit"])
    @pytest.mark.parametrize("size", [None, 48])
    def test_features_are_transformers_own(self, saved, name, size):
        made = ImageEncoderConfig(kind="transformers", pretrained=str(saved[name]), image_size=size)
        encoder = ImageEncoder(made, 8).eval()
        pixels = torch.randn(2, 3, size or 32, size or 32)
        model, first = self.reference(name, saved[name]), 0 if name.startswith("siglip") else 1
        expected = model(pixels, interpolate_pos_encoding=size is not None).last_hidden_state[:, first:]
        torch.testing.assert_close(encoder.tower(pixels), expected, rtol=0, atol=1e-5)
        assert every_parameter_is_used(encoder)

    @pytest.mark.parametrize("name", ["clip", "siglip"])
    def test_pictures_of_any_shape(self, saved, name):
        made = ImageEncoderConfig(kind="transformers", pretrained=str(saved[name]), max_patches=24)
        item = ImagePreprocessor(made)(random_pixels(60, 90))
        assert item.values.shape == (3, 32, 48)
        assert item.num_tokens == 24
        encoder = ImageEncoder(made, 8).eval()
        pixels = torch.randn(1, 3, 32, 48)
        expected = self.reference(name, saved[name])(pixels, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(encoder.tower(pixels), expected[:, -24:], rtol=0, atol=1e-5)

    def test_preprocessing_is_the_folders(self, saved):
        clip = image_geometry(ImageEncoderConfig(kind="transformers", pretrained=str(saved["clip"])))
        assert (clip.resize, clip.interpolation, clip.mean) == ("crop", "bicubic", (0.1, 0.2, 0.3))
        siglip = image_geometry(
            ImageEncoderConfig(kind="transformers", pretrained=str(saved["siglip"]), mean=(0, 0, 0))
        )
        assert (siglip.resize, siglip.interpolation, siglip.mean) == ("squash", "bilinear", (0, 0, 0))

    def test_pixels_are_those_of_transformers(self, saved):
        """To a step of 1/255, as Pillow, which it resizes with, rounds otherwise than torch."""
        from PIL import Image
        from transformers import AutoImageProcessor

        made = ImageEncoderConfig(kind="transformers", pretrained=str(saved["siglip"]))
        pixels = random_pixels(50, 70)
        ours = ImagePreprocessor(made)(pixels).values
        processor = AutoImageProcessor.from_pretrained(saved["siglip"])
        theirs = processor(Image.fromarray(pixels.permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"][0]
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
        torch.testing.assert_close(ours / 255, theirs * std + mean, rtol=0, atol=1.5 / 255)

    def test_a_resolved_config_needs_the_folder_no_more(self, saved):
        made = ImageEncoderConfig(kind="transformers", pretrained=str(saved["siglip"]))
        gone = {**made.model_dump(mode="json"), "pretrained": "/nowhere"}
        again = ImageEncoderConfig.model_validate(gone)
        assert image_geometry(again) == image_geometry(made)
        build_tower(again.model_copy(update={"pretrained": False}))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"pretrained": "/nowhere"}, r"/nowhere/config.json is missing"),
            ({"pretrained": False}, r"needs `pretrained: FOLDER`"),
            ({"stem": "conv"}, r"stem 'conv' needs kind 'timm'"),
            ({"image_size": 36}, r"36 is not divisible by patch size 8"),
            ({"image_size": 32, "max_patches": 16}, r"set one of them"),
        ],
    )
    def test_what_does_not_fit_says_why(self, saved, changes, message):
        tree = {"kind": "transformers", "pretrained": str(saved["clip"]), **changes}
        with pytest.raises(ConfigError, match=message):
            image_geometry(build_config(ImageEncoderConfig, tree, where="model.yaml"))


@pytest.mark.parametrize(
    ("resize", "columns"), [("crop", slice(8, 24)), ("pad", slice(0, 32)), ("squash", slice(0, 32))]
)
def test_ways_to_make_a_picture_square(resize, columns):
    pixels = random_pixels(16, 32)
    config = ImageEncoderConfig(image_size=32, options=TINY, resize=resize)
    found = ImagePreprocessor(config)(pixels).values
    if resize == "pad":
        assert torch.equal(found[:, 8:24], pixels)
        assert not found[:, :8].any()
        assert not found[:, 24:].any()
        return
    expected = torch.nn.functional.interpolate(
        pixels[None, :, :, columns], size=(32, 32), mode="bicubic", antialias=True
    )
    assert torch.equal(found, expected[0])
