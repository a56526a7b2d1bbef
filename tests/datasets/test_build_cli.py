"""`mmctx data build KIND` and `mmctx data convert`: options reach the builders, answers are JSON, errors are ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from make_shards import encode_audio, encode_image, random_clip, random_pixels
from reading import shards_of
from typer.testing import CliRunner

from mmctx.cli import app
from mmctx.errors import MmctxError


def run(*arguments: str | Path) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["data", *map(str, arguments), "--json"])
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout)


@pytest.fixture
def material(tmp_path: Path) -> Path:
    """One folder that holds something for every kind."""
    folder = tmp_path / "in"
    for name in ("pets", "prompts", "digits"):
        (folder / name).mkdir(parents=True)
    png, wav = encode_image(random_pixels(1, 4, 4), "PNG"), encode_audio(random_clip(1, 90), 8000, "WAV")
    for number in range(3):
        (folder / "pets" / f"{number}.png").write_bytes(png)
        (folder / "pets" / f"{number}.txt").write_text(f"pet {number}")
        (folder / "digits" / f"{number}_ann_{number + 4}.wav").write_bytes(wav)
    (folder / "table.jsonl").write_text('{"pic": "pets/0.png", "words": "x"}\n{"pic": "pets/1.png", "words": "y"}\n')
    (folder / "prompts" / "hello.wav").write_bytes(wav)
    (folder / "prompts.txt").write_text("hello: Hello.\n")
    (folder / "novel.md").write_text("# One\na\n# Two\nb\n")
    (folder / "docs.jsonl").write_text('{"texts": ["a", null], "images": [null, "0.png"]}\n')
    return folder


@pytest.mark.parametrize(
    ("command", "arguments", "counts"),
    [
        ("build folder", ["pets", "--per-shard", "2"], {"train": 3}),
        ("build table", ["table.jsonl", "--image-column", "pic", "--text-column", "words"], {"train": 2}),
        ("build text", ["novel.md", "--cut", "heading"], {"train": 2}),
        ("build fsdd", ["digits"], {"train": 2, "test": 1}),
        ("build asterisk", ["--from", "prompts", "--transcripts", "prompts.txt", "--heldout", "0"], {"train": 1}),
        ("convert obelics", ["docs.jsonl", "--images", "pets"], {"train": 1}),
    ],
)
def test_kinds(material: Path, tmp_path: Path, monkeypatch, command, arguments, counts) -> None:
    monkeypatch.chdir(material)
    answer = run(*command.split(), tmp_path / "out", *arguments)
    assert answer["counts"] == counts
    assert answer["left_out"] == {}
    assert len(answer["written"]) == len([shard for split in counts for shard in shards_of(tmp_path / "out", split)])
    assert run(*command.split(), tmp_path / "out", *arguments)["written"] == []


def test_the_answer_for_people_counts_what_was_written(material: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["data", "build", "folder", str(tmp_path / "out"), str(material / "pets")])
    assert done.exit_code == 0
    assert "written" in done.stdout
    assert "folder-000000.tar" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "moji", "OUT"], "emoji, emoji-names, folder, table.*'moji'"),
        (["build", "stamps", "OUT", "--from", "nowhere"], "apt-get install tuxpaint-stamps-default"),
        (["build", "gimp", "OUT", "--from", "nowhere"], "apt-get install gimp-help-en"),
        (["build", "folder", "OUT", "nowhere"], "nowhere: no such folder"),
        (["build", "table", "OUT", "nowhere.csv"], "nowhere.csv"),
        (["build", "hf", "OUT", "nowhere"], "nowhere: no such folder"),
        (["build", "text", "OUT", "nowhere", "--heldout", "2"], "heldout should be"),
        (["convert", "laion", "OUT", "nowhere"], "obelics, mmc4, energon"),
    ],
)
def test_errors(tmp_path: Path, monkeypatch, arguments: list[str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MmctxError, match=words):
        run(*arguments)
