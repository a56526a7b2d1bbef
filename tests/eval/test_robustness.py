"""The suite `robustness`: severity 0 against the suites themselves, an oracle, a blind model, one that compares pixels, and each corruption
against what it says it does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contexts import far_from_neutral
from tiny import png, triple, words, write_shard
from torch import Tensor, nn
from two_ranks import on_two_ranks

from mmctx.config import build_config
from mmctx.datasets.augment.sample import seeded
from mmctx.datasets.planning.plan import Bin
from mmctx.errors import ConfigError
from mmctx.eval import EvalContext, evaluate
from mmctx.eval.corruptions import CORRUPTIONS, SEVEREST, corrupt, corrupt_picture, corrupt_waveform, mistype
from mmctx.eval.suite_config import RobustnessConfig
from mmctx.eval.suites.robustness import evaluate_robustness, robustness_headline
from mmctx.pack import PackedBatch

ALL = tuple(range(1, SEVEREST + 1))
CLASSES = ["red", "green", "blue"]


@pytest.fixture
def context(tree: dict[str, Any], tmp_path: Path) -> EvalContext:
    """Twelve held-out samples with one of three classes, the first two with the same picture."""
    samples = [
        triple(seed)
        | {"__key__": f"s{seed:02d}", "cls": CLASSES[seed % 3].encode(), "txt": f"{words(seed)} {seed}".encode()}
        for seed in range(12)
    ]
    samples[1]["png"] = png(0)
    write_shard(tmp_path / "h.tar", samples)
    tree["eval"]["sources"]["heldout"]["shards"] = str(tmp_path / "h.tar")
    tree["eval"]["zero_shot"] = {"classes": CLASSES, "label": "cls"}
    tree["eval"]["robustness"] = {"severities": [1, 5]}
    return far_from_neutral(tree)


def test_severity_0_is_what_the_suites_find_and_the_rest_is_worse_input(context: EvalContext) -> None:
    found = evaluate(context, ["retrieval", "zero_shot", "robustness"])
    robust = found["robustness"]
    assert robust["severities"] == [0, 1, 5]
    assert set(robust["retrieval"]) == set(robust["levels"]) == set(CORRUPTIONS)
    assert robust["levels"]["audio/noise"] == [40, 0]
    ways = {"image": ["image_to_text"], "audio": ["audio_to_text"]}
    ways["text"] = ["text_to_image", "text_to_audio", "text_to_text1", "text1_to_text"]
    moved = 0
    for name, directions in robust["retrieval"].items():
        assert set(directions) == set(ways[name.partition("/")[0]])
        for way, curve in directions.items():
            clean = found["retrieval"][way]
            for cut in ("R@1", "R@10"):
                assert curve[cut][0] == clean[cut]
                assert curve["interval"][cut][0] == clean["interval"][cut]
                assert (
                    curve["chance"][cut] == clean["chance"][cut]
                )  # with two equal pictures, which noise must not make different
                assert len(curve[cut]) == len(curve["interval"][cut]) == 3
            assert curve["n"] == clean["n"] == 12
            moved += len({*curve["R@1"], *curve["R@10"]}) > 2
    assert moved  # a model that looks does not find the same at every severity
    assert set(robust["zero_shot"]) == {name for name in CORRUPTIONS if not name.startswith("text")}
    for name, ways_of in robust["zero_shot"].items():
        medium = name.partition("/")[0]
        assert set(ways_of) == {f"{medium}/similarity", f"{medium}/captioning"}
        for way, curve in ways_of.items():
            clean = found["zero_shot"][way]
            assert [curve[value][0] for value in ("top1", "low", "high")] == [clean[v] for v in ("top1", "low", "high")]
            assert (curve["n"], curve["chance"], len(curve["top1"])) == (12, 1 / 3, 3)
    headline = robustness_headline(robust)
    assert len(headline) == sum(len(w) for part in ("retrieval", "zero_shot") for w in robust[part].values())
    curve = robust["zero_shot"]["audio/speed"]["audio/similarity"]["top1"]
    assert headline["audio/speed/audio/similarity"] == pytest.approx((curve[1] + curve[2]) / 2)


def test_two_ranks_give_the_numbers_of_one(context: EvalContext) -> None:
    data = context.data.config.model_copy(update={"bin_tokens": 160})
    context = replace(context, data=replace(context.data, config=data))
    assert len(context.bins("similarity")[1]) >= 3
    alone = evaluate(context, ["robustness"])
    assert on_two_ranks(context, lambda one: evaluate(one, ["robustness"])) == [alone, alone]


class Numbered(nn.Module):
    """Embeds a view as the number of its sample, whatever has become of it; a blind one embeds all alike."""

    def __init__(self, blind: bool) -> None:
        super().__init__()
        self.blind, self.objectives = blind, {"similarity": self}

    def encode(self, batch: PackedBatch) -> Tensor:
        owner = torch.tensor([int(key[1:]) for key in batch.keys])
        return torch.eye(12)[owner.repeat_interleave(torch.tensor(batch.layout.lengths))]

    def embed(self, hidden: Tensor, positions: Tensor, sizes: Any) -> Tensor:
        return torch.ones(len(sizes), 1) if self.blind else hidden[positions]


class Pixels(Numbered):
    """Knows by heart which clean picture belongs to a text, and compares pixels: it must fall as pictures get worse."""

    def __init__(self, pictures: Tensor) -> None:
        super().__init__(blind=False)
        self.pictures = nn.functional.normalize(self.vectors(pictures), dim=1)  # (12, pixels)

    @staticmethod
    def vectors(pictures: Tensor) -> Tensor:
        return pictures.flatten(1).float() - 127.5

    def encode(self, batch: PackedBatch) -> Tensor:
        owner = torch.tensor([int(key[1:]) for key in batch.keys])
        states = self.pictures[owner]
        if "image" in batch.media:
            starts = batch.layout.cu_seqlens[:-1].long()
            media = batch.media["image"]
            per_item = media.num_tokens[0]
            shown = torch.searchsorted(starts, media.slots[::per_item].contiguous(), right=True) - 1
            states = states.index_copy(
                0, shown, nn.functional.normalize(self.vectors(media.values), dim=1)[media.rows[::per_item] // per_item]
            )
        return states.repeat_interleave(torch.tensor(batch.layout.lengths), dim=0)


def without_zero_shot(context: EvalContext, model: nn.Module, **settings: Any) -> dict[str, Any]:
    update = {"zero_shot": None, "robustness": build_config(RobustnessConfig, settings, "test")}
    config = context.config.model_copy(update=update)
    return evaluate_robustness(replace(context, model=model, config=config))  # type: ignore[arg-type]


@pytest.mark.parametrize("blind", [False, True])
def test_an_oracle_finds_all_and_a_blind_model_nothing(context: EvalContext, blind: bool) -> None:
    found = without_zero_shot(context, Numbered(blind), severities=[1, 5])
    assert found["zero_shot"] == {}
    assert set(found["retrieval"]) == set(CORRUPTIONS)
    for ways in found["retrieval"].values():
        for curve in ways.values():
            assert curve["R@1"] == curve["R@10"] == ([0.0] * 3 if blind else [1.0] * 3)


def test_who_compares_pixels_falls_from_severity_to_severity(context: EvalContext) -> None:
    dataset = context.data.dataset
    pictures = torch.stack([dataset.sample(0, n).image.values for n in range(12)])  # type: ignore[union-attr]
    names = [name for name in CORRUPTIONS if name.startswith("image")]
    found = without_zero_shot(context, Pixels(pictures), corruptions=names)["retrieval"]
    for name, ways in found.items():
        curve = ways["image_to_text"]["R@1"]
        assert (curve[0], len(curve)) == (1.0, SEVEREST + 1)
        assert name != "image/crop" or curve[-1] < 0.5
    noise, blur = (found[f"image/{name}"]["image_to_text"]["R@1"] for name in ("noise", "blur"))
    assert min(noise) > 0.5  # thousands of pixels average noise away
    assert blur == sorted(blur, reverse=True)


def test_what_is_drawn_hangs_on_seed_source_and_key_alone(context: EvalContext) -> None:
    for name in ("image/noise", "image/crop", "audio/noise", "text/typos"):
        data = corrupt(context.data, name, 5)
        first = [data.dataset.sample(0, n) for n in range(4)]
        torch.manual_seed(7)
        again = [corrupt(context.data, name, 5).only("similarity").dataset.sample(0, n) for n in (3, 2, 1, 0)][::-1]
        state = torch.get_rng_state()
        data.dataset.sample(0, 0)
        assert torch.equal(torch.get_rng_state(), state)
        clean = [context.data.dataset.sample(0, n) for n in range(4)]
        changed = 0
        for one, other, before in zip(first, again, clean, strict=True):
            assert one.uid == before.uid
            assert one.image is not None
            assert other.image is not None
            assert before.image is not None
            assert one.audio is not None
            assert other.audio is not None
            assert before.audio is not None
            assert torch.equal(one.image.values, other.image.values)
            assert torch.equal(one.audio.values, other.audio.values)
            assert [t.tolist() for t in one.texts] == [t.tolist() for t in other.texts]  # type: ignore[union-attr]
            differs = {
                "image": not torch.equal(one.image.values, before.image.values),
                "audio": not torch.equal(one.audio.values, before.audio.values),
                "text": [t.tolist() for t in one.texts] != [t.tolist() for t in before.texts],  # type: ignore[union-attr]
            }
            changed += differs.pop(name.partition("/")[0])
            assert not any(differs.values())
        assert changed >= 3
    noisy = corrupt(context.data, "image/noise", 5).dataset
    shown = [noisy.sample(0, n).image.values for n in (0, 1)]  # type: ignore[union-attr]
    assert not torch.equal(*shown)  # one picture, two samples: noise of their own


def test_documents_have_room_for_faster_clips_and_longer_texts(context: EvalContext) -> None:
    bin = Bin(tuple((0, n, 0, 0) for n in range(12)), tokens=0, cost=0)
    faster = corrupt(context.data, "audio/speed", 5).only("captioning").dataset
    clips = [sum(item.num_tokens for _, item in d.media if item.kind == "audio") for d in _documents(faster, bin)]
    before = [
        sum(i.num_tokens for _, i in d.media if i.kind == "audio")
        for d in _documents(context.data.only("captioning").dataset, bin)
    ]
    assert sum(clips) < 0.7 * sum(before)
    assert not faster.undecodable
    table = context.data.dataset.tables[0]
    typed = corrupt(context.data, "text/typos", 5)
    lengths = [len(t) for n in range(12) for t in typed.dataset.sample(0, n).texts if t is not None]
    table.room = max(lengths) - 3
    cut = [len(t) for n in range(12) for t in typed.dataset.sample(0, n).texts if t is not None]
    assert cut == [min(length, table.room) for length in lengths] != lengths


def _documents(dataset: Any, bin: Bin) -> list[Any]:
    return [document for place in bin.samples for document in dataset.documents(*place)]


@pytest.mark.parametrize("level", CORRUPTIONS["image/noise"])
def test_noise_has_its_deviation(level: float) -> None:
    with seeded(0):
        noisy = corrupt_picture(torch.full((3, 64, 64), 128, dtype=torch.uint8), "image/noise", level).double() / 255
    assert noisy.mean() == pytest.approx(128 / 255, abs=0.02)
    wide = np.random.default_rng(0).normal(128 / 255, level, 1_000_000).clip(0, 1)  # what falls outside is cut off
    assert noisy.std().item() == pytest.approx(wide.std(), rel=0.03)


@pytest.mark.parametrize("level", CORRUPTIONS["image/blur"])
def test_blur_is_a_gaussian_of_its_width(level: float) -> None:
    from scipy.ndimage import gaussian_filter

    pixels = torch.randint(0, 256, (3, 112, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = corrupt_picture(pixels, "image/blur", level)
    expected = gaussian_filter(pixels.double().numpy(), (0, level / 2, level / 2), mode="mirror")
    assert np.abs(found.double().numpy() - expected).max() < 2.5  # kernels end at different places


@pytest.mark.parametrize("level", CORRUPTIONS["image/crop"])
def test_crops_leave_their_share_of_the_area(level: float) -> None:
    """On a picture whose red says where a column was and whose green says where a row was."""
    line = torch.linspace(0, 250, 100).round().byte()
    pixels = torch.stack(
        [line.expand(100, 100), line[:, None].expand(100, 100), torch.zeros(100, 100, dtype=torch.uint8)]
    )
    places = []
    for seed in range(8):
        with seeded(seed):
            found = corrupt_picture(pixels, "image/crop", level)
        assert found.shape == pixels.shape
        red, green = (found[channel].double() / 250 for channel in (0, 1))
        wide, high = (red[:, -1] - red[:, 0]).mean(), (green[-1] - green[0]).mean()
        assert (wide * high).item() == pytest.approx(level, rel=0.1)
        places.append((round(red[0, 0].item(), 2), round(green[0, 0].item(), 2)))
    assert len(set(places)) > 4


@pytest.mark.parametrize("level", CORRUPTIONS["audio/noise"])
def test_noise_of_sound_has_its_ratio(level: float) -> None:
    wave = 0.3 * torch.sin(torch.arange(16_000) * 0.3)
    with seeded(0):
        noise = corrupt_waveform(wave, "audio/noise", level, 16_000) - wave
    ratio = 10 * torch.log10(wave.square().mean() / noise.square().mean())
    assert ratio.item() == pytest.approx(level, abs=0.2)
    silent = torch.zeros(400)
    assert torch.equal(corrupt_waveform(silent, "audio/noise", level, 16_000), silent)


@pytest.mark.parametrize("level", CORRUPTIONS["audio/speed"])
def test_faster_clips_are_shorter_and_higher(level: float) -> None:
    wave = torch.sin(2 * torch.pi * 440 * torch.arange(16_000) / 16_000)
    faster = corrupt_waveform(wave, "audio/speed", level, 16_000)
    assert len(faster) == pytest.approx(16_000 / level, abs=2)
    pitch = faster.numpy()
    peak = np.abs(np.fft.rfft(pitch * np.hanning(len(pitch)))).argmax() * 16_000 / len(pitch)
    assert peak == pytest.approx(440 * level, abs=2)


@pytest.mark.parametrize("share", [0.0, *CORRUPTIONS["text/typos"]])
def test_typos_are_as_many_as_they_say(share: float) -> None:
    import jiwer

    text = " ".join(words(seed, 8) for seed in range(60))
    typed = mistype(text, share, np.random.default_rng(0))
    # a swap counts as two errors, one with itself or at the end of a word as none, and neighbouring errors make up for each other
    assert 0.75 * share <= jiwer.cer(text, typed) <= 1.4 * share
    assert abs(len(typed) - len(text)) <= 0.05 * len(text)  # as many come as go
    assert set(typed) <= set(text)


@pytest.mark.parametrize("text", ["a", "红色的心", "  x ", "an\nold  tree"])
def test_typos_leave_a_text_and_its_spaces(text: str) -> None:
    for seed in range(40):
        typed = mistype(text, 0.9, np.random.default_rng(seed))
        assert typed.strip()
        assert [char for char in typed if char.isspace()] == [char for char in text if char.isspace()]


def test_errors_of_a_severity_stay_in_the_next(context: EvalContext) -> None:
    text = " ".join(words(seed, 8) for seed in range(10))
    few, many = ({*_changes(text, share)} for share in (0.05, 0.2))
    assert few < many


def _changes(text: str, share: float) -> list[int]:
    """Where a replaced or missing letter is, in a text of which every letter is another one."""
    letters = "".join(chr(0x4E00 + n) for n in range(len(text)))
    typed = mistype(letters, share, np.random.default_rng(3))
    return [n for n, char in enumerate(letters) if char not in typed]


def test_nothing_where_nothing_is_embedded(tree: dict[str, Any]) -> None:
    tree["objectives"] = {"captioning": {"kind": "captioning"}}
    for part in (tree["data"], tree["eval"]):
        for source in part["sources"].values():
            source["objectives"] = ["captioning"]
    assert evaluate(far_from_neutral(tree), ["robustness"])["robustness"] == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corruptions": ["image/fog"]}, "not 'image/fog'"),
        ({"severities": [3, 1]}, "must rise"),
        ({"severities": [6]}, "less than or equal to 5"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(RobustnessConfig, settings, "x.yaml")
