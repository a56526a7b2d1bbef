"""Embeddings of the Transformers face against those that the retrieval suite compares."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import flac, png
from transformers import AutoModel, AutoProcessor

from mmctx import api
from mmctx.errors import ConfigError
from mmctx.eval import EvalContext
from mmctx.eval.views import embed_views
from mmctx.train.checkpoints.load import load_model

SIMILARITY = {"kind": "similarity", "pairs": [["image", "text0"], ["audio", "text0"]]}
OBJECTIVES = {
    "captioning": {"kind": "captioning"},
    "masked_lm": {"kind": "masked_lm"},
    "similarity": SIMILARITY,
    "other": SIMILARITY | {"pooling": "mean", "causal": True, "dim": 24},
}


@pytest.fixture(scope="module")
def both(make: Callable[..., Path], corpus: Path) -> Path:
    """A model with two similarity objectives, which held-out triples serve."""
    triples = {"shards": str(corpus / "heldout-*.tar"), "objectives": ["similarity", "other"]}
    return make(objectives=OBJECTIVES, eval={"sources": {"heldout": triples}})


@pytest.mark.parametrize("objective", ["similarity", "other"])
def test_features_equal_those_of_the_retrieval_suite(both: Path, objective: str) -> None:
    ours, _, config = load_model(both)
    data = api.build_dataset(config, held_out=True)
    context = EvalContext(ours, data, config.objectives, config.eval, torch.device("cpu"))
    views = embed_views(context, objective)
    model, processor = AutoModel.from_pretrained(both), AutoProcessor.from_pretrained(both)
    source = data.dataset.sources[0][0]
    members = [source.read(int(uid) & ((1 << 48) - 1)).members for uid in views["image"].samples]
    with torch.no_grad():
        images = processor(images=[m["png"] for m in members])
        sounds = processor(audio=[m["flac"] for m in members])
        texts = processor(text=[m["txt"].decode() for m in members])
        found = {
            "image": model.get_image_features(images["pixel_values"], objective=objective),
            "audio": model.get_audio_features(
                sounds["input_features"], sounds["input_features_mask"], objective=objective
            ),
            "text0": model.get_text_features(**texts, objective=objective),
        }
    assert len(members) == 16
    assert len({len(m["txt"]) for m in members}) > 3
    for view, embedded in found.items():
        assert views[view].samples.tolist() == views["image"].samples.tolist()
        torch.testing.assert_close(embedded, views[view].embeddings, atol=1e-5, rtol=1e-5)
    assert found["image"].shape[1] == (24 if objective == "other" else 32)
    if objective == "similarity":  # the first one, so it need not be named
        torch.testing.assert_close(model.get_image_features(images["pixel_values"]), found["image"])


def test_what_cannot_be_embedded_is_said(both: Path, make: Callable[..., Path], corpus: Path) -> None:
    model = AutoModel.from_pretrained(both)
    with pytest.raises(
        ConfigError, match="'retrieval' is no similarity objective of this model; it has similarity, other"
    ):
        model.get_text_features(torch.arange(4)[None], objective="retrieval")
    model.config.special_tokens = {}
    with pytest.raises(ConfigError, match="lack 'embed'"):
        model.get_text_features(torch.arange(4)[None])


def test_gradients_reach_the_trunk(both: Path) -> None:
    model, processor = AutoModel.from_pretrained(both), AutoProcessor.from_pretrained(both)
    inputs = processor(images=[png(1), png(2)])
    model.get_image_features(inputs["pixel_values"])[0, 0].backward()
    assert model.trunk.blocks[0].attention.qkv.weight.grad.abs().sum() > 0


def read(processor: Any, **inputs: Any) -> dict[str, Any]:
    return {name: value.tolist() for name, value in processor(**inputs).items()}


def test_processor_lays_media_out_as_training_does(both: Path, corpus: Path) -> None:
    _, _, config = load_model(both)
    data = api.build_dataset(config)
    processor = AutoProcessor.from_pretrained(both)
    number = next(n for n, (source, _) in enumerate(data.dataset.sources) if source.name == "books")
    source = data.dataset.sources[number][0]
    for sample in range(6):
        (document,) = (d for d in data.dataset.documents(number, sample, 0) if d.objective == "captioning")
        members = source.read(sample).members
        segments = json.loads(members["json"])["segments"]
        marks = {"text": None, "image": "<|image|>", "audio": "<|audio|>"}
        text = "".join(segment.get("text") or marks[next(iter(segment))] for segment in segments)
        media = {kind: [members[s[kind]] for s in segments if kind in s] or None for kind in ("image", "audio")}
        inputs = processor(text=text, images=media["image"], audio=media["audio"])
        assert inputs["input_ids"][0].tolist() == document.input_ids[:-1].tolist()  # training adds the end
        items = [item for _, item in document.media]
        pictures, clips = ([item.values for item in items if item.kind == kind] for kind in ("image", "audio"))
        if pictures:
            assert torch.equal(inputs["pixel_values"], torch.stack(pictures))
        for got, mask, want in zip(
            inputs.get("input_features", []), inputs.get("input_features_mask", []), clips, strict=True
        ):
            assert torch.equal(got[mask.bool()], want)
            assert not got[~mask.bool()].any()


def test_marks_may_be_left_out(both: Path) -> None:
    processor = AutoProcessor.from_pretrained(both)
    a, b, clip = png(1), png(2), flac(3)
    want = read(processor, text="<|image|><|audio|>red", images=a, audio=clip)
    assert read(processor, text="red", images=[a], audio=[clip]) == want
    rows = read(processor, text=["<|image|>red", "<|image|>blue cat"], images=[a, b])
    assert read(processor, text=["red", "blue cat"], images=[a, b]) == rows
    assert read(processor, text=["red", "blue cat"], images=[[a], [b]]) == rows
    uneven = read(processor, text=["red", "<|image|><|image|>blue cat"], images=[a, b])
    assert read(processor, text=["red", "blue cat"], images=[[], [a, b]]) == uneven
    assert read(processor, images=[a, b]) == read(processor, text=["<|image|>", "<|image|>"], images=[a, b])
    assert read(processor, audio=flac(3)) == read(processor, text="<|audio|>", audio={"bytes": clip})


def test_samples_tell_their_rate(both: Path) -> None:
    import io

    import soundfile

    processor = AutoProcessor.from_pretrained(both)
    samples, rate = soundfile.read(io.BytesIO(flac(3, rate=22_050)), dtype="float32")
    want = read(processor, audio=flac(3, rate=22_050))
    assert read(processor, audio=samples, sampling_rate=rate) == want
    assert read(processor, audio={"array": samples, "sampling_rate": rate}) == want
    assert read(processor, audio=samples, sampling_rate=16_000) != want


def test_special_tokens_in_plain_text_are_plain(both: Path) -> None:
    processor = AutoProcessor.from_pretrained(both)
    eos = processor.tokenizer.eos_token_id
    assert eos not in processor(text="red <|endoftext|>")["input_ids"]
    assert processor(text="red <|endoftext|>", special_tokens=True)["input_ids"][0, -1] == eos


def test_chat_template(both: Path) -> None:
    processor = AutoProcessor.from_pretrained(both)
    user = {
        "role": "user",
        "content": [
            {"type": "image", "image": png(1)},
            {"type": "text", "text": "red"},
            {"type": "audio", "audio": flac(1)},
        ],
    }
    chat = [user, {"role": "assistant", "content": "cat"}, {"role": "user", "content": "and?"}]
    text = processor.apply_chat_template(chat)
    assert text == "User:\n<|image|>red<|audio|>\nAssistant:\ncat<|endoftext|>\nUser:\nand?\n"
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    want = processor(text=f"{text}Assistant:\n", images=png(1), audio=flac(1), special_tokens=True)
    assert {name: value.tolist() for name, value in inputs.items()} == {
        name: value.tolist() for name, value in want.items()
    }
    several = processor.apply_chat_template([chat, chat[2:]], tokenize=True)
    assert several["input_ids"].shape[0] == 2
    assert several["attention_mask"][1].sum() < several["attention_mask"][0].sum()
    half = [user, {"role": "assistant", "content": "a ca"}]
    assert (
        processor.apply_chat_template(half, continue_final_message=True)
        == "User:\n<|image|>red<|audio|>\nAssistant:\na ca"
    )


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"text": "a <|image|>", "images": [png(1), png(2)]}, "1 marks <|image|>, but there are 2 image items"),
        ({"text": "<|image|>", "images": png(1), "audio": flac(1)}, "0 marks <|audio|>, but there are 1 audio items"),
        ({"text": ["a", "b", "c"], "images": [png(1), png(2)]}, "2 image items for 3 texts"),
        ({}, "nothing to read"),
        ({"images": "no/such.png"}, "no/such.png: cannot be read"),
        ({"images": b"no picture"}, "no picture that can be decoded"),
        ({"audio": torch.zeros(100)}, "give sampling_rate"),
        ({"audio": torch.zeros(2, 100)}, "mean of its channels"),
        ({"text": "a", "return_tensors": "np"}, "PyTorch tensors"),
    ],
)
def test_inputs_that_do_not_fit_are_named(both: Path, inputs: dict[str, Any], words: str) -> None:
    from mmctx.errors import DataError

    with pytest.raises(DataError) as error:
        AutoProcessor.from_pretrained(both)(**inputs)
    assert words in str(error.value)
