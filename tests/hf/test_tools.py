"""Programs around Transformers: pipelines, lm_eval, `mmctx generate`."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import WORDS, flac, png, words
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline
from typer.testing import CliRunner

from mmctx.cli import app
from mmctx.errors import MmctxError
from mmctx.eval.answers import continuation_log_probs
from mmctx.generate import read_prompts
from mmctx.pack import Document, pack_documents
from mmctx.train.checkpoints.load import load_model

ROOT = Path(__file__).parents[2]


def test_text_generation_pipeline(checkpoint: Path) -> None:
    write = pipeline("text-generation", model=str(checkpoint))
    model, processor = AutoModelForCausalLM.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    texts = ["red cat", "a tall green tree"]
    found = write(texts, max_new_tokens=5, do_sample=False, batch_size=2, return_full_text=False)
    for text, (one,) in zip(texts, found, strict=True):
        inputs = processor(text=text)
        ids = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
        assert one["generated_text"] == processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_image_text_to_text_pipeline(checkpoint: Path) -> None:
    write = pipeline("image-text-to-text", model=str(checkpoint))
    model, processor = AutoModelForCausalLM.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    picture = Image.open(io.BytesIO(png(1)))
    inputs = processor(text="<|image|>red", images=picture)
    ids = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    want = processor.tokenizer.decode(ids, skip_special_tokens=True)
    (plain,) = write(images=picture, text="<|image|>red", max_new_tokens=5, return_full_text=False)
    assert plain["generated_text"] == want
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "red"}]}]
    (answer,) = write(text=chat, max_new_tokens=5, return_full_text=False)
    assert answer["generated_text"] == want


TASK = """
task: tiny_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: " "
metric_list:
  - metric: acc
"""


@pytest.mark.slow
@torch.no_grad()
def test_lm_eval_finds_our_log_likelihoods(either: Path, tmp_path: Path) -> None:
    """By its own command line, in a process that does not know of mmctx: the folder brings the class."""
    questions = [
        {"question": words(n, 3 + n % 4), "choices": [WORDS[n], f"{WORDS[n + 1]} {WORDS[n + 2]}"], "answer": n % 2}
        for n in range(5)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    command = [
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={either},trust_remote_code=True",
        "--device",
        "cpu",
    ]
    command += [
        "--tasks",
        "tiny_words",
        "--include_path",
        str(tmp_path),
        "--batch_size",
        "3",
        "--log_samples",
        "--output_path",
        str(tmp_path / "out"),
    ]
    home = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, *command], env=os.environ | home, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_tiny_words*.jsonl")
    model, tokenizer, _ = load_model(either)
    for line in map(json.loads, samples.read_text().splitlines()):
        doc = line["doc"]
        prompt = tokenizer.encode(doc["question"])
        ends = [tokenizer.encode(f"{doc['question']} {choice}")[len(prompt) :] for choice in doc["choices"]]
        document = Document("", prompt, np.full_like(prompt, -100), causal=True)
        last, cache = read_prompts(model, pack_documents([document], tokenizer.placeholder_ids), 1)
        ours = continuation_log_probs(model, last[0], cache, 0, [prompt[:0]] * 2, ends)
        theirs = [float(response[0][0]) for response in line["resps"]]
        assert np.allclose(ours, theirs, atol=1e-4), (ours, theirs)
        assert not math.isclose(*theirs)


def run(*arguments: str | Path) -> str:
    found = CliRunner().invoke(app, ["generate", *map(str, arguments)], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    (folder / "a.png").write_bytes(png(1))
    (folder / "b.png").write_bytes(png(2))
    (folder / "c.flac").write_bytes(flac(3))
    return folder


def test_generate_reads_media_and_texts_in_the_order_given(checkpoint: Path, files: Path) -> None:
    model, processor = AutoModelForCausalLM.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    a, b, c = files / "a.png", files / "b.png", files / "c.flac"
    found = {}
    for name, (arguments, text) in {
        "mixed": (
            ["--image", b, "red", f"--audio={c}", "--max-new-tokens", "6", "and", "--image", a],
            "<|image|>red<|audio|>and<|image|>",
        ),
        "other": (
            ["red", "--image", b, "and", "--audio", c, "--image", a, "--max-new-tokens", "6"],
            "red<|image|>and<|audio|><|image|>",
        ),
    }.items():
        inputs = processor(text=text, images=[b, a], audio=[c])
        ids = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :].tolist()
        answer = json.loads(run(checkpoint, *arguments, "--json"))
        assert answer["tokens"] == ids
        assert answer["prompt_tokens"] == inputs["input_ids"].shape[1]
        assert answer["text"] == processor.tokenizer.decode(ids, skip_special_tokens=True)
        found[name] = ids
    assert found["mixed"] != found["other"]


def test_generate_searches_draws_and_streams(checkpoint: Path, files: Path) -> None:
    model, processor = AutoModelForCausalLM.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    inputs = processor(text="red")
    beams = model.generate(**inputs, max_new_tokens=6, num_beams=4)[0, inputs["input_ids"].shape[1] :].tolist()
    assert json.loads(run(checkpoint, "red", "--beams", "4", "--max-new-tokens", "6", "--json"))["tokens"] == beams
    drawn = {
        seed: run(checkpoint.parent, "red", "--temperature", "1.5", "--top-p", "0.9", "--seed", str(seed))
        for seed in (0, 1)
    }
    assert drawn[0] != drawn[1]
    assert run(checkpoint.parent, "red", "--temperature", "1.5", "--top-p", "0.9", "--seed", "0") == drawn[0]
    assert run(checkpoint, "red", "--stream", "--max-new-tokens", "6") == run(
        checkpoint, "red", "--max-new-tokens", "6"
    )


def test_generate_opens_what_save_pretrained_wrote(checkpoint: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path)
    assert run(tmp_path, "red cat") == run(checkpoint, "red cat")
    assert AutoTokenizer.from_pretrained(tmp_path)("red cat")["input_ids"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["red", "--image", "no.png"], "no.png: cannot be read"),
        ([], "the prompt is empty"),
        (["red", "--stream", "--json"], "--stream"),
    ],
)
def test_generate_says_what_is_wrong(checkpoint: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(MmctxError, match=words):
        run(checkpoint, *arguments)


def test_generate_refuses_other_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(MmctxError, match="model_type is 'llama'"):
        run(tmp_path, "red")
    with pytest.raises(MmctxError, match="neither a whole checkpoint"):
        run(tmp_path / "nowhere", "red")


def test_training_and_help_pay_nothing_for_it() -> None:
    code = "import sys, mmctx.cli, mmctx.train.loop; assert 'mmctx.hf' not in sys.modules and 'transformers.generation' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def test_readme_says_what_works(checkpoint: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "README.md").read_text().split("### Use a checkpoint with Transformers")[1]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]  # type: ignore[index]
    for name, source in {"cat.png": "a.png", "dog.png": "b.png", "word.flac": "c.flac"}.items():
        (tmp_path / name).write_bytes((files / source).read_bytes())
    monkeypatch.chdir(tmp_path)
    code = code.replace("runs/demo/latest", str(checkpoint))
    assert str(checkpoint) in code
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["written"].shape[0] == 2
    assert found["pictures"].norm(dim=1).tolist() == pytest.approx([1, 1])
    for line in re.findall(r"mmctx generate (.*)", section)[:3]:
        words = shlex.split(line.split("#")[0].replace("runs/demo", str(checkpoint)))
        assert run(*words, "--max-new-tokens", "4")
