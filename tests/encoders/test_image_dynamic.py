"""Pictures that keep their shape: sizes from width and height alone, features equal timm's own, no picture sees another."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmctx.encoders.image import ImageEncoder, ImageEncoderConfig, ImagePreprocessor, image_geometry
from mmctx.errors import ConfigError, DataError
from mmctx.fingerprint import bin_fingerprint
from mmctx.model import _places
from mmctx.pack import Document, MediaBatch, MediaItem, pack_documents
from mmctx.parallel.shard import shard_batch

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
NAMES = [
    ("naflexvit_base_patch16_gap", TINY),
    ("naflexvit_base_patch16_parfac_gap", TINY),  # factorised positions, aspect ratio kept
    ("naflexvit_base_patch16_siglip", TINY),
    ("vit_small_patch16_224", {**TINY, "img_size": 64}),
    ("eva02_base_patch16_clip_224", {**TINY, "img_size": 64}),  # rotary positions
]


def config(name: str = "naflexvit_base_patch16_gap", max_patches: int = 24, **changes) -> ImageEncoderConfig:
    changes = {"options": TINY, **changes}
    return ImageEncoderConfig(name=name, max_patches=max_patches, **changes)


def random_pixels(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def batch_of(items: list[MediaItem]) -> MediaBatch:
    """As packing makes it: one document a picture."""
    documents = [
        Document("captioning", np.full(item.num_tokens, 7), np.full(item.num_tokens, 1), True, ((0, item),))
        for item in items
    ]
    return pack_documents(documents, {"image": 7}).media["image"]


class TestSizes:
    @settings(deadline=None, max_examples=200)
    @given(
        width=st.integers(1, 3000),
        height=st.integers(1, 3000),
        max_patches=st.integers(4, 300),
        shuffle=st.sampled_from([1, 2]),
    )
    def test_any_picture_fits_and_stays_as_it_is_the_second_time(self, width, height, max_patches, shuffle):
        geometry = image_geometry(config())
        geometry = replace(geometry, unit=16 * shuffle, num_tokens=max_patches // shuffle**2)
        ((rows,), (columns,)) = (side.tolist() for side in geometry.sizes(np.array([width]), np.array([height])))
        assert 1 <= rows * columns <= geometry.num_tokens
        again = geometry.sizes(np.array([columns * geometry.unit]), np.array([rows * geometry.unit]))
        assert (again[0][0], again[1][0]) == (rows, columns)
        native = width * height / geometry.unit**2
        if (
            native > 2 * geometry.num_tokens
            and max(width, height) < 4 * min(width, height)
            and geometry.num_tokens >= 64
        ):
            assert rows * columns > 0.7 * geometry.num_tokens, "the room is used"
            assert 0.7 < (columns / rows) / (width / height) < 1.4, "the shape is kept"

    def test_small_pictures_keep_their_size(self):
        preprocess = ImagePreprocessor(config())
        item = preprocess(random_pixels(48, 80))
        assert torch.equal(item.values, random_pixels(48, 80))
        assert item.num_tokens == 15
        assert preprocess.num_tokens(np.array([80, 83, 640]), np.array([48, 46, 640])).tolist() == [15, 15, 16]

    @settings(deadline=None, max_examples=20)
    @given(width=st.integers(1, 400), height=st.integers(1, 400))
    def test_the_item_is_as_large_as_promised(self, width, height):
        preprocess = ImagePreprocessor(config(shuffle=2))
        item = preprocess(random_pixels(height, width))
        assert item.num_tokens == preprocess.num_tokens(np.array([width]), np.array([height]))[0]
        assert item.num_tokens * 32 * 32 == item.values[0].numel()


class TestEncoder:
    @pytest.mark.parametrize(("name", "options"), NAMES)
    def test_features_are_timms_own(self, name, options):
        """Of NaFlex models by its own way for pictures of all sizes: padded, with a mask of the valid patches."""
        torch.manual_seed(0)
        encoder = ImageEncoder(config(name, options=options), dim=8).eval()
        model = encoder.tower.model
        shapes = [(32, 48), (64, 64), (16, 96)]
        pictures = [torch.randn(1, 3, height, width) for height, width in shapes]
        found = [encoder.tower(picture)[0] for picture in pictures]
        if not name.startswith("naflex"):
            whole = timm.create_model(name, num_classes=0, dynamic_img_size=True, **options).eval()
            whole.load_state_dict(model.state_dict(), strict=False)
            expected = [whole.forward_features(picture)[0, whole.num_prefix_tokens :] for picture in pictures]
        else:
            patches, coords, valid = (
                torch.zeros(3, 16, 16 * 16 * 3),
                torch.zeros(3, 16, 2).long(),
                torch.zeros(3, 16).bool(),
            )
            for n, (picture, (height, width)) in enumerate(zip(pictures, shapes, strict=True)):
                rows, columns = height // 16, width // 16
                cut = picture[0].view(3, rows, 16, columns, 16).permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)
                patches[n, : len(cut)], valid[n, : len(cut)] = cut, True
                coords[n, : len(cut)] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
            features = model.forward_features(patches, patch_coord=coords, patch_valid=valid)["patches"]
            expected = [f[model.num_prefix_tokens :][v] for f, v in zip(features, valid, strict=True)]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(("name", "options"), NAMES[:3])
    def test_a_batch_equals_its_pictures_one_by_one(self, name, options):
        torch.manual_seed(0)
        made = config(name, options=options, shuffle=2)
        encoder = ImageEncoder(made, dim=8).double()
        shapes = [(64, 64), (32, 200), (90, 70), (64, 64), (31, 200)]
        items = [ImagePreprocessor(made)(random_pixels(*shape, seed)) for seed, shape in enumerate(shapes)]
        batch = batch_of(items)
        assert batch.sizes == ((64, 64), (32, 192), (96, 64), (64, 64), (32, 192))
        together = encoder(batch)
        weights = torch.randn_like(together)
        grads = torch.autograd.grad((together * weights).sum(), list(encoder.parameters()))
        alone = torch.cat([encoder(batch_of([item])) for item in items])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
        grads_alone = torch.autograd.grad((alone * weights).sum(), list(encoder.parameters()))
        torch.testing.assert_close(grads, grads_alone, rtol=0, atol=1e-6)  # timm interpolates positions in float32
        encoder.train().chunk = 1
        chunked = encoder(batch)
        torch.testing.assert_close(chunked, together, rtol=0, atol=1e-10)
        grads_chunked = torch.autograd.grad((chunked * weights).sum(), list(encoder.parameters()))
        torch.testing.assert_close(grads, grads_chunked, rtol=0, atol=1e-6)

    def test_the_empty_batch_gives_every_parameter_a_gradient(self):
        for name, options in NAMES:
            encoder = ImageEncoder(config(name, options=options), dim=8)
            (encoder(encoder.empty_batch("cpu")).sum() * 0).backward()
            assert all(p.grad is not None for p in encoder.parameters()), name

    def test_a_checkpoint_of_squares_is_read_at_any_shape(self, tmp_path):
        options = {**TINY, "img_size": 64}
        model = timm.create_model("vit_small_patch16_224", **options).eval()
        torch.save(model.state_dict(), tmp_path / "model.pth")
        made = config("vit_small_patch16_224", options=options, pretrained=str(tmp_path / "model.pth"))
        tower = ImageEncoder(made, 8).eval().tower
        pixels = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(tower(pixels), model.forward_features(pixels)[:, 1:], rtol=0, atol=1e-5)
        assert tower(torch.randn(1, 3, 32, 96)).shape == (1, 12, 32)

    def test_a_naflex_checkpoint_is_read(self, tmp_path):
        model = timm.create_model("naflexvit_base_patch16_siglip", **TINY).eval()
        torch.save(model.state_dict(), tmp_path / "model.pth")
        made = config("naflexvit_base_patch16_siglip", pretrained=str(tmp_path / "model.pth"))
        pixels = torch.randn(1, 3, 48, 80)
        tower = ImageEncoder(made, 8).eval().tower
        torch.testing.assert_close(tower(pixels), model.forward_features(pixels), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "eva02_base_patch16_clip_224"])
    def test_flops_are_what_pytorch_counts(self, name):
        made = config(name, max_patches=64, shuffle=2)
        cost, encoder = ImageEncoder.flops(made, 24), ImageEncoder(made, 24)
        for height, width in ((64, 64), (32, 160)):
            item = ImagePreprocessor(made)(random_pixels(height, width))
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
                encoder(batch_of([item]))
            t = item.num_tokens
            assert counter.get_total_flops() == cost.item + t * cost.token + (t * t - t) * cost.square

    def test_what_does_not_fit_says_why(self):
        encoder = ImageEncoder(config(), dim=8)
        with pytest.raises(DataError, match="whole 16 x 16 pixels, found one of 20 x 32"):
            encoder(batch_of([MediaItem("image", random_pixels(20, 32), 2)]))
        with pytest.raises(DataError, match="make 4 embeddings, but the batch has room for 3"):
            encoder(batch_of([MediaItem("image", random_pixels(32, 32), 3)]))
        with pytest.raises(ConfigError, match="any size: set max_patches"):
            image_geometry(ImageEncoderConfig(name="naflexvit_base_patch16_gap", options=TINY))
        with pytest.raises(ConfigError, match="open_clip's towers take pictures of one size"):
            image_geometry(ImageEncoderConfig(kind="open_clip", name="ViT-B-16", max_patches=64))


class TestPacking:
    def items(self) -> list[MediaItem]:
        return [
            MediaItem("image", random_pixels(16 * rows, 16 * columns, seed=rows), rows * columns)
            for rows, columns in ((2, 3), (4, 1), (1, 5))
        ]

    def test_pictures_come_back_as_they_went_in(self):
        items = self.items()
        batch = batch_of(items)
        assert batch.lengths == tuple(item.values.numel() for item in items)
        assert all(torch.equal(a, b.values) for a, b in zip(batch.pictures(), items, strict=True))
        alike = batch_of([items[0], replace(items[0], values=items[0].values.clone())])
        assert alike.values.shape == (2, 3, 32, 48)
        assert alike.picture_sizes == ((32, 48),) * 2

    def test_a_fingerprint_knows_the_shapes(self):
        items = self.items()
        turned = [replace(item, values=item.values.reshape(3, *item.values.shape[:0:-1])) for item in items]
        names = {
            bin_fingerprint(0, pack_documents([self.document(part) for part in parts], {"image": 7}))
            for parts in (items, turned)
        }
        assert len(names) == 2

    def document(self, *items: MediaItem) -> Document:
        starts = np.cumsum([0, *(item.num_tokens + 1 for item in items)])
        ids = np.concatenate([[*[7] * item.num_tokens, 1] for item in items])
        return Document("captioning", ids, ids, True, tuple(zip(starts.tolist(), items, strict=False)))

    def test_shares_of_ranks_are_the_whole(self):
        items = self.items()
        batch = pack_documents([self.document(*items), self.document(items[1])], {"image": 7})
        shares = [shard_batch(batch, rank, 2, group=None).media["image"] for rank in range(2)]
        pictures = [picture for share in shares for picture in share.pictures()]
        assert all(torch.equal(a, b.values) for a, b in zip(pictures, items, strict=True))
        assert sum((share.num_tokens for share in shares), ()) == (6, 4, 5)

    def test_places_in_pictures_of_several_shapes(self):
        items = self.items()
        media = pack_documents([self.document(items[1], items[0]), self.document(items[1])], {"image": 7}).media[
            "image"
        ]
        place, columns = _places(media, [(4, 1), (2, 3)])
        assert place.tolist() == [*range(4), *range(6), *range(4)]
        assert columns.tolist() == [1] * 4 + [3] * 6 + [1] * 4
        assert _places(media, [(1, 4), (1, 4)])[1] == 4
