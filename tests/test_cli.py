"""The command line as scripts use it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

MMCTX = [sys.executable, "-m", "mmctx.cli"]


def run(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*MMCTX, *map(str, arguments)], capture_output=True, text=True, timeout=500)
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.fixture
def config(tree: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("code", ["import mmctx", "import mmctx.cli", "from mmctx.cli import main; main(['--help'])"])
def test_starting_up_does_not_import_torch(code: str) -> None:
    check = f"""
import sys
sys.argv = ['mmctx']
try:
    {code}
except SystemExit:
    pass
heavy = {{'torch', 'transformers', 'accelerate', 'numpy', 'timm'}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_lazy_names_are_the_api() -> None:
    import mmctx
    from mmctx import api

    for name in mmctx.__all__:
        assert getattr(mmctx, name) is getattr(api, name)
    with pytest.raises(AttributeError, match="load_config"):
        mmctx.load_confg  # noqa: B018


@pytest.mark.slow
def test_train_then_eval(config: Path, tmp_path: Path) -> None:
    done = run("train", config, "train.steps=3", "run.name=cli", "--json")
    answer = json.loads(done.stdout)  # nothing but one JSON object on stdout
    run_dir = Path(answer["run_dir"])
    assert answer["step"] == 3
    assert run_dir == tmp_path / "runs" / "cli"
    (report,) = json.loads((run_dir / "eval.json").read_text())["evaluations"]
    for direction in ("image_to_text", "text_to_image", "audio_to_text", "text_to_audio"):
        assert {"R@1", "R@5", "R@10", "n"} <= report["retrieval"][direction].keys()
        assert report["retrieval"][direction]["n"] == 16
    assert {"audio_cer", "audio_wer", "image_cer"} <= report["caption"].keys()
    assert 0 <= report["masked_lm"]["accuracy"] <= 1
    for name in ("captioning", "masked_lm", "similarity"):
        assert {"held_out", "n"} == report["loss"][name].keys()
    assert report["train_seconds"] > 0
    assert "<html" in (run_dir / "report.html").read_text()

    again = run("train", config, "train.steps=3", "run.name=cli", "--json")
    assert "is at step 3 already" in again.stderr
    results = json.loads(run("eval", run_dir / "latest", "--suite", "retrieval", "--json").stdout)
    for direction, scores in report["retrieval"].items():
        for name in ("R@1", "R@5", "R@10", "MRR", "n"):
            assert results["retrieval"][direction][name] == pytest.approx(scores[name], rel=1e-5)
    assert results["caption"] == report["caption"]  # of the same step: kept


@pytest.mark.slow
def test_plan_index_and_doctor(config: Path, corpus: Path) -> None:
    whole = json.loads(run("plan", config, "--json").stdout)
    (answer,) = whole["stages"]
    assert {name: source["samples"] for name, source in answer["sources"].items()} == {"triples": 48, "books": 12}
    assert 0.5 < answer["fill"] <= 1
    assert answer["flops"] > 0
    assert answer["memory"]["total"] == sum(
        size for part, size in answer["memory"].items() if part not in ("total", "peak_at", "host_copies")
    )
    assert (whole["steps"], whole["flops"], whole["peak_memory"]) == (6, answer["flops"], answer["memory"]["total"])
    answer = json.loads(
        run("data", "index", corpus / "triples-*.tar", "--tokenizer", corpus / "tokenizer", "--json").stdout
    )
    assert answer["samples"] == 48
    answer = json.loads(run("doctor", "--json", "--no-record", "--no-timing").stdout)
    sdpa = [b for b in answer["backends"] if b["backend"] == "sdpa"]
    assert sdpa
    assert all(b["passed"] for b in sdpa)
    assert answer["choice"] == "sdpa" or any(
        b["backend"] == answer["choice"] and b["passed"] for b in answer["backends"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "absent.yaml"], ["absent.yaml", "no such"]),
        (["train", "CONFIG", "train.stepz=1"], ["train.stepz", "'steps'"]),
        (["train", "CONFIG", "data.tokenizer=nowhere"], ["data.tokenizer", "nowhere"]),
        (["train", "CONFIG", "data.sources.books.shards=nowhere/*.tar"], ["nowhere/*.tar"]),
        (["eval", "runs/none"], ["runs/none", "COMPLETE"]),
        (["data", "build", "moji", "OUT"], ["moji", "emoji"]),
    ],
)
def test_errors_are_one_message_and_exit_code_two(config: Path, arguments: list[str], words: list[str]) -> None:
    done = run(*[str(config) if a == "CONFIG" else a for a in arguments], "--json", code=2)
    assert "Traceback" not in done.stderr
    message = json.loads(done.stdout)["error"]
    for word in words:
        assert word in message
        assert word in done.stderr
