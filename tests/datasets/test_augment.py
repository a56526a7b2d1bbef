"""Augmentation: the same bits from the same seed, other ones in each epoch, lengths as planned, libraries' own transforms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.datasets.augment.audio import augment_waveform, mask_frames
from mmctx.datasets.augment.config import AudioAugmentConfig, AugmentConfig, ImageAugmentConfig, TextAugmentConfig
from mmctx.datasets.augment.image import augment_image
from mmctx.datasets.augment.sample import seeded
from mmctx.datasets.augment.text import drop_tokens
from mmctx.datasets.fetch import StepSampler, make_loader
from mmctx.datasets.planning.plan import Plan
from mmctx.datasets.view.batch_page import batch_page
from mmctx.datasets.view.media import png_uri
from mmctx.errors import ConfigError
from mmctx.fingerprint import bin_fingerprint
from mmctx.pack import IGNORE_INDEX, Document
from mmctx.tokenizer import TextTokenizer
from mmctx.train.config import RunConfig

ALL = {
    "image": {"crop": [0.3, 1.0], "flip": 0.5, "randaugment": 1, "jitter": [0.3, 0.3, 0.3, 0.1]},
    "audio": {"speeds": [0.9, 1.0, 1.1], "noise_snr": [5, 20]},
    "text": {"mask": 0.2, "replace": 0.1, "pieces": 2},
}


def open_data(tree: dict[str, Any], augment: dict[str, Any] | None = None, **more: Any) -> RunData:
    sources = {name: source | {"augment": augment} for name, source in tree["data"]["sources"].items()}
    config = build_config(RunConfig, tree | {"data": tree["data"] | {"sources": sources} | more}, "tree")
    return build_data(config.data, config.data.sources, config.model, config.objectives, config.train.seed)


def documents(data: RunData, source: str, epoch: int, samples: range = range(4)) -> list[Document]:
    number = list(data.tables).index(source)
    return [document for sample in samples for document in data.dataset.documents(number, sample, epoch)]


def same(a: Document, b: Document) -> bool:
    media = all(torch.equal(x.values, y.values) for (_, x), (_, y) in zip(a.media, b.media, strict=True))
    return media and np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.labels, b.labels)


@pytest.mark.parametrize("what", [*ALL, "all"])
@pytest.mark.parametrize("source", ["triples", "books"])
def test_drawn_by_seed_epoch_and_key_in_lengths_that_the_plan_knows(
    tree: dict[str, Any], source: str, what: str
) -> None:
    config = ALL if what == "all" else {what: ALL[what]}
    plain, data, cached = open_data(tree), open_data(tree, config), open_data(tree, config, cache_mb=64)
    clean = documents(plain, source, 0)
    state = torch.get_rng_state()
    first = documents(data, source, 0)
    assert torch.equal(torch.get_rng_state(), state)  # dropout of the process that loads is not touched
    torch.manual_seed(99)
    for again in (documents(data, source, 0), documents(cached, source, 0), documents(cached, source, 0)):
        assert all(same(a, b) for a, b in zip(first, again, strict=True))
    later = documents(cached, source, 1)  # from the cache
    assert not all(same(a, b) for a, b in zip(first, later, strict=True))
    for epoch in (first, later):
        assert not all(same(a, b) for a, b in zip(clean, epoch, strict=True))
        for a, b in zip(clean, epoch, strict=True):
            assert len(a.input_ids) == len(b.input_ids)
            assert [(place, item.num_tokens) for place, item in a.media] == [
                (p, item.num_tokens) for p, item in b.media
            ]
            assert [item.values.shape for _, item in a.media] == [item.values.shape for _, item in b.media]
            assert {item.values.dtype for _, item in b.media} <= {torch.uint8, torch.float32}


def test_a_picture_shown_twice_is_still_one(tree: dict[str, Any]) -> None:
    made = documents(open_data(tree, ALL), "triples", 0, range(1))
    pictures = {id(item) for document in made for _, item in document.media if item.kind == "image"}
    assert len(pictures) == 1


def test_workers_and_cache_change_nothing(tree: dict[str, Any]) -> None:
    found = []
    for workers, cache in ((0, 0), (2, 0), (0, 64)):
        data = open_data(tree, ALL, num_workers=workers, cache_mb=cache)
        plan = Plan(data.config, data.tables, 1)
        loader = make_loader(data.dataset, StepSampler(plan, 0, 2), data.config)
        found.append([bin_fingerprint(number, batch) for number, batch in enumerate(loader)])
    assert found[0] == found[1] == found[2]
    plain = open_data(tree)
    bins = [bin for step in range(2) for bin in Plan(plain.config, plain.tables, 1).step(step)]
    batches = [plain.dataset[bin] for bin in bins]
    assert [batch.num_tokens for batch in batches] == [bin.tokens for bin in bins]
    assert [bin_fingerprint(number, batch) for number, batch in enumerate(batches)] != found[0]


def test_sources_that_are_augmented_otherwise_do_not_share_what_is_cached(tree: dict[str, Any]) -> None:
    """Raw pictures must not come out where finished ones are asked for: `with_tables` shares the cache."""
    data, plain = open_data(tree, ALL, cache_mb=64), open_data(tree, cache_mb=64)
    documents(data, "triples", 0)
    shared = replace(data, dataset=data.dataset.with_tables(plain.dataset.tables))
    assert all(same(a, b) for a, b in zip(documents(shared, "triples", 0), documents(plain, "triples", 0), strict=True))


def test_held_out_sources_are_never_augmented(tree: dict[str, Any]) -> None:
    tree["eval"]["sources"]["heldout"]["augment"] = ALL
    with pytest.raises(ConfigError, match=r"sources\.heldout\.augment is set.*remove it"):
        build_config(RunConfig, tree, "tree")


def test_the_page_shows_what_is_trained_on(tree: dict[str, Any]) -> None:
    data = open_data(tree, ALL)
    bins = Plan(data.config, data.tables, 1).step(0)
    batches = [data.dataset[bin] for bin in bins]
    page = batch_page("tiny", 0, data, bins, batches)
    for batch in batches:
        for pixels in batch.media["image"].values:
            assert png_uri(pixels.permute(1, 2, 0).contiguous().numpy()) in page


TRANSFORMS: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "crop": (
        {"crop": (0.2, 0.9)},
        lambda: v2.RandomResizedCrop(24, (0.2, 0.9), interpolation=v2.InterpolationMode.BICUBIC),
    ),
    "flip": ({"crop": None, "flip": 0.5}, lambda: v2.RandomHorizontalFlip(0.5)),
    "randaugment": ({"crop": None, "randaugment": 2, "magnitude": 12}, lambda: v2.RandAugment(2, 12)),
    "jitter": ({"crop": None, "jitter": (0.4, 0.3, 0.2, 0.1)}, lambda: v2.ColorJitter(0.4, 0.3, 0.2, 0.1)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_pictures_are_torchvisions(name: str) -> None:
    config, transform = TRANSFORMS[name]
    pixels = torch.randint(0, 256, (3, 40, 24) if name == "crop" else (3, 24, 24), dtype=torch.uint8)
    for seed in range(4):
        with seeded(seed):
            ours = augment_image(pixels, ImageAugmentConfig(**config), 24)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            theirs = transform()(pixels)
        assert torch.equal(ours, theirs)
        assert ours.shape == (3, 24, 24)


def test_crops_come_from_the_decoded_picture(tree: dict[str, Any], tmp_path: Any) -> None:
    """A crop of a quarter of the area of a large picture shows detail that the shrunk picture no longer has."""
    import io

    from PIL import Image
    from tiny import write_shard

    stripes = np.zeros((320, 320, 3), np.uint8)
    stripes[:, ::10] = stripes[:, 1::10] = stripes[:, 2::10] = stripes[:, 3::10] = stripes[:, 4::10] = 255
    out = io.BytesIO()
    Image.fromarray(stripes).save(out, "PNG")
    write_shard(tmp_path / "s.tar", [{"__key__": "striped", "png": out.getvalue(), "txt": b"red"}])
    tree["data"]["sources"] = {"s": {"shards": str(tmp_path / "s.tar"), "objectives": ["captioning"]}}

    def contrast(augment: dict[str, Any] | None) -> float:
        (document,) = documents(open_data(tree, augment), "s", 0, range(1))
        return float(document.media[0][1].values.float().std())

    assert contrast({"image": {"crop": [0.05, 0.05], "ratio": [1, 1]}}) > 3 * contrast(None)


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 3000), seed=st.integers(0, 50), speed=st.sampled_from([0.5, 0.9, 1.05, 2.0]))
def test_another_speed_keeps_the_length(length: int, seed: int, speed: float) -> None:
    waveform = torch.sin(torch.arange(length) / 5)
    config = AudioAugmentConfig(speeds=(speed,))
    with seeded(seed):
        found = augment_waveform(waveform, config, 16_000)
    assert found.shape == waveform.shape
    theirs, _ = torchaudio.functional.speed(waveform, 16_000, speed)
    if len(theirs) >= length:
        assert ((theirs.unfold(0, length, 1) - found).abs() < 1e-5).all(dim=1).any()  # some stretch of it
    else:
        padded = torch.nn.functional.pad(theirs, (length - len(theirs), length - len(theirs)))
        assert ((padded.unfold(0, length, 1) - found).abs() < 1e-5).all(dim=1).any()  # with silence around it


def test_noise_has_its_ratio_to_the_signal() -> None:
    waveform = torch.sin(torch.arange(160_000) / 5)
    for low, high in ((10.0, 10.0), (0.0, 30.0)):
        ratios = []
        for seed in range(12):
            with seeded(seed):
                noise = augment_waveform(waveform, AudioAugmentConfig(noise_snr=(low, high)), 16_000) - waveform
            ratios.append(float(10 * torch.log10(waveform.square().mean() / noise.square().mean())))
        assert min(ratios) >= low - 0.1
        assert max(ratios) <= high + 0.1
        assert max(ratios) - min(ratios) > (high - low) / 3 - 0.01
    with seeded(0):
        silence = augment_waveform(torch.zeros(100), AudioAugmentConfig(noise_snr=(0, 10)), 16_000)
    assert torch.isfinite(silence).all()


def test_masks_are_torchaudios_and_hide_behind_the_mean() -> None:
    frames = torch.randn(50, 20)
    config = AudioAugmentConfig(mel_masks=1, mel_width=6, frame_masks=0)
    for seed in range(6):
        with seeded(seed):
            ours = mask_frames(frames, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            theirs = torchaudio.functional.mask_along_axis(frames, 7, float(frames.mean()), 1)
        assert torch.equal(ours, theirs)
    widths, shares = set(), []
    for seed in range(300):
        with seeded(seed):
            masked = mask_frames(frames, AudioAugmentConfig(mel_masks=0, frame_masks=1, frame_width=12))
        hidden = (masked != frames).all(dim=1)
        widths.add(int(hidden.sum()))
        shares.append(hidden)
        assert torch.allclose(masked[hidden], frames.mean())
    assert widths == set(range(11))  # a fifth of the clip at most, though 12 are allowed
    assert torch.stack(shares).any(dim=0).float().mean() > 0.9
    one = torch.randn(1, 20)
    with seeded(0):
        assert mask_frames(one, AudioAugmentConfig(mel_masks=0, frame_masks=3)).equal(one)


@pytest.fixture
def tokenizer(corpus) -> TextTokenizer:
    return TextTokenizer(corpus / "tokenizer")


def test_tokens_are_dropped_in_exact_numbers_and_labels_stay(tokenizer: TextTokenizer) -> None:
    words = tokenizer.word_ids[:97]
    placeholder = tokenizer.placeholder_ids["image"]
    ids = np.concatenate([[placeholder] * 4, words, [tokenizer.eos_id]])
    labels = np.append(ids[1:], IGNORE_INDEX)
    document = Document("x", ids, labels, causal=True)
    config = TextAugmentConfig(mask=0.25, replace=0.1)
    changed = np.zeros(len(ids), int)
    for seed in range(50):
        found = drop_tokens(document, config, tokenizer, np.random.default_rng(seed))
        assert found.labels is labels
        assert (found.input_ids == tokenizer.mask_id).sum() == 24
        others = (found.input_ids != ids) & (found.input_ids != tokenizer.mask_id)
        assert others.sum() <= 9
        assert others.sum() >= 6  # another word is now and then the same
        changed += found.input_ids != ids
    assert not changed[:4].any()
    assert not changed[-1]
    assert (changed[4:-1] > 0).all()
    np.testing.assert_array_equal(document.input_ids, ids)


def test_text_pieces_are_predicted_in_the_order_in_which_they_are_read(tree: dict[str, Any]) -> None:
    data = open_data(tree, {"text": {"mask": 0, "pieces": 3}})
    for document in documents(data, "triples", 0):
        if document.objective == "captioning":
            places = np.flatnonzero(document.labels != IGNORE_INDEX)
            np.testing.assert_array_equal(document.labels[places], document.input_ids[places + 1])


def test_impossible_settings_are_named() -> None:
    for wrong in (
        {"image": {"crop": [0.5, 1.5]}},
        {"image": {"jitter": [0, 0, 0, 0.6]}},
        {"audio": {"speeds": [3.0]}},
        {"audio": {"speeds": [1.0371]}},
        {"audio": {"noise_snr": [20, 10]}},
        {"text": {"mask": 0.7, "replace": 0.7}},
    ):
        (options,) = wrong.values()
        with pytest.raises(ConfigError, match=next(iter(options))):
            build_config(AugmentConfig, wrong, "tree")
