"""`mmctx data view`: pages say what is in the data, escape whatever it holds, load nothing, and work in a browser."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from make_shards import encode_audio, encode_image, make_document, make_triples, random_clip, random_pixels, write_shard
from plant import plain, plant
from typer.testing import CliRunner

from mmctx.cli import app
from mmctx.datasets.view.batch_media import BatchMedia
from mmctx.datasets.view.batch_page import batch_page
from mmctx.datasets.view.media import power_levels
from mmctx.datasets.view.render import readable
from mmctx.datasets.view.shard_page import shard_page
from mmctx.datasets.view.tokens import TokenReader, read_document
from mmctx.errors import ConfigError
from mmctx.pack import IGNORE_INDEX
from mmctx.train.replay import replay

NASTY = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\x00\x1b[2J\u202e"
)


class Page(HTMLParser):
    """Elements, text and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.text = ""
        self.rows: dict[str, dict[str, str | None]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags[tag] += 1
        self.addresses += [found[name] or "" for name in ("src", "href") if name in found]
        if tag == "details" and "id" in found:
            self.rows[found["id"] or ""] = found

    def handle_data(self, data: str) -> None:
        self.text += data


def nasty_shard(path: Path) -> Path:
    """A sample whose key, member, texts and json are hostile, another whose name is not UTF-8."""
    write_shard(
        path,
        [
            plain("sound"),
            plain("evil", txt=NASTY.encode(), json=json.dumps({"names": {"zh": "\ud800 " + NASTY}}).encode()),
        ],
    )
    with tarfile.open(path, "a", encoding="utf-8", errors="surrogateescape") as tar:
        for name in ("<script>alert(1)<\\script>.txt", "caf\udce9.txt"):
            member = tarfile.TarInfo(name)
            member.size = 5
            tar.addfile(member, io.BytesIO(b"hello"))
    return path


@pytest.fixture(scope="module")
def step(corpus: Path, tmp_path_factory: pytest.TempPathFactory):
    """The batches of one step of the tiny run, with a text that is hostile."""
    from tiny import tiny_tree

    config = tmp_path_factory.mktemp("view") / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_tree(corpus, config.parent / "runs")))
    batch = replay(config, 1)
    return batch.data, batch.bins, batch.batches


def test_a_shard_page_shows_every_sample(tmp_path: Path) -> None:
    triples = make_triples(5)
    path = write_shard(tmp_path / "a.tar", [*triples, make_document()])
    page = Page(shard_page(path, ["txt", "json:names.zh"]))
    assert page.tags["article"] == 6
    assert page.tags["img"] == 5 * 2 + 2 + 1  # a picture and a spectrogram each; the document's two and one
    assert page.tags["audio"] == 6
    for sample in triples:
        assert sample["__key__"] in page.text
        assert sample["txt"].decode() in page.text
        assert json.loads(sample["json"])["names"]["zh"] in page.text
    assert page.text.index("first a picture") < page.text.index("then a sound") < page.text.index("the end")
    part = Page(shard_page(path, ["txt"], start=2, limit=2))
    assert part.tags["article"] == 2
    assert "caption number 3" in part.text
    assert "caption number 4" not in part.text


def test_a_shard_page_names_problems_and_damage(tmp_path: Path) -> None:
    plant(tmp_path)
    page = Page(shard_page(tmp_path / "a.tar", ["txt"], limit=99))
    for defect in ("undecodable_image", "bad_json", "bad_text", "oversized_image", "silent_audio", "exif_orientation"):
        assert defect in page.text
    damaged = Page(shard_page(tmp_path / "truncated.tar", ["txt"]))
    assert "cut short" in damaged.text
    assert damaged.tags["article"] == 4


def test_pages_escape_and_load_nothing(tmp_path: Path, step) -> None:
    shard = Page(shard_page(nasty_shard(tmp_path / "a.tar"), ["txt", "json:names.zh"]))
    assert shard.tags["script"] == 0
    assert "document.title='owned'" in shard.text
    assert "<script>alert(1)<\\script>" in shard.text
    assert "caf\\udce9" in shard.text
    assert "\x00" not in shard.text
    batch = Page(batch_page(NASTY, 1, *step))
    assert batch.tags["script"] == 2  # the data and ours
    assert "x" not in batch.addresses
    for page in (shard, batch):
        assert page.addresses
        assert all(address.startswith(("data:", "#")) for address in page.addresses)


def test_readable_keeps_letters_and_shows_the_rest() -> None:
    assert readable("a\n中\x00\x7f\udcff\ud800") == "a\n中␀␡\\udcff\\ud800"


def test_rows_and_totals_are_those_of_the_batch(step) -> None:
    data, bins, batches = step
    text = batch_page("tiny", 1, data, bins, batches)
    page = Page(text)
    documents = [(b, d) for b, batch in enumerate(batches) for d in range(len(batch.objectives))]
    assert list(page.rows) == [f"b{b}d{d}" for b, d in documents]
    for b, d in documents:
        assert page.rows[f"b{b}d{d}"]["data-objective"] == batches[b].objectives[d]
    for number in (sum(batch.num_tokens for batch in batches), len(documents)):
        assert f"{number:,}" in page.text
    limited = Page(batch_page("tiny", 1, data, bins, batches, limit=2))
    assert len(limited.rows) == 4
    # every different picture and clip of the batches is stored once, and nothing else
    stored = json.loads(re.findall(r'<script type="application/json" id="media">(.*?)</script>', text, re.S)[0])
    items = sum(len(media.lengths) for batch in batches for media in batch.media.values())
    assert len(stored) == items
    assert all(part.get("audio", "data:").startswith("data:") for part in stored.values())


def test_pieces_are_the_tokens(step) -> None:
    data, bins, batches = step
    reader = TokenReader(data.tokenizer)
    seen = Counter()
    for number, (bin, batch) in enumerate(zip(bins, batches, strict=True)):
        media = BatchMedia(data)
        media.enter(number, bin, batch)
        ends = np.cumsum(batch.layout.lengths).tolist()
        for place, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
            ids, labels = batch.input_ids[first:end].numpy(), batch.labels[first:end].numpy()
            slots = media.slots(first, end)
            located = {s.first - first: (s.count, s.kind, "name") for s in slots}
            placeholders = list(data.tokenizer.placeholder_ids.values())
            assert sum(s.count for s in slots) == int(np.isin(ids, placeholders).sum())
            half = data.dataset.objectives[batch.objectives[place]]
            pieces = read_document(ids, labels, half, located, set(), reader)
            words = ids[~np.isin(ids, placeholders)]
            whole = data.tokenizer.hf.decode(words.tolist(), clean_up_tokenization_spaces=False)
            assert "".join(piece.text for piece in pieces if piece.state != "media") == whole
            states = Counter(piece.state for piece in pieces)
            num_labels = int((labels != IGNORE_INDEX).sum())
            expected = {"captioning": "target", "masked_lm": "hidden"}.get(batch.objectives[place])
            assert states["target"] + states["hidden"] == (states[expected] if expected else 0) == num_labels
            if expected == "hidden":
                answers = [p.answer for p in pieces if p.state == "hidden"]
                assert answers == [data.tokenizer.decode([label]) for label in labels[labels != IGNORE_INDEX]]
            seen[batch.objectives[place]] += 1
    assert seen.keys() == {"captioning", "masked_lm", "similarity"}


def test_characters_of_several_tokens_stay_whole(other_tokenizer) -> None:
    """A tokenizer of bytes: every Chinese character is three tokens, an emoji four."""
    text = "ab 中文 🦊!"
    ids = other_tokenizer.encode(text)
    runs = list(TokenReader(other_tokenizer).runs(ids))
    assert [piece for _, _, piece in runs] == list(text)
    assert [end - first for first, end, _ in runs] == [len(letter.encode()) for letter in text]


def test_a_pure_tone_is_one_line_of_the_spectrogram() -> None:
    rate, pitch = 8000, 1000.0
    levels = power_levels(np.sin(2 * np.pi * pitch * np.arange(rate) / rate), rate)
    peaks = levels.argmax(axis=1) * rate / (2 * (levels.shape[1] - 1))
    assert np.abs(peaks - pitch).max() < rate / 256
    assert levels.min() >= -80
    assert levels.max() == 0


def test_the_command_writes_both_pages(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    shard = write_shard(tmp_path / "a.tar", [plain("k")])
    run = ["data", "view", str(tmp_path / "run.yaml"), "data.bins_per_step=1", "--step", "2"]
    for command in (run, ["data", "view", str(shard)]):
        done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "page.html"), "--json"])
        assert done.exit_code == 0, done.output
        page = tmp_path / "page.html"
        assert json.loads(done.stdout) == {"page": str(page), "bytes": page.stat().st_size}
        page.unlink()
    done = CliRunner().invoke(app, ["data", "view", str(shard), "train.steps=1"])
    assert isinstance(done.exception, ConfigError)


CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)

# Waits until everything is there, then writes what it saw into the document, where --dump-dom finds it.
INSPECT = """<script>
const errors = [];
addEventListener('error', event => errors.push(event.message || 'element'), true);
addEventListener('load', async () => {
  const pictures = [...document.images], clips = [...document.querySelectorAll('audio')];
  pictures.forEach(picture => { picture.loading = 'eager'; });
  const deadline = Date.now() + 20000;
  const ready = () => pictures.every(p => p.complete && p.naturalWidth) && clips.every(c => c.readyState >= 1);
  while (!ready() && Date.now() < deadline) await new Promise(done => setTimeout(done, 50));
  document.body.dataset.seen = JSON.stringify({
    errors, title: document.title, pictures: pictures.filter(p => p.naturalWidth > 0).length, allPictures: pictures.length,
    clips: clips.filter(c => c.duration > 0).length, allClips: clips.length,
    open: document.querySelectorAll('details.doc-row[open]').length, wide: document.documentElement.scrollWidth - innerWidth,
  });
});
</script></head>"""


def inspect(path: Path, page: str, fragment: str = "") -> dict[str, Any]:
    """What headless Chromium sees on a page."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    path.write_text(page.replace("</head>", INSPECT, 1))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=30000", "--dump-dom"]
    command += [f"--user-data-dir={path.parent / 'profile'}", f"file://{path}{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))


@pytest.mark.slow
def test_a_browser_shows_a_shard(tmp_path: Path) -> None:
    samples = [plain(f"k{n}", n) for n in range(4)]
    samples[1] |= {"png": encode_image(random_pixels(9, 700, 900), "PNG")}  # large: scaled down
    for number, (extension, format) in enumerate((("wav", "WAV"), ("ogg", "OGG"), ("mp3", "MP3"))):
        clip = encode_audio(random_clip(number, 16000), 16000, format)
        samples.append(plain(f"m{number}", flac=None, **{extension: clip}))
    path = write_shard(tmp_path / "a.tar", [*samples, make_document()])
    seen = inspect(tmp_path / "page.html", shard_page(path, ["txt"]))
    assert seen["pictures"] == seen["allPictures"] == 7 * 2 + 3
    assert seen["clips"] == seen["allClips"] == 8
    assert (seen["errors"], seen["wide"] <= 0) == ([], True)
    plant(tmp_path)
    for name in ("a.tar", "b.tar"):
        seen = inspect(tmp_path / "page.html", shard_page(tmp_path / name, ["txt"], limit=99))
        assert (seen["pictures"], seen["clips"], seen["errors"]) == (seen["allPictures"], seen["allClips"], [])
    seen = inspect(tmp_path / "page.html", shard_page(nasty_shard(tmp_path / "c.tar"), ["txt", "json:names.zh"]))
    assert (seen["errors"], seen["title"]) == ([], "c.tar · mmctx data view")


@pytest.mark.slow
def test_a_browser_shows_a_batch(step, tmp_path: Path) -> None:
    page = batch_page(NASTY, 1, *step)
    num_documents = sum(len(batch.objectives) for batch in step[2])
    seen = inspect(tmp_path / "page.html", page, "#all")
    assert seen["open"] == num_documents
    assert seen["pictures"] == seen["allPictures"] > 0
    assert seen["clips"] == seen["allClips"] > 0
    assert (seen["errors"], seen["wide"] <= 0) == ([], True)
    assert "owned" in seen["title"]  # the text itself is shown, and nothing of it ran
    assert seen["title"].endswith("mmctx data view")
    assert inspect(tmp_path / "page.html", page)["open"] == 3
    assert inspect(tmp_path / "page.html", page, "#b1d5")["open"] == 4
