"""Suites against what they should say of an oracle, of a blind model, and of step-by-step decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import png, triple, write_shard

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.eval import SUITES, EvalContext, Suite, evaluate
from mmctx.generate import generate
from mmctx.model import MmctxModel
from mmctx.pack import pack_documents
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig


@pytest.fixture
def context(tree: dict[str, Any]) -> EvalContext:
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    model = build_model(config, len(data.tokenizer))
    return EvalContext(model, data, config.objectives, config.eval, torch.device("cpu"))


@pytest.mark.slow
def test_all_suites_run_on_every_held_out_sample(context: EvalContext) -> None:
    seen = []
    context = EvalContext(**{**vars(context), "progress": lambda suite, done, total: seen.append((suite, done, total))})
    context.model.train()
    results = evaluate(context, ("loss", "retrieval", "caption", "masked_lm"))
    assert context.model.training  # as it was
    assert {suite for suite, done, total in seen if done == total} == set(results) - {"skipped"}
    assert results["skipped"] == {}
    assert results["retrieval"]["text_to_text1"]["n"] == 16
    assert results["caption"]["image_n"] == results["caption"]["audio_n"] == 16
    # an untrained model predicts about evenly over the vocabulary
    assert results["loss"]["captioning"]["held_out"] == pytest.approx(np.log(len(context.data.tokenizer)), rel=0.1)


@pytest.mark.parametrize("bf16", [False, True])
def test_suites_run_in_the_precision_of_the_run(
    context: EvalContext, monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    monkeypatch.setitem(SUITES, "peek", Suite(lambda context: {"bf16": torch.is_autocast_enabled("cpu")}))
    context = EvalContext(**{**vars(context), "bf16": bf16})
    assert evaluate(context, ("peek",))["peek"]["bf16"] is bf16
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.slow
def test_all_suites_run_in_bf16(context: EvalContext) -> None:
    context = EvalContext(**{**vars(context), "bf16": True})
    results = evaluate(context, ("loss", "retrieval", "caption", "masked_lm"))
    assert results["caption"]["image_n"] == results["retrieval"]["text_to_text1"]["n"] == 16
    assert results["loss"]["captioning"]["held_out"] == pytest.approx(np.log(len(context.data.tokenizer)), rel=0.1)


@pytest.mark.slow
def test_held_out_samples_that_cannot_be_used_are_counted_once(tree: dict[str, Any], tmp_path: Path) -> None:
    picture = png(5)
    hollow = picture[:60] + bytes(len(picture) - 60)  # the header is whole, the pixels are not
    samples = [triple(1), triple(2) | {"__key__": "hollow", "png": hollow}, {"__key__": "lonely", "png": png(3)}]
    write_shard(tmp_path / "h.tar", samples)
    tree["eval"]["sources"]["heldout"]["shards"] = str(tmp_path / "h.tar")
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    model = build_model(config, len(data.tokenizer))
    context = EvalContext(model, data, config.objectives, config.eval, torch.device("cpu"))
    results = evaluate(context, ("loss", "retrieval", "caption"))
    assert results["skipped"] == {"undecodable_image": 1, "missing_member": 1}
    assert results["caption"]["image_n"] == 1


@pytest.mark.slow
def test_generation_equals_decoding_without_a_cache(context: EvalContext) -> None:
    model, data = context.model.eval(), context.data
    for parameter in model.parameters():  # away from the neutral start, so that continuations differ
        torch.nn.init.normal_(parameter, std=0.2)
    documents = [data.dataset.documents(0, sample, 0)[0] for sample in range(4)]
    documents += [data.dataset.documents(0, sample, 0)[1] for sample in range(2)]  # clips, of other lengths
    prompts = [cut(d) for d in documents]
    together = generate(model, pack_documents(prompts, data.tokenizer.placeholder_ids), data.tokenizer.eos_id, 7)
    assert len({tuple(ids) for ids in together}) > 1
    for prompt, ids in zip(prompts, together, strict=True):
        assert ids == slowly(model, data, prompt, 7)


def cut(document):
    from dataclasses import replace

    end = document.media[0][1].num_tokens
    return replace(document, input_ids=document.input_ids[:end], labels=document.labels[:end])


@torch.no_grad()
def slowly(model: MmctxModel, data: RunData, prompt, max_new_tokens: int) -> list[int]:
    """The whole document again for every token."""
    from dataclasses import replace

    ids: list[int] = []
    while len(ids) < max_new_tokens:
        tokens = np.concatenate([prompt.input_ids, np.array(ids, dtype=np.int64)])
        document = replace(prompt, input_ids=tokens, labels=np.full_like(tokens, -100))
        hidden = model.encode(pack_documents([document], data.tokenizer.placeholder_ids))
        token = int(model.next_token_logits(hidden[-1:]).argmax())
        if token == data.tokenizer.eos_id:
            break
        ids.append(token)
    return ids
