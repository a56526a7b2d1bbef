"""Configuration: strict, with errors that name the file, the key and the nearest valid one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from mmctx.config import build_config, dump_config, load_config
from mmctx.errors import ConfigError
from mmctx.train.config import RunConfig


@pytest.fixture
def file(tree: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_overrides_reach_nested_keys_and_lists(file: Path) -> None:
    config = load_config(
        RunConfig,
        file,
        ["train.steps=7", "data.sources.triples.texts.1=txt", "objectives.similarity.pairs=[[image, text0]]"],
    )
    assert config.train.steps == 7
    assert config.data.sources["triples"].texts == ("txt", "txt")
    assert config.objectives["similarity"].pairs == (("image", "text0"),)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.step=7", ["train.step", "'steps'", "run.yaml"]),
        ("data.sources.triples.weigth=1", ["data.sources.triples.weigth", "'weight'"]),
        ("objectives.captioning={kind: similarity, pair: []}", ["key 'objectives.captioning.pair'", "'pairs'"]),
        (
            "objectives.other={kind: captioning, pair: []}",
            ["key 'objectives.other.pair'", "here: kind, label_smoothing, prompt, prompt_text, text, weight"],
        ),
        ("objectives.similarity.pairs=[[1, image]]", ["key 'objectives.similarity.pairs.0.0'", "1"]),
        ("eval.sources.heldout={shards: a.tar}", ["key 'eval.sources.heldout.objectives' is required"]),
        ("objectives.similarity.pair=[]", ["key 'objectives.similarity.pair'", "'pairs'"]),
        ("model.transformer.width=30", ["width 30", "num_heads 4"]),
        ("train.steps=many", ["train.steps", "'many'"]),
        ("train.optimizer.lr=-1", ["train.optimizer.lr", "-1"]),
        ("data.bin_tokens=100", ["bin_tokens 100", "context_length 128"]),
        ("data.sources.books.objectives=[captoining]", ["captoining", "captioning"]),
        ("data.sources.books.weight=2", ["'books'", "'triples'"]),
        ("objectives={a.b: {kind: captioning}}", ["'a.b'", "letters"]),
        ("nonsense", ["nonsense", "key=value"]),
        ("data.sources.triples.texts.9=txt", ["texts", "2 items"]),
    ],
)
def test_errors_name_key_value_and_remedy(file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(RunConfig, file, [override])
    for word in words:
        assert word in str(error.value)


def test_missing_file_and_bad_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(RunConfig, tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(RunConfig, tmp_path / "bad.yaml")


def test_what_is_no_text_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("run: {name: caf\u00e9}".encode("latin-1"))
    (tmp_path / "folder.yaml").mkdir()
    for name in ("latin.yaml", "folder.yaml"):
        with pytest.raises(ConfigError, match=rf"{name}: cannot be read as a text file"):
            load_config(RunConfig, tmp_path / name)


def test_the_dumped_config_is_the_same_config(file: Path, tmp_path: Path) -> None:
    config = load_config(RunConfig, file)
    dump_config(config, tmp_path / "again.yaml")
    assert load_config(RunConfig, tmp_path / "again.yaml") == config


def test_a_built_config_cannot_be_changed(tree: dict[str, Any]) -> None:
    config = build_config(RunConfig, tree, "tree")
    with pytest.raises(ValidationError):
        config.train.steps = 3  # type: ignore[misc]
