"""Generation: Transformers' loop and caches over our trunk, against the whole document computed anew for each token."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import flac, png
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor, TextIteratorStreamer

from mmctx.hf import MmctxForConditionalGeneration, MmctxProcessor
from mmctx.pack import Document, MediaItem, pack_documents

NEW = 7
TEXTS = [
    "red <|image|> cat <|audio|>",
    "<|image|>",
    "a tall green tree and a small blue",
    "<|image|>and<|image|> is <|audio|>",
]
CLIPS = [flac(0, 0.4), flac(1, 0.25)]


def picture(seed: int, width: int, height: int) -> bytes:
    """Of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


IMAGES = [picture(n, *size) for n, size in enumerate([(32, 32), (64, 32), (33, 60), (48, 32)])]


@pytest.fixture(scope="module", params=["checkpoint", "untied", "bert", "varied"])
def parts(request: pytest.FixtureRequest) -> tuple[MmctxForConditionalGeneration, MmctxProcessor]:
    folder = request.getfixturevalue(request.param)
    return AutoModelForCausalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def read_all(processor: MmctxProcessor, side: str = "left") -> Any:
    return processor(images=IMAGES, text=TEXTS, audio=CLIPS, padding_side=side)


def read_each(processor: MmctxProcessor) -> list[Any]:
    found, images, clips = [], list(IMAGES), list(CLIPS)
    for text in TEXTS:
        own = (
            [images.pop(0) for _ in range(text.count("<|image|>"))],
            [clips.pop(0) for _ in range(text.count("<|audio|>"))],
        )
        found.append(processor(images=own[0] or None, text=text, audio=own[1] or None))
    return found


def answers(model: MmctxForConditionalGeneration, found: Tensor, prompt: int) -> list[list[int]]:
    """New tokens, cut at their end."""
    eos = model.config.special_tokens["eos"]
    rows = found[:, prompt:].tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


@torch.no_grad()
def slowly(model: MmctxForConditionalGeneration, inputs: Any, count: int) -> list[int]:
    """The likeliest tokens, by the native model and a document of `mmctx.pack`, which is read from its start for every token."""
    pixels = inputs.get("pixel_values", [])
    sizes = inputs.get("image_sizes", torch.tensor([p.shape[1:] for p in pixels]))
    heard = zip(*(inputs.get(f"input_features{name}", []) for name in ("", "_mask", "_tokens")), strict=True)
    items = {
        "image": [MediaItem("image", p[:, :h, :w], int(h * w) // 256) for p, (h, w) in zip(pixels, sizes, strict=True)],
        "audio": [MediaItem("audio", clip[mask.bool()], int(tokens)) for clip, mask, tokens in heard],
    }
    names = {number: kind for kind, number in model.placeholder_ids.items()}
    ids, media, at = inputs["input_ids"][0].tolist(), [], 0
    while at < len(ids):
        if (kind := names.get(ids[at])) is not None:
            media.append((at, items[kind].pop(0)))
        at += media[-1][1].num_tokens if kind else 1
    native, new = model.native, []
    for _ in range(count):
        whole = np.array(ids + new)
        document = Document("", whole, np.full_like(whole, -100), causal=True, media=tuple(media))
        hidden = native.encode(pack_documents([document], model.placeholder_ids))
        logits = native.next_token_logits(hidden[-1])
        logits[list(model.placeholder_ids.values())] = -torch.inf  # media are read, never written
        new.append(int(logits.argmax()))
        if new[-1] == model.config.special_tokens["eos"]:
            return new[:-1]
    return new


def test_greedy_equals_decoding_without_a_cache(parts: Any) -> None:
    model, processor = parts
    want = [slowly(model, inputs, NEW) for inputs in read_each(processor)]
    biased = model.config.shape.transformer.head_transform  # random biases of the logits decide what is likeliest
    assert biased or len({tuple(ids) for ids in want}) > 2  # they do say different things
    single = [
        answers(model, model.generate(**inputs, max_new_tokens=NEW), inputs["input_ids"].shape[1])[0]
        for inputs in read_each(processor)
    ]
    assert single == want
    for side in ("left", "right"):
        inputs = read_all(processor, side)
        assert not inputs["attention_mask"].all()
        found = model.generate(**inputs, max_new_tokens=NEW)
        assert answers(model, found, inputs["input_ids"].shape[1]) == want
    inputs = read_all(processor)
    without = model.generate(**inputs, max_new_tokens=NEW, use_cache=False)
    assert answers(model, without, inputs["input_ids"].shape[1]) == want


def test_beams_of_a_batch_are_those_of_each_prompt(parts: Any) -> None:
    model, processor = parts
    beams = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "max_new_tokens": NEW,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    inputs = read_all(processor)
    together = model.generate(**inputs, **beams)
    found = answers(model, together.sequences, inputs["input_ids"].shape[1])
    for number, alone in enumerate(read_each(processor)):
        one = model.generate(**alone, **beams)
        assert found[2 * number : 2 * number + 2] == answers(model, one.sequences, alone["input_ids"].shape[1])
        torch.testing.assert_close(
            together.sequences_scores[2 * number : 2 * number + 2], one.sequences_scores, atol=1e-4, rtol=1e-4
        )
        assert one.sequences_scores[0] > one.sequences_scores[1]


def test_scores_of_beams_are_log_probabilities(parts: Any) -> None:
    model, processor = parts
    alone = read_each(processor)[0]
    one = model.generate(
        **alone, num_beams=3, max_new_tokens=NEW, length_penalty=0.0, output_scores=True, return_dict_in_generate=True
    )
    start = alone["input_ids"].shape[1]
    with torch.no_grad():
        logits = model(**(alone | {"input_ids": one.sequences, "attention_mask": None})).logits[0, start - 1 : -1]
    new = one.sequences[0, start:]
    log_probs = logits.log_softmax(dim=-1).gather(1, new[:, None])[:, 0]
    ended = (new == model.config.special_tokens["eos"]).nonzero()
    count = int(ended[0]) + 1 if len(ended) else len(new)
    torch.testing.assert_close(one.sequences_scores[0], log_probs[:count].sum(), atol=1e-4, rtol=1e-4)


def test_sampling_draws_from_the_models_distribution(parts: Any) -> None:
    model, processor = parts
    inputs = read_each(processor)[1]
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 0.1, "top_k": 0, "max_new_tokens": 1, "num_return_sequences": 2000}
    drawn = model.generate(**inputs, **options)[:, -1]
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    logits[list(model.placeholder_ids.values())] = -torch.inf
    shares = torch.bincount(drawn, minlength=len(logits)) / len(drawn)
    distance = {t: (shares - (logits / t).softmax(dim=-1)).abs().sum() / 2 for t in (0.1, 1.0)}
    expected = (logits / 0.1).softmax(dim=-1)
    noise = (2 * expected / (np.pi * len(drawn))).sqrt().sum() / 2  # of the distance, if they are drawn from it
    assert distance[0.1] < 1.3 * noise < distance[1.0]
    torch.manual_seed(1)
    few = model.generate(**inputs, do_sample=True, top_p=0.2, max_new_tokens=NEW, num_return_sequences=3)
    assert few.shape[0] == 3


def test_texts_are_streamed(parts: Any) -> None:
    model, processor = parts
    inputs = read_each(processor)[0]
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    found = model.generate(**inputs, max_new_tokens=NEW, streamer=streamer)
    whole = processor.tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "".join(streamer) == whole != ""


def test_a_conversation_goes_on_with_its_cache(parts: Any) -> None:
    model, processor = parts
    inputs = read_all(processor)
    first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, eos_token_id=-1)
    cache = first["cache" if "cache" in first else "past_key_values"]
    more = torch.tensor([[20, 21, 22, 23]]).expand(len(TEXTS), -1)
    ids = torch.cat([first.sequences, more], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(TEXTS), 7, dtype=torch.int64)], dim=1)
    went_on = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, eos_token_id=-1)
    media = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    anew = model.generate(ids, attention_mask=mask, **media, max_new_tokens=4, eos_token_id=-1)
    assert went_on.tolist() == anew.tolist()


@pytest.mark.parametrize("tile", [1, 1 << 22])
def test_many_tokens_behind_a_filled_cache(parts: Any, monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    from transformers import DynamicCache

    model, processor = parts
    monkeypatch.setattr("mmctx.hf.cache._SCORES", tile)
    inputs = read_all(processor)
    want = model(**inputs, output_hidden_states=True)
    cache, columns, states = DynamicCache(config=model.config), inputs["input_ids"].shape[1], []
    media = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    embeds = want.hidden_states[0]
    for start, stop in ((0, columns - 9), (columns - 9, columns - 2), (columns - 2, columns)):
        mask = inputs["attention_mask"][:, :stop]
        found = model(inputs_embeds=embeds[:, start:stop], attention_mask=mask, past_key_values=cache)
        states.append(found.logits)
    assert media
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(states, dim=1)[real], want.logits[real], atol=1e-4, rtol=1e-4)


def test_no_row_sees_another(parts: Any) -> None:
    model, processor = parts
    with torch.no_grad():
        inputs = read_all(processor)
        before = model(**inputs).logits
        changed = {name: value.clone() for name, value in inputs.items()}
        changed["input_ids"][2, -1] += 1
        changed["pixel_values"][1] = 255 - changed["pixel_values"][1]  # of row 1
        changed["input_ids"][changed["attention_mask"] == 0] = 77  # padding is nobody's
        after = model(**changed).logits
    assert torch.equal(before[[0, 3]], after[[0, 3]])
    assert (before[[1, 2], -1] != after[[1, 2], -1]).any(dim=-1).all()


def test_logits_where_asked(parts: Any) -> None:
    model, processor = parts
    for side in ("left", "right"):
        inputs = read_all(processor, side)
        with torch.no_grad():
            every = model(**inputs).logits
            last, some = (model(**inputs, logits_to_keep=keep).logits for keep in (2, torch.tensor([0, 3])))
        assert every.shape == (*inputs["input_ids"].shape, model.config.vocab_size)
        assert torch.equal(last, every[:, -2:])
        assert torch.equal(some, every[:, [0, 3]])
        for row, alone in enumerate(read_each(processor)):
            want = model(**alone).logits[0]
            torch.testing.assert_close(every[row][inputs["attention_mask"][row].bool()], want, atol=1e-4, rtol=1e-4)
            if side == "right":
                torch.testing.assert_close(every[row, -1], want[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pixel_values": None}, ("image placeholders, but the 0 image items",)),
        ({"attention_mask": torch.ones(4, 3)}, ("(4, 3)", "one number a token")),
        ({"output_attentions": True}, ("output_attentions",)),
        ({"inputs_embeds": torch.zeros(4, 3, 32)}, ("either input_ids or inputs_embeds",)),
    ],
)
def test_what_does_not_fit_is_refused(parts: Any, change: dict[str, Any], words: Sequence[str]) -> None:
    from mmctx.errors import MmctxError

    model, processor = parts
    with pytest.raises(MmctxError) as error:
        model(**(dict(read_all(processor)) | change))
    assert all(word in str(error.value) for word in words), error.value


def test_pillow_pictures_are_read_as_files_are(parts: Any, tmp_path: Path) -> None:
    _, processor = parts
    (tmp_path / "a.png").write_bytes(png(1))
    from_file = processor(images=tmp_path / "a.png")
    for other in (Image.open(tmp_path / "a.png"), str(tmp_path / "a.png"), png(1), {"bytes": png(1)}):
        assert torch.equal(processor(images=other)["pixel_values"], from_file["pixel_values"])


def test_a_prompt_in_parts_is_read_as_one_with_marks(parts: Any) -> None:
    _, processor = parts
    (image, other), (clip, _) = IMAGES[:2], CLIPS
    marked = processor(text="red<|image|>and<|audio|><|image|>", images=[image, other], audio=clip)
    found = processor.read_parts(
        [("text", "red"), ("image", image), ("text", "and"), ("audio", clip), ("image", other)]
    )
    assert found.keys() == marked.keys()
    assert all(torch.equal(found[name], marked[name]) for name in marked)
    spelt = processor.read_parts([("text", "<|image|>"), ("text", "cat")])
    assert spelt.keys() == {"input_ids", "attention_mask"}  # plain characters, as in training
    assert processor.tokenizer.decode(spelt["input_ids"][0]) == "<|image|>cat"
    assert not set(spelt["input_ids"][0].tolist()) & set(parts[0].placeholder_ids.values())


def test_no_placeholder_is_written(parts: Any, checkpoint: Path, tmp_path: Path) -> None:
    from hf_folders import as_earlier

    earlier = AutoModelForCausalLM.from_pretrained(as_earlier(checkpoint, tmp_path / "earlier"))
    for model in (parts[0], earlier):
        options = {"do_sample": True, "temperature": 5.0, "top_k": 0, "max_new_tokens": 1, "num_return_sequences": 4000}
        drawn = model.generate(torch.arange(20, 30)[None], **options)
        counts = torch.bincount(drawn[:, -1], minlength=model.config.vocab_size)
        assert not counts[list(model.placeholder_ids.values())].any()
        assert (counts > 0).float().mean() > 0.9


def test_a_placeholder_behind_media_is_a_word_like_any_other(parts: Any) -> None:
    model, processor = parts
    inputs = read_each(processor)[0]
    first = model(**inputs, use_cache=True)
    mark = torch.tensor([[model.placeholder_ids["image"]]])
    cache = first["cache" if "cache" in first else "past_key_values"]
    assert model(mark, past_key_values=cache).logits.isfinite().all()


def test_learned_positions_end(bert: Path) -> None:
    from mmctx.errors import ConfigError

    model = AutoModelForCausalLM.from_pretrained(bert)
    ids = torch.arange(20, 134)[None]
    padded = torch.cat([torch.zeros(1, 30, dtype=torch.int64), ids], dim=1)
    mask = (padded > 0).long()
    with torch.no_grad():
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 30:], model(ids).logits)
        assert model.generate(ids, max_new_tokens=14, eos_token_id=-1).shape[1] == 128
        with pytest.raises(ConfigError, match="a row of 129 tokens is longer than the 128 positions"):
            model.generate(ids, max_new_tokens=16, eos_token_id=-1)
