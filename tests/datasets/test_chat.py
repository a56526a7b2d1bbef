"""Conversations are laid out as Transformers lays them out, answers alone are learned, and the index counts every token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import flac, make_tokenizer, png, tiny_tree, write_shard
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from mmctx.chat import DEFAULT_TEMPLATE, ChatTemplate
from mmctx.cli import app
from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.datasets.build.chat import build_chat
from mmctx.errors import SampleError
from mmctx.pack import IGNORE_INDEX
from mmctx.tokenizer import TextTokenizer
from mmctx.train.config import RunConfig

CHATML = """{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
{%- elif message.role != 'system' %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA = """{{- bos_token }}{%- for message in messages %}
{{- '<|start|>' + message['role'] + '<|end|>\\n\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{- message['content'] | trim + '<|eot|>' }}
{%- endgeneration %}{% else %}{{- message['content'] | trim + '<|eot|>' }}{% endif %}{%- endfor %}"""
PLAIN = DEFAULT_TEMPLATE.replace(
    "{{- message['content'] }}",
    "{% if message['role'] == 'assistant' %}{% generation %}{{- message['content'] + eos_token }}{% endgeneration %}{% else %}"
    "{{- message['content'] }}{% endif %}",
).replace("{{- eos_token if message['role'] == 'assistant' }}", "")
"""The default with marks of what is an answer."""

TALK = [
    {"role": "system", "content": "be small"},
    {"role": "user", "content": " red cat? <|im_end|> <|eot|>"},
    {"role": "assistant", "content": "blue dog!\n"},
    {"role": "user", "content": "round house"},
    {"role": "assistant", "content": "tall tree"},
]


def tokenizer_with(folder: Path, template: str | None) -> Path:
    path = make_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path))
    special = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special, "bos_token": "<|begin|>"})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(path))
    return path


@pytest.mark.parametrize("template", [CHATML, LLAMA, None], ids=["chatml", "llama", "default"])
def test_text_and_answers_are_those_of_transformers(tmp_path: Path, template: str | None) -> None:
    tokenizer = TextTokenizer(tokenizer_with(tmp_path, template))
    reference = tokenizer.hf
    assert tokenizer.chat.render(TALK) == reference.apply_chat_template(TALK, tokenize=False)
    prompted = reference.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True)
    assert tokenizer.chat.render(TALK[:2], add_generation_prompt=True) == prompted
    parts = tokenizer.chat.lay_out(TALK)
    assert "".join(part.value for part in parts) == reference.apply_chat_template(TALK, tokenize=False)
    marks = reference.apply_chat_template(
        [
            {**message, "content": message["content"].replace("<|", "<")} for message in TALK
        ],  # else taken for special tokens
        chat_template=template or PLAIN,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    theirs = [token for token, own in zip(marks["input_ids"], marks["assistant_masks"], strict=True) if own]
    encode = {False: tokenizer.encode_many, True: tokenizer.encode_control}
    ours = [encode[part.control]([part.value])[0] for part in parts if part.learned]
    assert np.concatenate(ours).tolist() == theirs


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        (None, "should be a list"),
        ([], "neither text nor media"),
        ([{"role": "user", "content": " "}], "neither text nor media"),
        ([{"role": "user"}], "content should be a text or a list"),
        ([{"content": "x"}], "a role and a content"),
        ([{"role": "user", "content": ["x"]}], "a part should be"),
        ([{"role": "user", "content": [{"type": "video", "video": "x"}]}], "a part should be"),
        ([{"role": "user", "content": "x", "loss": 1}], "loss is true or false"),
    ],
)
def test_what_is_no_conversation_is_said(messages: Any, complaint: str) -> None:
    with pytest.raises(SampleError, match=complaint):
        ChatTemplate().lay_out(messages)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ messages[0].content }}", "leaves out"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "leaves out, repeats or moves"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes what messages say"),
        ("{{ raise_exception('no') }}", "refuses the messages: no"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses the messages"),
    ],
)
def test_a_template_that_does_otherwise_is_no_surprise(template: str, complaint: str) -> None:
    with pytest.raises(SampleError, match=complaint):
        ChatTemplate(template).lay_out(TALK)


def mixed(number: int) -> list[dict[str, Any]]:
    show = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": f"and {number}"},
        {"type": "audio", "audio": "b.flac"},
    ]
    return [
        {"role": "user", "content": show},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "again <|image|>" * (number % 3)},
        {"role": "assistant", "content": "never", "loss": False},
        {"role": "assistant", "content": f"dog {number}"},
    ]


@pytest.fixture
def tree(corpus: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.flac").write_bytes(flac(1))
    rows = [{"messages": mixed(number), "mood": number % 2} for number in range(12)]
    rows.append({"messages": [{"role": "user", "content": [{"type": "image", "image": "lost.png"}]}]})
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = tiny_tree(corpus, tmp_path / "runs")
    tree["objectives"] = {
        "answers": {"kind": "captioning"},
        "mood": {"kind": "classification", "label": "mood", "classes": [0, 1]},
    }
    source = {"shards": str(tmp_path / "out" / "train" / "*.tar"), "objectives": ["answers", "mood"]}
    tree["data"] |= {"sources": {"talk": source}, "tokenizer": str(tokenizer_with(tmp_path / "tokenizer", CHATML))}
    tree["eval"]["sources"] = {}
    return tree


def data_of(tree: dict[str, Any]) -> RunData:
    config = build_config(RunConfig, tree, "tree")
    return build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)


def test_conversations_are_built_counted_and_packed(tree: dict[str, Any], tmp_path: Path) -> None:
    answer = build_chat([tmp_path / "talk.jsonl"], tmp_path / "out")
    assert answer["counts"] == {"train": 12}
    assert answer["left_out"] == {"missing_file": 1}
    data = data_of(tree)
    table, tokenizer = data.dataset.tables[0], data.tokenizer
    units = table.units(np.arange(12))
    assert not units.reasons.any()
    for number in range(12):
        answers, mood = data.dataset.documents(0, number, 0)
        assert len(answers.input_ids) + len(mood.input_ids) == units.sizes[number, 0]
        assert mood.labels[-1] == number % 2
        places = np.flatnonzero(answers.labels != IGNORE_INDEX)
        learned = tokenizer.hf.decode(answers.labels[places])
        assert learned == f"a cat<|im_end|>dog {number}<|im_end|>"
        np.testing.assert_array_equal(answers.input_ids[places + 1], answers.labels[places])
        assert [item.kind for _, item in answers.media] == ["image", "audio"]


def test_another_template_is_another_count(tree: dict[str, Any], tmp_path: Path) -> None:
    build_chat([tmp_path / "talk.jsonl"], tmp_path / "out")
    whole = data_of(tree).dataset.tables[0].units(np.arange(12)).sizes
    tree["data"]["tokenizer"] = str(tokenizer_with(tmp_path / "other", None))
    other = data_of(tree)
    sizes = other.dataset.tables[0].units(np.arange(12)).sizes
    assert (sizes[:, 0] != whole[:, 0]).all()
    answers, mood = other.dataset.documents(0, 5, 0)
    assert len(answers.input_ids) + len(mood.input_ids) == sizes[5, 0]
    plain = make_tokenizer(tmp_path / "plain")
    assert TextTokenizer(plain).fingerprint == TextTokenizer(plain).fingerprint


@pytest.mark.parametrize("policy", ["split", "truncate"])
def test_long_conversations_are_cut_between_messages(tree: dict[str, Any], tmp_path: Path, policy: str) -> None:
    talk = [{"role": ("user", "assistant")[n % 2], "content": f"red cat {n}"} for n in range(40)]
    write_shard(
        tmp_path / "out" / "train" / "long.tar", [{"__key__": "a", "json": json.dumps({"messages": talk}).encode()}]
    )
    tree["objectives"].pop("mood")
    tree["data"]["sources"]["talk"] |= {"objectives": ["answers"], "long_documents": policy}
    data = data_of(tree)
    units = data.dataset.tables[0].units(np.arange(1))
    tree["data"] |= {"context_length": 4096, "bin_tokens": 4096}
    (whole,) = data_of(tree).dataset.documents(0, 0, 0)
    answers = data.tokenizer.hf.decode(whole.labels[whole.labels != IGNORE_INDEX])
    assert answers == "".join(f"red cat {n}<|im_end|>" for n in range(1, 40, 2))
    assert len(units.part) == (1 if policy == "truncate" else units.part.max() + 1)
    ids: list[int] = []
    for part, (tokens, *_) in zip(units.part.tolist(), units.sizes.tolist(), strict=True):
        (document,) = data.dataset.documents(0, 0, 0, part)
        assert len(document.input_ids) == tokens <= 128
        inside = slice(len(ids), len(ids) + tokens - 2)  # what a part ends with is its own
        np.testing.assert_array_equal(document.labels[:-2], whole.labels[inside])
        ids += document.input_ids[:-1].tolist()
    assert ids == whole.input_ids[: len(ids)].tolist()
    assert (len(ids) == len(whole.input_ids) - 1) == (policy == "split")


def test_the_command_line_builds_them(tree: dict[str, Any], tmp_path: Path) -> None:
    arguments = [
        "data",
        "build",
        "chat",
        str(tmp_path / "out"),
        str(tmp_path / "talk.jsonl"),
        "--heldout",
        "0.3",
        "--json",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exception is None
    assert sum(json.loads(done.stdout)["counts"].values()) == 12
