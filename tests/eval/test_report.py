"""The report: complete, self-contained, escaped, and right about the run folder it describes."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.eval.report.batch_drawing import count_batch, draw_batch
from mmctx.eval.report.charts import draw_lines, nice_ticks, short_number
from mmctx.eval.report.examples import mark_differences
from mmctx.eval.report.page import write_report
from mmctx.eval.report.pieces import Lines, Series
from mmctx.eval.report.run import read_run
from mmctx.eval.report.training import summarise_losses
from mmctx.pack import IGNORE_INDEX, Document, MediaItem, PackedBatch, pack_documents
from mmctx.train.config import RunConfig

ATTACK = "<script>alert('x')</script>"
PLACEHOLDERS = {"image": 1000, "audio": 1001}
SUITE_SECTIONS = {"retrieval", "caption", "masked_lm", "loss"}


def document(objective: str, kinds: str, causal: bool = True, key: str = "key") -> Document:
    """A document from letters: t a text token, i and a runs of picture and sound slots."""
    media = []
    for run in re.finditer(r"i+|a+", kinds):
        kind, n = {"i": "image", "a": "audio"}[run[0][0]], len(run[0])
        values = torch.zeros(3, 4, 4, dtype=torch.uint8) if kind == "image" else torch.zeros(n, 2)
        media.append((run.start(), MediaItem(kind, values, n)))
    token = {"t": 5, "i": PLACEHOLDERS["image"], "a": PLACEHOLDERS["audio"]}
    input_ids = np.array([token[letter] for letter in kinds])
    labels = np.where(input_ids == 5, input_ids, IGNORE_INDEX)
    return Document(objective, input_ids, labels, causal=causal, media=tuple(media), key=key)


@pytest.fixture
def batch() -> PackedBatch:
    """Three documents of 1,210 tokens in all, the second of them longer than a row of the drawing."""
    documents = [
        document("captioning", "iiii" + "t" * 6, key="first"),
        document("captioning", "tt" + "a" * 700 + "t" * 480, key=ATTACK),
        document("similarity", "a" * 17 + "t", causal=False, key="third"),
    ]
    return pack_documents(documents, PLACEHOLDERS)


@pytest.fixture(scope="module")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    from tiny import tiny_tree

    tree = tiny_tree(corpus, tmp_path_factory.mktemp("runs"))
    tree["run"]["name"] = f"run {ATTACK}"
    return build_config(RunConfig, tree, where="test")


@pytest.fixture(scope="module")
def data(config: RunConfig) -> RunData:
    return build_data(config.data, config.eval.sources, config.model, config.objectives, config.train.seed)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What training leaves behind: `captioning` in every line, `rare` in two of them, the last line cut short."""
    lines = []
    for number, loss in enumerate([8.0, 5.0, 3.0, 2.0, 1.0], start=1):
        rare = 4.0 if number in (2, 3) else None
        numbers = {"lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 1e4 * number, "data_wait": 0.02}
        lines.append({"step": 10 * number, "loss": loss, "loss/captioning": loss, "loss/rare": rare, **numbers})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 60, "lo')
    manifest = {"parameters": 1_234_567, "samples": 48, "device": "cpu", "processes": 1, "python": "3.11.2"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"versions": {"torch": "2.99.7"}}))
    return tmp_path


@pytest.fixture
def results() -> dict[str, Any]:
    """Results of every suite, with texts and keys that try to break out of the page."""
    scores = {"R@1": 0.25, "R@5": 0.5, "R@10": 0.75, "MRR": 0.4, "n": 16}
    wrong = {"reference": f"cat {ATTACK}", "prediction": f"dog {ATTACK}"}
    examples = [
        {"kind": "image", "key": ATTACK, **wrong, "location": ["heldout", 0]},
        {"kind": "audio", "key": "b", "reference": "moon", "prediction": "Moon", "location": ["heldout", 1]},
    ]
    rates = {f"{kind}_{name}": 0.123456789 for kind in ("image", "audio") for name in ("cer", "wer", "exact")}
    return {
        "loss": {"captioning": {"held_out": 2.5, "n": 70}},
        "retrieval": {"image_to_text": scores, "text_to_image": scores},
        "caption": {**rates, "image_n": 16, "audio_n": 16, "examples": examples},
        "masked_lm": {"accuracy": 0.5, "n": 40},
        "step": 50,
        "tokens": 60_000,
        "train_seconds": 75.0,
    }


class Page(HTMLParser):
    """What the tests ask of a page: its elements, its sections' ids and the addresses it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sections: set[str | None] = set()
        self.addresses: list[str] = []
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]
        if tag == "section":
            self.sections.add(dict(attrs).get("id"))


def chart(x, y, reference: float | None = None, smooth: bool = False) -> Lines:
    """A chart of one series."""
    return Lines(name="loss", label="loss", series=(Series(label="", x=x, y=y, smooth=smooth),), reference=reference)


def rectangles(svg: str, name: str) -> list[float]:
    """Widths of the rectangles of a class."""
    return [float(width) for width in re.findall(rf'<rect class="{name}[ \w]*" [^>]*?width="([\d.]+)"', svg)]


class TestSummariseLosses:
    def test_first_line_and_mean_of_the_last_three(self, run_dir: Path) -> None:
        summary = summarise_losses(read_run(run_dir, results={"loss": {"captioning": {"held_out": 2.5, "n": 70}}}))
        assert summary["captioning"] == {"first": 8.0, "last": 2.0, "held_out": 2.5, "n": 70}

    def test_lines_without_the_objective_do_not_count(self, run_dir: Path) -> None:
        assert summarise_losses(read_run(run_dir))["rare"] == {"first": 4.0, "last": 4.0}

    def test_held_out_alone(self, tmp_path: Path) -> None:
        found = {"new": {"held_out": 1.0, "n": 2}}
        assert summarise_losses(read_run(tmp_path, results={"loss": found})) == found


class TestWriteReport:
    def test_nothing_is_loaded_from_elsewhere(self, run_dir: Path, results, config, data, batch) -> None:
        page = Page(write_report(run_dir, results, config, data, batch))
        assert [a[:15] for a in page.addresses if not a.startswith("#")] == [
            "data:image/png;",
            "data:image/png;",
            "data:audio/flac",
        ]
        assert "script" not in page.tags
        assert "link" not in page.tags
        assert not re.search(r"url\(|@import", page.text)

    def test_texts_and_keys_are_escaped(self, run_dir: Path, results, config, data, batch) -> None:
        skip = {
            "step": 0,
            "source": "s",
            "shard": f"a/{ATTACK}.tar",
            "key": ATTACK,
            "reason": "empty",
            "detail": ATTACK,
        }
        (run_dir / "skips.jsonl").write_text(json.dumps(skip))
        page = Page(write_report(run_dir, results | {ATTACK: {ATTACK: ATTACK}}, config, data, batch))
        assert "script" not in page.tags
        assert page.text.count("&lt;script&gt;") > 8

    def test_every_section(self, run_dir: Path, results, config, data, batch) -> None:
        (run_dir / "skips.jsonl").write_text("")
        page = Page(write_report(run_dir, results | {"mine": {"score": 0.5}}, config, data, batch))
        assert page.sections == SUITE_SECTIONS | {"mine", "curves", "pictures", "sounds", "batch", "skips", "config"}
        for expected in (
            "1.23M",
            "1 min 15 s",
            "torch 2.99.7",
            "chance 6.25%",
            "No sample was skipped",
            "held out 2.5",
        ):
            assert expected in page.text

    def test_unusable_held_out_samples_are_shown_if_there_are_any(self, run_dir: Path, config, data) -> None:
        page = Page(write_report(run_dir, {"skipped": {"undecodable_image": 7}}, config, data))
        assert "skipped" in page.sections
        assert re.search(r'<th>undecodable_image</th>\s*<td class="number">7</td>', page.text)
        assert "skipped" not in Page(write_report(run_dir, {"skipped": {}}, config, data)).sections

    def test_an_objective_that_was_only_held_out(self, tmp_path: Path, config, data) -> None:
        found = {"loss": {"new": {"held_out": 1.0, "n": 2}}}
        assert "loss" in Page(write_report(tmp_path, found, config, data)).sections

    @pytest.mark.parametrize("suite", sorted(SUITE_SECTIONS - {"loss"}))  # losses are the training's, too
    def test_suites_that_did_not_run_leave_no_section(self, run_dir: Path, results, config, data, suite: str) -> None:
        del results[suite]
        sections = Page(write_report(run_dir, results, config, data)).sections
        assert sections & SUITE_SECTIONS == SUITE_SECTIONS - {suite}
        assert ("pictures" in sections) == ("sounds" in sections) == (suite != "caption")
        assert not sections & {"batch", "skips"}

    def test_an_empty_run_folder(self, tmp_path: Path, config, data) -> None:
        assert Page(write_report(tmp_path, {}, config, data)).sections == {"config"}

    def test_skips_are_counted_by_reason_over_all_ranks(self, run_dir: Path, config, data) -> None:
        def lines(reason: str, count: int) -> str:
            line = {"step": 3, "source": "s", "shard": "a/b.tar", "reason": reason, "detail": "why"}
            return "".join(json.dumps(line | {"key": f"{reason}-{n}"}) + "\n" for n in range(count))

        (run_dir / "skips.jsonl").write_text(lines("over_long", 1) + lines("undecodable_image", 4))
        (run_dir / "skips-rank1.jsonl").write_text(lines("undecodable_image", 3))
        text = write_report(run_dir, {}, config, data).read_text()
        assert re.findall(r'<tr><th>(\w+)</th><td class="number">(\d)</td><td class="first">', text) == [
            ("undecodable_image", "7"),
            ("over_long", "1"),
        ]
        assert "undecodable_image-2" in text
        assert "undecodable_image-3" not in text

    def test_media_that_cannot_be_read_leave_their_texts(
        self, run_dir: Path, results, config, corpus, tmp_path
    ) -> None:
        moved = shutil.copytree(corpus, tmp_path / "moved")
        source = config.eval.sources["heldout"].model_copy(update={"shards": str(moved / "heldout-*.tar")})
        elsewhere = build_data(config.data, {"heldout": source}, config.model, config.objectives, 0)
        (moved / "heldout-000000.tar").unlink()
        text = write_report(run_dir, results, config, elsewhere).read_text()
        assert "cannot be opened" in text
        assert "moon" in text
        assert "<audio" not in text


class TestDrawBatch:
    def test_cells_and_bands_cover_every_token_once(self, batch: PackedBatch) -> None:
        svg = draw_batch(batch, bin_tokens=1300)
        assert sum(rectangles(svg, "cell")) == sum(rectangles(svg, "band")) == batch.num_tokens == 1210
        assert sum(rectangles(svg, "empty")) == 1300 - 1210
        for kind, tokens in (("text", 6 + 482 + 1), ("image", 4), ("audio", 717)):
            assert sum(rectangles(svg, f"cell {kind}")) == tokens
        assert sum(rectangles(svg, "target")) == 489

    def test_one_rectangle_a_run_and_row(self, batch: PackedBatch) -> None:
        # image, text | text, audio in 3 rows, text in 2 rows | audio, text
        assert len(rectangles(draw_batch(batch, bin_tokens=1300), "cell")) == 2 + 1 + 2 + 2 + 2

    def test_boundaries_stand_between_documents(self, batch: PackedBatch) -> None:
        svg = draw_batch(batch, bin_tokens=1300)
        assert svg.count('<line class="boundary"') == len(batch.objectives) - 1
        assert svg.count("<g><title>") == len(batch.objectives)

    def test_titles_name_sample_objective_and_length(self, batch: PackedBatch) -> None:
        svg = draw_batch(batch, bin_tokens=1300)
        assert "<title>first · captioning · causal\n10 tokens (6 text, 4 image), positions 0 to 9</title>" in svg
        assert "third · similarity · both directions\n18 tokens" in svg
        assert ATTACK not in svg

    @pytest.mark.parametrize("bin_tokens", [16, 1210, 1000, 1 << 20])
    def test_any_bin(self, batch: PackedBatch, bin_tokens: int) -> None:
        """A batch may exceed its bin, and a large bin takes longer rows instead of more of them."""
        svg = draw_batch(batch, bin_tokens)
        assert sum(rectangles(svg, "cell")) == 1210
        assert sum(rectangles(svg, "empty")) == max(bin_tokens - 1210, 0)
        assert svg.count('text-anchor="end"') <= 24

    def test_counts(self, batch: PackedBatch) -> None:
        counts = count_batch(batch, bin_tokens=2420)
        assert (counts["tokens"], counts["documents"], counts["causal"], counts["fill"]) == (1210, 3, 2, 0.5)
        assert {row["name"]: row["tokens"] for row in counts["modalities"]} == {"text": 489, "image": 4, "audio": 717}
        by_name = {row["name"]: (row["documents"], row["tokens"], row["targets"]) for row in counts["objectives"]}
        assert by_name == {"captioning": (2, 1192, 488), "similarity": (1, 18, 1)}


class TestPieces:
    def test_differences_are_marked_by_word(self) -> None:
        assert mark_differences("a red cat", "A blue cat") == ("a <del>red</del> cat", "A <ins>blue</ins> cat")
        assert mark_differences("红色的猫", "红色的狗") == ("红色的<del>猫</del>", "红色的<ins>狗</ins>")
        assert mark_differences("a", "") == ("<del>a</del>", "")

    @pytest.mark.parametrize(
        "values", [[1.0], [2.0, 2.0], [0.0, 0.0], [-1.0, 3.0], [1.0, float("nan"), 3.0], [1e-9, 1e9]]
    )
    def test_charts_stay_finite_and_inside(self, values: list[float]) -> None:
        svg = draw_lines(chart(range(len(values)), values, reference=2.0))
        points = re.findall(r'points="([^"]+)"', svg)[-1].split()
        assert len(points) == np.isfinite(values).sum()
        for point in points:
            x, y = map(float, point.split(","))
            assert 0 <= x <= 280
            assert 0 <= y <= 165

    def test_long_series_are_thinned(self) -> None:
        svg = draw_lines(chart(range(10_000), np.linspace(3, 1, 10_000).tolist(), smooth=True))
        assert len(re.findall(r'class="line" points="([^"]+)"', svg)[0].split()) == 400

    def test_charts_of_nothing(self) -> None:
        assert draw_lines(chart([1], [float("nan")])) == ""

    def test_ticks_are_round(self) -> None:
        assert nice_ticks(0, 1000, 4) == [0, 250, 500, 750, 1000]
        shown = [short_number(v) for v in (0, 0.0015, 0.25, 12_345, 3.4e6, -2)]
        assert shown == ["0", "1.5e-3", "0.25", "12.3k", "3.4M", "-2"]
