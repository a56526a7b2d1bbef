"""Picture encoder: exact token counts, no leaks between pictures, features equal to timm's and open_clip's own."""

import json
import pickle

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmctx.encoders.image import ImageEncoder, ImageEncoderConfig, ImagePreprocessor, image_geometry
from mmctx.encoders.projector import pixel_shuffle
from mmctx.encoders.vision_tower import build_tower
from mmctx.errors import ConfigError, DataError, SampleError
from mmctx.pack import MediaBatch

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def config(**changes) -> ImageEncoderConfig:
    return ImageEncoderConfig(**{"name": "vit_tiny_patch16_224", "image_size": 32, "options": TINY, **changes})


def batch_of(items) -> MediaBatch:
    nowhere = torch.zeros(0, dtype=torch.int64)
    return MediaBatch(
        values=torch.stack([item.values for item in items]),
        lengths=(1,) * len(items),
        num_tokens=tuple(item.num_tokens for item in items),
        slots=nowhere,
        rows=nowhere,
    )


def random_pixels(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class TestPreprocessor:
    @settings(deadline=None, max_examples=30)
    @given(width=st.integers(1, 300), height=st.integers(1, 300))
    def test_any_picture_becomes_the_predicted_number_of_tokens(self, width, height):
        preprocess = ImagePreprocessor(config())
        item = preprocess(random_pixels(height, width))
        assert item.values.shape == (3, 32, 32)
        assert item.values.dtype == torch.uint8
        assert item.num_tokens == preprocess.num_tokens(np.array([width]), np.array([height]))[0] == 4

    def test_pixels_of_the_right_size_pass_through(self):
        pixels = random_pixels(32, 32)
        assert torch.equal(ImagePreprocessor(config())(pixels).values, pixels)

    def test_the_centre_is_kept(self):
        pixels = torch.zeros(3, 32, 96, dtype=torch.uint8)
        pixels[:, :, 32:64] = random_pixels(32, 32)
        assert torch.equal(ImagePreprocessor(config())(pixels).values, pixels[:, :, 32:64])

    def test_resizing_is_torchvisions(self):
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import resize

        pixels = random_pixels(75, 75)
        expected = resize(pixels, [32, 32], InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal(ImagePreprocessor(config())(pixels).values, expected)

    def test_pickles_small(self):
        preprocess = ImagePreprocessor(config())
        data = pickle.dumps(preprocess)
        assert len(data) < 1000
        assert torch.equal(pickle.loads(data)(random_pixels(9, 9)).values, preprocess(random_pixels(9, 9)).values)

    @pytest.mark.parametrize("shape", [(1, 8, 8), (8, 8), (3, 0, 8)])
    def test_what_is_no_rgb_picture_is_refused(self, shape):
        with pytest.raises(SampleError, match="undecodable_image"):
            ImagePreprocessor(config())(torch.zeros(shape, dtype=torch.uint8))


class TestEncoder:
    @pytest.mark.parametrize("shuffle", [1, 2])
    @pytest.mark.parametrize("stem", ["patch", "conv"])
    @pytest.mark.parametrize("projector", ["linear", "mlp"])
    def test_a_batch_equals_its_pictures_one_by_one(self, stem, shuffle, projector):
        torch.manual_seed(0)
        encoder = ImageEncoder(config(stem=stem, shuffle=shuffle, projector=projector), dim=24).double()
        items = [ImagePreprocessor(config(shuffle=shuffle))(random_pixels(40, 50, seed)) for seed in range(3)]
        together = encoder(batch_of(items))
        assert together.shape == (3 * 4 // shuffle**2, 24)
        weights = torch.randn_like(together)
        grads = torch.autograd.grad((together * weights).sum(), list(encoder.parameters()))
        alone = torch.cat([encoder(batch_of([item])) for item in items])
        grads_alone = torch.autograd.grad((alone * weights).sum(), list(encoder.parameters()))
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
        torch.testing.assert_close(grads, grads_alone, rtol=0, atol=1e-10)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("vit_tiny_patch16_224", TINY),
            ("vit_small_patch14_reg4_dinov2", {**TINY, "patch_size": 8}),  # class token and 4 registers
            ("vit_base_patch16_siglip_224", TINY),  # attention pool, no class token
            ("deit3_small_patch16_224", TINY),
            ("eva02_tiny_patch14_224", {**TINY, "patch_size": 16}),  # rotary positions, SwiGLU
            ("vit_tiny_patch16_224", {**TINY, "global_pool": "avg", "class_token": False}),
        ],
    )
    def test_features_are_timms_own(self, name, options):
        torch.manual_seed(0)
        encoder = ImageEncoder(config(name=name, options=options), dim=8)
        torch.manual_seed(0)
        model = timm.create_model(name, img_size=32, num_classes=0, **options)
        pixels = torch.randn(2, 3, 32, 32)
        model.load_state_dict(encoder.tower.model.state_dict(), strict=False)
        expected = model.forward_features(pixels)[:, model.num_prefix_tokens :]
        torch.testing.assert_close(encoder.tower(pixels), expected)
        assert all(p.grad is not None for p in grads_of(encoder)), "a part of the tower is unused"

    def test_normalisation(self):
        encoder = ImageEncoder(config(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)), dim=8)
        seen = []
        encoder.tower.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        pixels = random_pixels(32, 32)
        encoder(batch_of([ImagePreprocessor(config())(pixels)]))
        mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
        torch.testing.assert_close(seen[0][0], (pixels / 255 - mean) / std)

    def test_mean_and_std_default_to_the_towers(self):
        assert image_geometry(config(name="vit_base_patch16_clip_224")).mean == pytest.approx(
            (0.48145466, 0.4578275, 0.40821073)
        )
        assert image_geometry(config()).mean == (0.5, 0.5, 0.5)

    def test_the_empty_batch_gives_every_parameter_a_gradient(self):
        for stem in ("patch", "conv"):
            assert all(p.grad is not None for p in grads_of(ImageEncoder(config(stem=stem), dim=8)))

    def test_a_batch_made_for_another_encoder_is_refused(self):
        encoder = ImageEncoder(config(), dim=8)
        item = ImagePreprocessor(config(shuffle=2))(random_pixels(32, 32))
        with pytest.raises(DataError, match=r"make 4, but the batch has room for 1"):
            encoder(batch_of([item]))
        with pytest.raises(DataError, match=r"\(I, 3, 32, 32\).*\(1, 3, 64, 64\)"):
            encoder(batch_of([ImagePreprocessor(config(image_size=64))(random_pixels(64, 64))]))


def grads_of(encoder: ImageEncoder) -> list[torch.nn.Parameter]:
    (encoder(encoder.empty_batch("cpu")).sum() * 0).backward()
    return list(encoder.parameters())


def test_pixel_shuffle_gathers_neighbouring_squares():
    x = torch.arange(2 * 4 * 6).view(2, 4, 6, 1)
    y = pixel_shuffle(x, 2)
    assert y.shape == (2, 2, 3, 4)
    assert y[0, 0, 1].tolist() == [2, 3, 8, 9]
    with pytest.raises(ValueError, match="divisible by 4, found 4 x 6"):
        pixel_shuffle(x, 4)


class TestPretrained:
    @pytest.mark.parametrize("suffix", ["safetensors", "pth"])
    def test_timm_checkpoint_with_a_classifier(self, tmp_path, suffix):
        from safetensors.torch import save_file

        model = timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY)
        path = tmp_path / f"model.{suffix}"
        save_file(model.state_dict(), path) if suffix == "safetensors" else torch.save(model.state_dict(), path)
        tower = build_tower(config(pretrained=str(path)))
        pixels = torch.randn(1, 3, 32, 32)
        torch.testing.assert_close(tower(pixels), model.forward_features(pixels)[:, 1:])

    def test_position_embeddings_are_resampled_to_the_image_size(self, tmp_path):
        path = tmp_path / "model.pth"
        torch.save(timm.create_model("vit_tiny_patch16_224", img_size=64, **TINY).state_dict(), path)
        assert build_tower(config(pretrained=str(path))).model.pos_embed.shape == (1, 5, 32)

    @pytest.mark.parametrize("changes", [{"options": {**TINY, "depth": 1}}, {"options": {**TINY, "depth": 3}}])
    def test_a_checkpoint_that_does_not_fit_is_refused(self, tmp_path, changes):
        path = tmp_path / "model.pth"
        torch.save(timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY).state_dict(), path)
        with pytest.raises(ConfigError, match=r"does not fit.*(missing|unexpected)"):
            build_tower(config(pretrained=str(path), **changes))
        with pytest.raises(ConfigError, match="no such file"):
            build_tower(config(pretrained="/nowhere.pth"))


class TestConv:
    """An EfficientNet, whose batch norms must be constants."""

    NAME = "tf_efficientnet_lite0"

    @pytest.fixture(scope="class")
    def model(self):
        torch.manual_seed(0)
        model = timm.create_model(self.NAME, num_classes=5).train()
        with torch.no_grad():
            model(torch.randn(4, 3, 64, 64))  # statistics that are not those of a fresh model
        return model.eval()

    @pytest.fixture(scope="class")
    def path(self, model, tmp_path_factory):
        path = tmp_path_factory.mktemp("conv") / "model.pth"
        torch.save(model.state_dict(), path)
        return path

    def made(self, **changes):
        return config(name=self.NAME, options={}, image_size=64, **changes)

    def test_features_are_timms_own_in_evaluation(self, model, path):
        encoder = ImageEncoder(self.made(pretrained=str(path)), dim=8).train()
        pixels = torch.randn(3, 3, 64, 64)
        with torch.no_grad():
            expected = model.forward_features(pixels)  # (3, 1280, 2, 2)
        torch.testing.assert_close(encoder.tower(pixels), expected.flatten(2).transpose(1, 2))
        assert all(p.grad is not None for p in grads_of(encoder)), "a part of the tower is unused"

    def test_no_picture_sees_another_in_training(self, path):
        encoder = ImageEncoder(self.made(pretrained=str(path), shuffle=2), dim=8).double().train()
        items = [ImagePreprocessor(self.made(shuffle=2))(random_pixels(50, 70, seed)) for seed in range(3)]
        together = encoder(batch_of(items))
        assert together.shape == (3, 8)
        alone = torch.cat([encoder(batch_of([item])) for item in items])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)

    def test_a_checkpoint_with_the_names_of_efficientnet_pytorch(self, model, path, tmp_path):
        """They stand in the same order there: `_conv_stem`, `_bn0`, the blocks, `_conv_head`, `_bn1`, `_fc`."""
        own = model.state_dict()
        names = ["_conv_stem.weight", *(f"_blocks.{n}.x" for n in range(len(own) - 3)), "_fc.weight", "_fc.bias"]
        torch.save(dict(zip(names, own.values(), strict=True)), tmp_path / "other.pth")
        pixels = torch.randn(1, 3, 64, 64)
        ours, theirs = (build_tower(self.made(pretrained=str(p)))(pixels) for p in (path, tmp_path / "other.pth"))
        assert torch.equal(ours, theirs)
        with pytest.raises(ConfigError, match="does not fit"):
            build_tower(
                self.made(pretrained=str(tmp_path / "other.pth")).model_copy(update={"name": "efficientnet_b0"})
            )

    def test_sizes(self):
        assert image_geometry(self.made()).num_tokens == 4
        assert image_geometry(self.made(shuffle=2)).num_tokens == 1
        assert image_geometry(config(name=self.NAME, options={}, image_size=None)).num_tokens == 49
        with pytest.raises(ConfigError, match="image_size 72 is not divisible by patch size 32"):
            image_geometry(config(name=self.NAME, options={}, image_size=72))
        with pytest.raises(ConfigError, match="stem 'conv' is for ViTs"):
            image_geometry(self.made(stem="conv"))


class TestOpenClip:
    @pytest.fixture(autouse=True)
    def _small_model(self, tmp_path):
        open_clip = pytest.importorskip("open_clip")
        text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
        vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
        timm_vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "image_size": 224}
        resnet = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 16}
        for name, cfg in (("mmctx-vit", vision), ("mmctx-timm", timm_vision), ("mmctx-resnet", resnet)):
            path = tmp_path / f"{name}.json"
            path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": cfg, "text_cfg": text}))
            open_clip.add_model_config(path)

    @pytest.mark.parametrize("options", [{}, {"final_ln_after_pool": True}, {"layers": 1, "ls_init_value": 0.1}])
    def test_features_are_open_clips_own(self, options):
        import open_clip

        encoder = ImageEncoder(config(kind="open_clip", name="mmctx-vit", image_size=None, options=options), dim=8)
        vision = {**open_clip.get_model_config("mmctx-vit")["vision_cfg"], **options, "output_tokens": True}
        visual = open_clip.create_model("mmctx-vit", vision_cfg=vision).visual
        visual.load_state_dict(encoder.tower.visual.state_dict(), strict=False)
        pixels = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(encoder.tower(pixels), visual(pixels)[1])
        assert all(p.grad is not None for p in grads_of(encoder)), "a part of the tower is unused"

    def test_a_full_checkpoint_loads_into_another_image_size(self, tmp_path):
        import open_clip

        model = open_clip.create_model("mmctx-vit")
        torch.save(model.state_dict(), tmp_path / "clip.pt")
        made = config(
            kind="open_clip", name="mmctx-vit", pretrained=str(tmp_path / "clip.pt"), image_size=64, options={}
        )
        tower = build_tower(made)
        assert tower.visual.positional_embedding.shape == (17, 32)
        torch.testing.assert_close(tower.visual.conv1.weight, model.visual.conv1.weight)
        assert image_geometry(made).num_tokens == 16

    def test_a_timm_tower_inside(self):
        made = config(kind="open_clip", name="mmctx-timm", image_size=None, options={})
        assert image_geometry(made).num_tokens == 196
        assert image_geometry(made).mean[0] == pytest.approx(0.48145466)

    def test_errors(self):
        with pytest.raises(ConfigError, match=r"no model 'mmctx-vitt'; close names:.*mmctx-vit"):
            image_geometry(config(kind="open_clip", name="mmctx-vitt", options={}))
        with pytest.raises(ConfigError, match="not a ViT"):
            image_geometry(config(kind="open_clip", name="mmctx-resnet", options={}))
        with pytest.raises(ConfigError, match="stem 'conv' needs kind 'timm'"):
            image_geometry(config(kind="open_clip", name="mmctx-vit", options={}, stem="conv"))
        with pytest.raises(ConfigError, match="tags"):
            build_tower(config(kind="open_clip", name="mmctx-vit", options={}, pretrained=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "vit_tinny_patch16_224"}, r"no model 'vit_tinny_patch16_224'; close names: .*vit_tiny_patch16_224"),
        ({"image_size": 40}, r"image_size 40 is not divisible by patch size 16 x shuffle 1 = 16"),
        ({"image_size": 48, "shuffle": 2}, r"image_size 48 is not divisible by patch size 16 x shuffle 2 = 32"),
        ({"options": {**TINY, "num_heads": 5}}, r"num_heads 5 does not divide embed_dim 32"),
        ({"options": {"embed_dim": 32, "num_heads": 6, "nonsense": 1}}, r"num_heads 6 does not divide embed_dim 32"),
        ({"options": {**TINY, "nonsense": 1}}, r"nonsense"),
        (
            {"options": {**TINY, "patch_size": 8}, "stem": "conv", "image_size": 36},
            r"36 is not divisible by patch size 8",
        ),
        ({"options": {**TINY, "patch_size": 12}, "stem": "conv"}, r"power of two, found 12"),
        ({"name": "resnet18", "options": {}, "image_size": None}, r"only plain ViTs"),
        ({"name": "vit_base_r50_s16_224", "options": {}, "image_size": None}, r"plain ViT"),
        ({"name": "levit_128", "options": {}, "image_size": None}, r"resnet|plain ViT|batch norm"),
    ],
)
def test_configs_that_cannot_be_built_say_why(changes, message):
    with pytest.raises(ConfigError, match=message):
        image_geometry(config(**changes))


def test_geometry_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    image_geometry(config(options={**TINY, "depth": 1, "mlp_ratio": 3}))
    assert torch.equal(torch.rand(1), expected)
