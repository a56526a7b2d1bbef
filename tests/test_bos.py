"""`data.bos`: documents that begin with the tokenizer's `bos_token`, in plans, losses, evaluation, chats and the Transformers face."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_tokenizer, png, tiny_tree, words, write_shard
from tokenizers import processors
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from mmctx import api
from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.errors import ConfigError
from mmctx.eval import EvalContext
from mmctx.eval.haystack.build import build_prompt, least_tokens
from mmctx.eval.haystack.config import PasskeyConfig
from mmctx.eval.haystack.probe import Speller
from mmctx.eval.haystack.sources import Noise
from mmctx.eval.suites.passkey import make_passkey
from mmctx.eval.views import embed_views
from mmctx.hf import MmctxForConditionalGeneration, MmctxProcessor
from mmctx.pack import IGNORE_INDEX, Document, pack_documents
from mmctx.pretrained.export import export
from mmctx.tokenizer import TextTokenizer
from mmctx.train.build import build_model
from mmctx.train.checkpoints.load import load_model
from mmctx.train.config import RunConfig
from mmctx.train.loop import train

sys.path.append(str(Path(__file__).parent / "pretrained"))
from small_models import SMALL, make_model

BOS = "<s>"
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
TEXTS = ["red cat", "a blue house, and a star", "", "<s> is no token here"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose tokenizer begins texts, and whose chat template begins conversations, with `<s>`."""
    folder = make_tokenizer(tmp_path_factory.mktemp("llama"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), bos_token=BOS)
    begin = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))
    options = SMALL | {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    make_model("LlamaForCausalLM", options).save_pretrained(folder)
    return folder


@pytest.fixture
def begun(tree: dict[str, Any], llama: Path) -> dict[str, Any]:
    """The tiny run, its documents begun."""
    tree["data"] |= {"tokenizer": str(llama), "bos": True}
    return tree


def data_of(tree: dict[str, Any]) -> tuple[RunConfig, RunData]:
    config = build_config(RunConfig, tree, "tree")
    return config, build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)


def documents_of(data: RunData, count: int = 6) -> list[Document]:
    return [
        d
        for number, table in enumerate(data.dataset.tables)
        for sample in range(min(count, table.num_samples))
        for d in data.dataset.documents(number, sample, 0)
    ]


def test_documents_begin_and_nobody_predicts_it(begun: dict[str, Any]) -> None:
    _, data = data_of(begun)
    (bos,) = data.tokenizer.begin.tolist()
    documents = documents_of(data)
    assert {d.objective for d in documents} == {"captioning", "similarity", "masked_lm"}
    assert {kind for d in documents for _, (kind) in ((at, item.kind) for at, item in d.media)} == {"image", "audio"}
    for document in documents:
        assert document.input_ids[0] == bos
        assert bos not in document.input_ids[1:]
        assert bos not in document.labels
    begun["data"]["bos"] = False
    _, plain = data_of(begun)
    for document, without in zip(documents, documents_of(plain), strict=True):
        if document.objective != "masked_lm":  # which hides other places
            np.testing.assert_array_equal(document.input_ids[1:], without.input_ids)
            np.testing.assert_array_equal(document.labels[1:], without.labels)
        assert [(at - 1, item.num_tokens) for at, item in document.media] == [
            (at, item.num_tokens) for at, item in without.media
        ]
        learned = [i for i in without.input_ids if data.tokenizer.is_word[i]]
        follows = without.input_ids[0] if document.objective == "captioning" else IGNORE_INDEX
        if document.objective != "masked_lm":  # words are predicted, media are not
            assert document.labels[0] == (follows if follows in learned else IGNORE_INDEX)


@pytest.mark.parametrize("policy", ["drop", "truncate", "split", "stream"])
def test_plans_count_it(begun: dict[str, Any], tmp_path: Path, policy: str) -> None:
    """Every bin holds as many tokens as the plan says, whatever becomes of long documents."""
    shard = write_shard(
        tmp_path / "long.tar",
        [{"__key__": f"{n:03d}", "txt": words(n, 5 + 9 * n).encode(), "png": png(n)} for n in range(9)]
        + [{"__key__": f"{n:03d}", "txt": words(n, 7 * n).encode()} for n in range(10, 19)],
    )
    books = begun["data"]["sources"]["books"] | {"objectives": ["captioning"], "long_documents": policy}
    source = books | {"shards": str(shard)}
    begun["data"] |= {"sources": {"long": source, "books": books}, "context_length": 21, "bin_tokens": 84}
    if policy == "stream":
        begun["data"]["bins_per_step"] = 2
        begun["model"]["transformer"] |= {"windows": [4], "memory": {"layers": [0]}}
    _, data = data_of(begun)
    units = [table.units(np.arange(table.num_samples)) for table in data.dataset.tables]
    seen = 0
    for number, found in enumerate(units):
        for owner, part, size in zip(found.owner, found.part, found.sizes, strict=True):
            documents = data.dataset.documents(number, int(owner), 0, int(part))
            assert sum(len(d.input_ids) for d in documents) == size[0]
            assert all(len(d.input_ids) <= 21 for d in documents)
            starts = [d.start in (None, 0) for d in documents]
            assert [d.input_ids[0] == data.tokenizer.begin[0] for d in documents] == starts
            seen += 1
    assert seen > 7


def test_packed_equals_alone(begun: dict[str, Any]) -> None:
    config, data = data_of(begun)
    torch.manual_seed(0)
    model = build_model(config, len(data.tokenizer)).eval()
    documents = [d for d in documents_of(data) if d.objective != "similarity"]
    with torch.no_grad():
        together = model.losses(pack_documents(documents, data.tokenizer.placeholder_ids))
        alone = [model.losses(pack_documents([d], data.tokenizer.placeholder_ids)) for d in documents]
    for name in ("captioning", "masked_lm"):
        torch.testing.assert_close(together[name].total, sum(losses[name].total for losses in alone))
        assert together[name].count == sum(losses[name].count for losses in alone)


def test_likelihoods_of_imported_weights_are_transformers_own(begun: dict[str, Any], llama: Path, tmp_path: Path):
    texts = [text for text in TEXTS if text]
    shard = write_shard(tmp_path / "t.tar", [{"__key__": f"{n}", "txt": t.encode()} for n, t in enumerate(texts)])
    begun["data"]["sources"] = {"texts": {"shards": str(shard), "objectives": ["captioning"]}}
    begun["model"] = {"transformer": {"pretrained": str(llama)}}
    begun |= {"objectives": {"captioning": {"kind": "captioning"}}, "eval": {}}
    config, data = data_of(begun)
    ours = build_model(config, len(data.tokenizer)).eval()
    theirs, tokenizer = LlamaForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    eos = torch.tensor([tokenizer.eos_token_id])
    documents, wanted = [], []
    for number, text in enumerate(texts):
        ids = tokenizer(text, split_special_tokens=True, return_tensors="pt")["input_ids"][0]
        ids = torch.cat([ids, eos])
        (document,) = data.dataset.documents(0, number, 0)
        assert document.input_ids.tolist() == ids.tolist()
        assert document.labels.tolist() == [*ids[1:].tolist(), IGNORE_INDEX]  # the first word counts
        documents.append(document)
        with torch.no_grad():
            wanted.append(theirs(ids[None], labels=ids[None]).loss * (len(ids) - 1))
    batch = pack_documents(documents, {})
    with torch.no_grad():
        logits = ours.next_token_logits(ours.encode(batch))[:, : len(tokenizer)]  # Llama knows no tokens of ours
    losses = torch.nn.functional.cross_entropy(logits, batch.labels, ignore_index=IGNORE_INDEX, reduction="none")
    found = torch.stack([part.sum() for part in losses.split([len(d.input_ids) for d in documents])])
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def run(corpus: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with encoders, trained for two steps and evaluated."""
    tree = tiny_tree(corpus, tmp_path_factory.mktemp("runs"))
    tree["data"] |= {"tokenizer": str(llama), "bos": True}
    tree["model"]["transformer"] = {"pretrained": str(llama)}
    tree["train"] |= {"steps": 2}
    tree["eval"]["sources"]["books"] = {"shards": str(corpus / "books-*.tar"), "objectives": ["captioning"]}
    tree["eval"] |= {"suites": ["loss", "retrieval", "caption", "loss_by_position", "zero_shot"]}
    tree["eval"] |= {"loss_by_position": {"targets": 4, "kept": [4]}}
    classes = [words(seed, 2 + seed % 5) for seed in range(1000, 1016)]  # what the held-out triples say
    tree["eval"] |= {"zero_shot": {"classes": list(dict.fromkeys(classes)), "templates": ["{}", "a {}"]}}
    return train(build_config(RunConfig, tree, "tree")).run_dir


@torch.no_grad()
def test_the_processor_writes_what_their_tokenizer_writes(run: Path, llama: Path) -> None:
    processor, theirs = MmctxProcessor.from_pretrained(run / "latest"), AutoTokenizer.from_pretrained(llama)
    for text in TEXTS:
        want = theirs(text, split_special_tokens=True)["input_ids"]
        assert processor(text=text)["input_ids"][0].tolist() == want
    messages = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "<s>blue"}]
    want = theirs.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    found = processor.apply_chat_template(messages, tokenize=True)["input_ids"][0].tolist()
    assert found == want
    assert want.count(theirs.bos_token_id) == 2  # one of them the user's own: Transformers reads a whole text
    model = MmctxForConditionalGeneration.from_pretrained(run / "latest")
    assert model.config.special_tokens["bos"] == model.generation_config.bos_token_id == theirs.bos_token_id


@torch.no_grad()
def test_what_it_writes_is_what_llama_writes(run: Path, llama: Path, tmp_path: Path) -> None:
    """From the exported checkpoint, behind ids of the tokenizer beside it."""
    ours, tokens, config = load_model(run)
    export(ours, tokens, tmp_path / "out", "llama", context_length=config.data.context_length)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours, processor = (
        MmctxForConditionalGeneration.from_pretrained(run / "latest"),
        MmctxProcessor.from_pretrained(run / "latest"),
    )
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": None}
    for text in ("red cat", "star"):
        want = theirs.generate(**tokenizer(text, return_tensors="pt"), **options)
        assert ours.generate(**processor(text=text), **options).tolist() == want.tolist()


def test_chats_begin_once(begun: dict[str, Any], tmp_path: Path) -> None:
    import json

    messages = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "blue"}]
    chat = {"__key__": "0", "json": json.dumps({"messages": messages}).encode()}
    shard = write_shard(tmp_path / "chat.tar", [chat])
    begun["data"]["sources"] = {"chats": {"shards": str(shard), "objectives": ["captioning"]}}
    _, data = data_of(begun)
    (document,) = data.dataset.documents(0, 0, 0)
    assert data.dataset.tables[0].units(np.arange(1)).sizes[0, 0] == len(document.input_ids)
    begun["data"]["bos"] = False
    _, plain = data_of(begun)  # there the template alone writes it
    assert plain.dataset.documents(0, 0, 0)[0].input_ids.tolist() == document.input_ids.tolist()
    assert (document.input_ids == data.tokenizer.begin[0]).sum() == 1


def test_features_are_those_of_the_retrieval_suite(run: Path) -> None:
    ours, _, config = load_model(run)
    data = api.build_dataset(config, held_out=True)
    context = EvalContext(ours, data, config.objectives, config.eval, torch.device("cpu"))
    views = embed_views(context, "similarity")
    model, processor = (
        MmctxForConditionalGeneration.from_pretrained(run / "latest"),
        MmctxProcessor.from_pretrained(run / "latest"),
    )
    number = [source.name for source, _ in data.dataset.sources].index("heldout")
    source = data.dataset.sources[number][0]
    members = [source.read(int(uid) & ((1 << 48) - 1)).members for uid in views["image"].samples]
    with torch.no_grad():
        texts = model.get_text_features(**processor(text=[m["txt"].decode() for m in members]))
        images = model.get_image_features(processor(images=[m["png"] for m in members])["pixel_values"])
    for found, view in ((texts, "text0"), (images, "image")):
        torch.testing.assert_close(found, views[view].embeddings, atol=1e-5, rtol=1e-5)


def test_suites_read_it(run: Path, llama: Path) -> None:

    found = api.evaluate(run)
    assert found["caption"]["image_n"] == 16
    media = {name: scores["n"] for name, scores in found["zero_shot"].items()}
    assert media == dict.fromkeys(("image/similarity", "audio/similarity", "image/captioning", "audio/captioning"), 16)
    assert {"loss", "retrieval", "caption", "loss_by_position", "zero_shot"} <= found.keys(), found["skipped"]
    speller = Speller(TextTokenizer(llama, bos=True))
    rng = np.random.default_rng(0)
    probe = make_passkey(PasskeyConfig(candidates=4), rng, 0.4)
    for length in (least_tokens(probe, speller), 200):
        document, starts = build_prompt(probe, length, Noise(), speller, rng)
        assert len(document.input_ids) + len(speller.join(probe.answer)) == length
        assert document.input_ids[0] == speller.tokenizer.begin[0]
        needle = speller.join(probe.needles[0].parts)
        np.testing.assert_array_equal(document.input_ids[starts[0] : starts[0] + len(needle)], needle)


def test_runs_that_start_from_it_begin_documents_too(run: Path, begun: dict[str, Any], llama: Path) -> None:
    del begun["model"], begun["data"]["tokenizer"], begun["data"]["bos"]
    begun["run"]["name"] = "tuned"
    begun["train"]["init"] = str(run)
    assert build_config(RunConfig, begun, "tree").data.bos
    begun["data"]["bos"] = False
    assert not build_config(RunConfig, begun, "tree").data.bos


def test_whoever_leaves_it_out_is_told(begun: dict[str, Any], llama: Path) -> None:
    begun["model"]["transformer"] = {"pretrained": str(llama)}
    config, data = data_of(begun)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_model(config, len(data.tokenizer))
    begun["data"]["bos"] = False
    with pytest.warns(UserWarning, match="begins texts with <s>, this run does not; set data.bos=true"):
        build_model(data_of(begun)[0], len(data.tokenizer))


def test_what_is_indexed_stays_so_without_it(llama: Path, corpus: Path) -> None:
    plain, begun = TextTokenizer(llama), TextTokenizer(llama, bos=True)
    assert plain.fingerprint != begun.fingerprint  # chats become shorter by what their template writes
    assert not len(plain.begin)
    with pytest.raises(ConfigError, match=r"data.bos: true, but the tokenizer .* has no bos_token"):
        TextTokenizer(corpus / "tokenizer", bos=True)
