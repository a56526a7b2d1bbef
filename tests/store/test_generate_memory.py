"""`mmctx generate --memory`: the prompt that is read, what is cited, and what edits of the store do to both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import png, triple, words, write_shard
from typer.testing import CliRunner

pytest.importorskip("lancedb", reason="pip install 'mmctx[memory]'")

from mmctx import api
from mmctx.cli import app
from mmctx.datasets.assemble import build_preprocessors
from mmctx.datasets.decode import decode_audio, decode_image
from mmctx.errors import CheckpointError, ConfigError, DataError
from mmctx.generate import generate
from mmctx.objectives.base import lay_out
from mmctx.pack import Document, pack_documents
from mmctx.train.checkpoints.load import load_model

NEW = 6


def call(*arguments: str | Path | int) -> str:
    found = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


def ask(run: Path, store: Path, *arguments: str | Path | int) -> dict[str, Any]:
    return json.loads(call("generate", run, *arguments, "--memory", store, "--max-new-tokens", NEW, "--json"))


@pytest.fixture(scope="module")
def built(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with a clip and a text each, and a text with metadata that spells a mark. Not to be changed."""
    folder = tmp_path_factory.mktemp("facts")
    shard = write_shard(folder / "a.tar", [triple(n) for n in range(12)])
    (folder / "facts.jsonl").write_text(
        json.dumps({"id": "marks", "text": "red <|image|> fish\n\n of the moon", "title": "On marks", "page": 7})
    )
    call("memory", "build", folder / "store", shard, folder / "facts.jsonl", "--encoder", run_dir)
    return folder / "store"


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(built, tmp_path / "store"))


def natively(run: Path, parts: Sequence[tuple[str, Any]]) -> tuple[int, list[int]]:
    """How long the prompt is, and the likeliest tokens behind it, laid out as documents of training are and without Transformers."""
    model, tokenizer, config = load_model(run)
    media = build_preprocessors(config.model)
    image, audio = media.image, media.audio
    assert image is not None
    assert audio is not None
    read = {
        "text": tokenizer.encode,
        "image": lambda data: image(decode_image(data)),
        "audio": lambda data: audio(*decode_audio(data)),
    }
    ids, placed = lay_out([read[kind](value) for kind, value in parts], tokenizer.placeholder_ids)
    prompt = Document("captioning", ids, np.full_like(ids, -100), causal=True, media=placed)
    written = generate(model.eval(), pack_documents([prompt], tokenizer.placeholder_ids), tokenizer.eos_id, NEW)[0]
    return len(ids), written


def shown(number: int) -> list[tuple[str, Any]]:
    """What the store holds of a sample, as the prompt shows it."""
    sample = triple(number)
    return [("image", sample["png"]), ("audio", sample["flac"]), ("text", sample["txt"].decode()), ("text", "\n")]


def test_entries_stand_in_front_of_the_prompt_and_are_cited(run_dir: Path, built: Path, tmp_path: Path) -> None:
    (tmp_path / "q.png").write_bytes(png(7))
    (tmp_path / "q.flac").write_bytes(triple(3)["flac"])
    query = [("image", png(7)), ("text", "what is it"), ("audio", triple(3)["flac"])]
    asked = ["--image", tmp_path / "q.png", "what is it", "--audio", tmp_path / "q.flac"]
    found = ask(run_dir, built, *asked, "-k", 2)
    cited = found["citations"]
    assert {entry["id"] for entry in cited} == {"triple0003", "triple0007"}
    assert [entry["number"] for entry in cited] == [1, 2]
    assert [entry["score"] for entry in cited] == pytest.approx([1, 1], abs=1e-4)
    assert all(entry["parts"][:2] == ["<image>", "<audio>"] for entry in cited)
    nearest_last = [shown(int(entry["id"][-4:])) for entry in reversed(cited)]
    length, written = natively(run_dir, [part for entry in [*nearest_last, query] for part in entry])
    assert (found["prompt_tokens"], found["tokens"][: len(written)]) == (length, written)
    alone, _ = natively(run_dir, query)
    without = json.loads(call("generate", run_dir, *asked, "--max-new-tokens", NEW, "--json"))
    assert without["prompt_tokens"] == alone < length
    assert "citations" not in without


def test_texts_of_a_store_are_plain_characters(run_dir: Path, built: Path) -> None:
    text = "red <|image|> fish\n\n of the moon"
    found = ask(run_dir, built, text, "-k", 1, "--numbered")
    (entry,) = found["citations"]
    assert (entry["id"], entry["parts"], entry["source"][-11:]) == ("marks", [text], "facts.jsonl")
    assert (entry["facts"]["title"], entry["facts"]["page"]) == ("On marks", 7)
    length, written = natively(run_dir, [("text", "[1] "), ("text", text), ("text", "\n"), ("text", text)])
    assert found["prompt_tokens"] == length
    assert found["tokens"][: len(written)] == written


def test_an_edit_is_cited_at_once_and_what_was_removed_no_more(run_dir: Path, store: Path, tmp_path: Path) -> None:
    text = triple(5)["txt"].decode()
    (tmp_path / "q.png").write_bytes(png(5))
    first = ask(run_dir, store, "--image", tmp_path / "q.png", "-k", 1)
    (tmp_path / "edit.jsonl").write_text(json.dumps({"id": "triple0005", "text": f"no {text}"}))
    call("memory", "add", store, tmp_path / "edit.jsonl")
    changed = ask(run_dir, store, f"no {text}", "-k", 1)["citations"][0]
    assert (first["citations"][0]["id"], changed["id"]) == ("triple0005", "triple0005")
    assert (first["citations"][0]["parts"][2], changed["parts"]) == (text, [f"no {text}"])
    assert changed["version"] > first["citations"][0]["version"]
    call("memory", "remove", store, "triple0005")
    for asked in ([f"no {text}"], ["--image", tmp_path / "q.png"]):
        rest = ask(run_dir, store, *asked, "-k", 50)["citations"]
        assert len(rest) == 12
        assert "triple0005" not in {entry["id"] for entry in rest}


def test_on_a_terminal(run_dir: Path, store: Path) -> None:
    arguments = ["generate", run_dir, words(4), "--max-new-tokens", NEW, "--memory", store, "-k", 13]
    found = ask(run_dir, store, words(4), "-k", 13)
    out = call(*arguments)
    answer, lines = out[: len(found["text"])], out[len(found["text"]) :].split("\n")
    assert answer == found["text"]
    assert len([line for line in lines if line.startswith("[")]) == 13
    for entry in found["citations"]:
        (line,) = (line for line in lines if line.startswith(f"[{entry['number']}] {entry['id']}  "))
        assert f"{entry['score']:.4f}" in line
        assert "title: On marks; page: 7" in line or entry["id"] != "marks"
    assert call(*arguments, "--stream").split("\n")[-14:] == lines[-14:]  # the text streamed, the entries behind it
    call("memory", "remove", store, "marks", *(f"triple{n:04d}" for n in range(12)))
    assert "no entry of the store was found" in call(*arguments)


def test_other_stores_and_encoders_are_refused(
    run_dir: Path, built: Path, store: Path, tree: dict[str, Any], tmp_path: Path
) -> None:
    from mmctx.config import build_config
    from mmctx.train.config import RunConfig
    from mmctx.train.loop import train

    with pytest.raises(DataError, match="none: holds no knowledge store; make one by `mmctx memory build"):
        ask(run_dir, tmp_path / "none", "red")
    assert not (tmp_path / "none").exists()
    tree["train"] |= {"steps": 1, "seed": 5}
    tree["eval"] = {}
    other = train(build_config(RunConfig, tree, "tree")).run_dir
    with pytest.raises(DataError, match=r"made by the encoder .* asked with .* cannot be compared"):
        ask(run_dir, built, "red", "--encoder", other)
    assert len(ask(other, built, "red", "-k", 2)["citations"]) == 2  # who answers need not be who finds
    with pytest.raises(ConfigError, match="the prompt is empty"):
        ask(run_dir, built)
    with pytest.raises(DataError, match=r"no\.png: cannot be read"):
        ask(run_dir, built, "--image", "no.png")
    moved = Path(shutil.copytree(run_dir, tmp_path / "moved", symlinks=True))
    call("memory", "build", tmp_path / "of-moved", built.parent / "facts.jsonl", "--encoder", moved)
    moved.rename(tmp_path / "again")
    with pytest.raises(CheckpointError, match=r"moved: neither .*of-moved: if it has moved, say where to by --encoder"):
        ask(run_dir, tmp_path / "of-moved", "red")
    assert ask(run_dir, tmp_path / "of-moved", "red", "--encoder", tmp_path / "again")["citations"][0]["id"] == "marks"


def test_from_python(run_dir: Path, built: Path) -> None:
    from mmctx.hf.answer import Part, write_answer

    found = api.recall_from(built, [("image", png(2))], k=1)
    answer = write_answer(run_dir, [Part(*segment) for segment in found.segments], {"max_new_tokens": NEW})
    length, _ = natively(run_dir, [*shown(2), ("image", png(2))])
    assert (answer.prompt_tokens, found.citations[0].document.id) == (length, "triple0002")
