"""The packaged sets: tiny copies of their layouts, and the real ones where they are installed."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from make_shards import encode_audio, encode_image, random_clip, random_pixels
from reading import left_out, read_back, shards_of

from mmctx.datasets.build import asterisk, gimp, stamps
from mmctx.datasets.build.asterisk import build_asterisk
from mmctx.datasets.build.fsdd import WORDS, build_fsdd
from mmctx.datasets.build.gimp import build_gimp
from mmctx.datasets.build.stamps import build_stamps
from mmctx.datasets.build.writer import BuildOptions
from mmctx.errors import ConfigError, DataError

OPTIONS = BuildOptions(num_workers=1)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="2cm" height="1cm"><rect width="2cm" height="1cm" fill="#0000ff"/></svg>'


def ogg(seed: int) -> bytes:
    return encode_audio(random_clip(seed, 2000), 8000, "OGG", "VORBIS")


def every(out: Path) -> list[Path]:
    return sorted(out.rglob("*.tar"))


class TestStamps:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "stamps" / "animals"
        folder.mkdir(parents=True)
        (folder / "frog.png").write_bytes(encode_image(random_pixels(1, 6, 6), "PNG"))
        (folder / "frog.txt").write_text("A frog.\nfr.utf8=Une grenouille.\nzh_CN.utf8=青蛙 \n", encoding="utf-8")
        (folder / "frog.ogg").write_bytes(ogg(1))
        for name in ("frog_desc.ogg", "frog_desc_fr.ogg", "frog_desc_lt.ogg"):
            (folder / name).write_bytes(ogg(len(name)))
        (folder / "cow.svg").write_text(SVG)
        (folder / "cow.txt").write_text("A cow.\nfr.utf8=Une vache.\n")
        (folder / "cow_desc_fr.ogg").write_bytes(ogg(5))
        (folder / "gone.txt").write_text("Nothing.\n")
        return folder.parent

    def test_spoken(self, folder: Path, tmp_path: Path, tokenizer) -> None:
        pytest.importorskip("resvg_py", reason="draws SVGs: pip install 'mmctx[demo]'")
        summary = build_stamps(tmp_path / "out", folder, options=OPTIONS)
        found = read_back(every(tmp_path / "out"), tokenizer, ("txt", "json:names.zh_CN"))
        texts = {key: tokenizer.decode(sample.texts[0]) for key, sample in found.items()}
        assert texts == {
            "animals/frog@en": "A frog.",
            "animals/frog@fr": "Une grenouille.",
            "animals/cow@fr": "Une vache.",
        }
        assert tokenizer.decode(found["animals/frog@fr"].texts[1]) == "青蛙"
        pixels = torch.from_numpy(random_pixels(1, 6, 6)).permute(2, 0, 1)
        assert torch.equal(found["animals/frog@fr"].image.values, pixels)
        assert all(len(sample.audio.values) == 2001 for sample in found.values())
        cow = found["animals/cow@fr"].image.values
        assert cow.shape == (3, 128, 256)
        assert cow[:, 64, 128].tolist() == [0, 0, 255]
        assert summary["languages"] == {"fr": 2, "en": 1}
        assert {key: reason for key, (reason, _) in left_out(tmp_path / "out").items()} == {
            "animals/frog@lt": "no_text",
            "animals/gone": "no_media",
        }

    @pytest.mark.parametrize(
        ("arguments", "keys"),
        [
            ({"languages": ["en"]}, {"animals/frog@en"}),
            ({"view": "captioned"}, {"animals/frog", "animals/cow"}),
            ({"view": "sounding"}, {"animals/frog"}),
        ],
    )
    def test_views_and_languages(self, folder: Path, tmp_path: Path, tokenizer, arguments, keys) -> None:
        pytest.importorskip("resvg_py", reason="draws SVGs: pip install 'mmctx[demo]'")
        build_stamps(tmp_path / "out", folder, options=OPTIONS, **arguments)
        found = read_back(every(tmp_path / "out"), tokenizer)
        assert found.keys() == keys
        assert all((sample.audio is None) == (arguments.get("view") == "captioned") for sample in found.values())

    def test_shuffled_captions_are_a_control(self, tmp_path: Path, tokenizer) -> None:
        """In training each picture and clip has another stamp's caption of the same language; held-out ones keep their own."""
        folder = tmp_path / "stamps"
        folder.mkdir()
        for number in range(20):
            (folder / f"{number}.png").write_bytes(encode_image(random_pixels(number, 6, 6), "PNG"))
            (folder / f"{number}.txt").write_text(f"number {number}\nfr.utf8=nombre {number}\n")
            for language in ("", "_fr"):
                (folder / f"{number}_desc{language}.ogg").write_bytes(ogg(number))
        options = BuildOptions(num_workers=1, heldout=0.3)
        found = {}
        for shuffled in (False, True):
            build_stamps(tmp_path / str(shuffled), folder, shuffled=shuffled, options=options)
            found[shuffled] = {
                split: read_back(shards_of(tmp_path / str(shuffled), split), tokenizer)
                for split in ("train", "heldout")
            }
        for split, texts in found[False].items():
            said = {key: tokenizer.decode(sample.texts[0]) for key, sample in found[True][split].items()}
            own = {key: tokenizer.decode(sample.texts[0]) for key, sample in texts.items()}
            assert said.keys() == own.keys()
            assert sorted(said.values()) == sorted(own.values())
            same = [said[key] == own[key] for key in own]
            assert all(same) if split == "heldout" else not any(same)
            assert all(torch.equal(texts[k].image.values, found[True][split][k].image.values) for k in own)
        assert found[False]["heldout"]

    def test_stamps_that_share_a_caption_are_one_group(self) -> None:
        captions = [
            {"en": "A sheep.", "fr": "Un mouton."},
            {"en": "A ram.", "fr": "Un bélier", "es": "Un carnero."},
            {"en": "A lamb.", "fr": "un mouton!"},  # as the sheep, in French
            {"en": "A goat.", "es": "un  carnero"},  # as the ram, in Spanish
            {"en": "A yak.", "de": "Un mouton."},  # the same words of another language
        ]
        found = [stamps.Stamp(str(number), "x.png", texts, {}, None) for number, texts in enumerate(captions)]
        groups = stamps.caption_groups(found)
        assert groups == stamps.caption_groups(found[::-1])
        assert groups == {"0": "0", "2": "0", "1": "1", "3": "1", "4": "4"}

    def test_wrong_arguments(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no caption in xx; there are en, fr, zh_CN"):
            build_stamps(tmp_path / "out", folder, languages=["xx"], options=OPTIONS)
        with pytest.raises(DataError, match="apt-get install tuxpaint-stamps-default"):
            build_stamps(tmp_path / "out", tmp_path / "absent", options=OPTIONS)

    @pytest.mark.slow
    @pytest.mark.skipif(not stamps.FOLDER.exists(), reason="needs apt-get install tuxpaint-stamps-default")
    def test_the_real_set(self, tmp_path: Path) -> None:
        pytest.importorskip("resvg_py", reason="draws SVGs: pip install 'mmctx[demo]'")
        found: list[stamps.LeftOut] = []
        every_stamp = stamps.read_stamps(stamps.FOLDER, found)
        assert len(every_stamp) == 950
        assert [line.key for line in found] == ["seasonal/christmas/gift", "seasonal/christmas/gift2"]
        assert sum("zh_CN" in stamp.captions for stamp in every_stamp) == 773
        options = BuildOptions(num_workers=2, heldout=0.2)
        summary = build_stamps(tmp_path, languages=["nl", "en"], options=options)
        assert summary["languages"] == {"nl": 67, "en": 65}
        assert sum(summary["counts"].values()) == 132
        captions = [  # of all languages, also those that were not asked for
            {
                (language, caption.lower())
                for sample in webdataset.WebDataset(paths, shardshuffle=False)
                for language, caption in json.loads(sample["json"])["names"].items()
            }
            for paths in ([str(p) for p in shards_of(tmp_path, split)] for split in ("train", "heldout"))
        ]
        assert captions[1]
        assert not captions[0] & captions[1]


class TestAsterisk:
    def test_tiny(self, tmp_path: Path, tokenizer) -> None:
        (tmp_path / "in" / "digits").mkdir(parents=True)
        for name in ("hello", "digits/1", "beep", "spare"):
            data = encode_audio(random_clip(len(name), 100), 8000, "WAV", "FLOAT")
            (tmp_path / "in" / f"{name}.wav").write_bytes(data)
        lines = "; remarks: none\nhello: Hello,  world: hi.\ndigits/1: one\nbeep: [a beep]\nabsent: gone\n"
        (tmp_path / "t.txt.gz").write_bytes(gzip.compress(lines.encode()))
        build_asterisk(tmp_path / "out", tmp_path / "in", tmp_path / "t.txt.gz", options=OPTIONS)
        found = read_back(shards_of(tmp_path / "out"), tokenizer)
        texts = {key: tokenizer.decode(sample.texts[0]) for key, sample in found.items()}
        assert texts == {"hello": "Hello, world: hi.", "digits/1": "one"}
        np.testing.assert_array_equal(found["hello"].audio.values[1:, 0], random_clip(5, 100))
        reasons = {key: reason for key, (reason, _) in left_out(tmp_path / "out").items()}
        assert reasons == {"beep": "not_speech", "spare": "no_text", "absent": "no_media"}

    def test_absent(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="apt-get install asterisk-core-sounds-en-wav"):
            build_asterisk(tmp_path / "out", tmp_path / "absent", options=OPTIONS)

    @pytest.mark.slow
    @pytest.mark.skipif(
        not (asterisk.FOLDER.exists() and asterisk.TRANSCRIPTS.exists()),
        reason="needs apt-get install asterisk-core-sounds-en asterisk-core-sounds-en-wav",
    )
    def test_the_real_set(self, tmp_path: Path, tokenizer) -> None:
        summary = build_asterisk(tmp_path, options=BuildOptions(num_workers=1, heldout=0.1))
        assert sum(summary["counts"].values()) == 551
        assert summary["left_out"] == {"not_speech": 17, "no_media": 1}
        assert len(read_back(every(tmp_path), tokenizer)) == 551


class TestGimp:
    PAGES = (
        ("index", "book", "p1", "<h1>Manual</h1><div class='toc'>contents</div>"),
        ("p1", "chapter", "p2", "<h2>One</h2><p>First <b>words</b><br/>here.</p><img src='images/a.png'/><p>Then.</p>"),
        (
            "p2",
            "sect1",
            "p3",
            "<ul><li><p>an item</p></li></ul><img src='images/note.png'/><img src='images/gone.png'/>",
        ),
        ("p3", "appendix", "", "<pre>  kept\n   as is</pre><script>var x;</script>"),
    )

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "en" / "images").mkdir(parents=True)
        for name in ("a", "note"):
            (tmp_path / "en" / "images" / f"{name}.png").write_bytes(encode_image(random_pixels(1, 5, 5), "PNG"))
        for name, unit, following, body in self.PAGES:
            link = f'<link rel="next" href="{following}.html"/>' if following else ""
            bar = '<div class="navheader"><div>bar</div><img src="images/next.png"/></div>'
            html = f"<html><head><title>{name}</title>{link}</head><body>{bar}<div class='{unit}'>{body}</div></body></html>"
            (tmp_path / "en" / f"{name}.html").write_text(html)
        (tmp_path / "en" / "lost.html").write_text("<p>x</p>")
        return tmp_path / "en"

    def test_chapters(self, folder: Path, tmp_path: Path, tokenizer) -> None:
        summary = build_gimp(tmp_path / "out", folder, unit="chapter", options=OPTIONS)
        found = read_back(shards_of(tmp_path / "out"), tokenizer)
        assert found.keys() == {"p1", "p3"}
        first, picture, last = found["p1"].segments
        assert tokenizer.decode(first) == "One\n\nFirst words\nhere.\n\n"
        assert torch.equal(picture.values, torch.from_numpy(random_pixels(1, 5, 5)).permute(2, 0, 1))
        assert tokenizer.decode(last).split() == ["Then.", "-", "an", "item"]
        assert tokenizer.decode(found["p3"].segments[0]) == "  kept\n   as is\n\n"
        assert (summary["chapters"], summary["pages"]) == (2, 3)
        assert summary["left_out"] == {"missing_file": 1, "no_prose": 1, "ornament": 1, "unlinked": 1}

    def test_pages(self, folder: Path, tmp_path: Path, tokenizer) -> None:
        build_gimp(tmp_path / "out", folder, options=OPTIONS)
        assert read_back(shards_of(tmp_path / "out"), tokenizer).keys() == {"p1", "p2", "p3"}

    def test_absent(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="apt-get install gimp-help-en"):
            build_gimp(tmp_path / "out", tmp_path, options=OPTIONS)

    @pytest.mark.slow
    @pytest.mark.skipif(not gimp.FOLDER.exists(), reason="needs apt-get install gimp-help-en")
    def test_the_real_set(self, tmp_path: Path, tokenizer) -> None:
        summary = build_gimp(tmp_path, unit="chapter", options=BuildOptions(num_workers=2, heldout=0.1))
        assert (summary["chapters"], summary["pages"]) == (30, 683)
        assert summary["pictures"] == 2263
        assert 270_000 < summary["words"] < 302_000
        documents = read_back(shards_of(tmp_path, "heldout"), tokenizer)
        assert max(len(document.segments) for document in documents.values()) > 50


class TestDigits:
    def test_the_official_split_from_archive_and_folder(self, tmp_path: Path, tokenizer) -> None:
        folder = tmp_path / "recordings"
        folder.mkdir()
        for digit, speaker, number in ((0, "ann", 0), (7, "bob", 4), (7, "bob", 5), (9, "ann", 12)):
            data = encode_audio(random_clip(number, 80), 8000, "WAV", "FLOAT")
            (folder / f"{digit}_{speaker}_{number}.wav").write_bytes(data)
        (folder / "readme.wav").write_bytes(b"")
        with tarfile.open(tmp_path / "fsdd.tar.gz", "w:gz") as tar:
            tar.add(folder, "recordings")
        for number, source in enumerate((tmp_path / "fsdd.tar.gz", folder)):
            out = tmp_path / f"out{number}"
            assert build_fsdd(out, source, options=OPTIONS)["left_out"] == {"bad_name": 1}
            train = read_back(shards_of(out, "train"), tokenizer, ("txt", "json:speaker"))
            test = read_back(shards_of(out, "test"), tokenizer)
            assert train.keys() == {"7_bob_5", "9_ann_12"}
            assert test.keys() == {"0_ann_0", "7_bob_4"}
            assert [tokenizer.decode(ids) for ids in train["7_bob_5"].texts] == ["seven", "bob"]
            np.testing.assert_array_equal(train["7_bob_5"].audio.values[1:, 0], random_clip(5, 80))

    def test_recordings_held_back_to_choose_settings(self, tmp_path: Path, tokenizer) -> None:
        folder = tmp_path / "recordings"
        folder.mkdir()
        for number in (4, 5, 6, 7):
            (folder / f"3_ann_{number}.wav").write_bytes(encode_audio(random_clip(1, 80), 8000, "WAV", "FLOAT"))
        build_fsdd(tmp_path / "out", folder, num_dev=2, options=OPTIONS)
        found = {
            split: set(read_back(shards_of(tmp_path / "out", split), tokenizer)) for split in ("train", "dev", "test")
        }
        assert found == {"train": {"3_ann_7"}, "dev": {"3_ann_5", "3_ann_6"}, "test": {"3_ann_4"}}
        with pytest.raises(ConfigError, match="at least 0"):
            build_fsdd(tmp_path / "other", folder, num_dev=-1, options=OPTIONS)

    def test_shuffled_words_are_a_control(self, tmp_path: Path, tokenizer) -> None:
        """The words of training are dealt out anew, the same ones as often; the test's stay. A second build over the first notices."""
        folder = tmp_path / "recordings"
        folder.mkdir()
        for digit in range(10):
            for number in range(3, 8):
                data = encode_audio(random_clip(10 * number + digit, 80), 8000, "WAV", "FLOAT")
                (folder / f"{digit}_ann_{number}.wav").write_bytes(data)
        found = {}
        for shuffled in (False, True):
            build_fsdd(tmp_path / "out", folder, shuffled=shuffled, options=OPTIONS)
            for split in ("train", "test"):
                found[split, shuffled] = read_back(shards_of(tmp_path / "out", split), tokenizer)
        for split in ("train", "test"):
            own, said = (
                {key: tokenizer.decode(sample.texts[0]) for key, sample in found[split, shuffled].items()}
                for shuffled in (False, True)
            )
            assert own == {key: WORDS[int(key[0])] for key in own}
            assert sorted(said.values()) == sorted(own.values())
            right = sum(said[key] == own[key] for key in own)
            assert right == 20 if split == "test" else right < 10  # of 30, of which chance finds three
        for key, sample in found["train", False].items():
            assert torch.equal(sample.audio.values, found["train", True][key].audio.values)

    def test_absent_and_damaged(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="Free Spoken Digit Dataset"):
            build_fsdd(tmp_path / "out", tmp_path / "absent.tar.gz", options=OPTIONS)
        (tmp_path / "x.tar.gz").write_bytes(b"nothing")
        with pytest.raises(DataError, match="no readable tar"):
            build_fsdd(tmp_path / "out", tmp_path / "x.tar.gz", options=OPTIONS)
