"""Runs that start from a checkpoint and train all of it, or a little beside it: what they train, keep, save, merge and go on with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tokenizer, tiny_tree

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.errors import CheckpointError, ConfigError
from mmctx.jsonl import read_lines
from mmctx.model import MmctxModel
from mmctx.pack import IGNORE_INDEX, Document, PackedBatch, pack_documents
from mmctx.train.build import build_model
from mmctx.train.checkpoints.load import load_model
from mmctx.train.config import RunConfig
from mmctx.train.init import overlaid
from mmctx.train.loop import train
from mmctx.train.merge import merge_checkpoint
from mmctx.train.optim.ema import Ema, EmaConfig
from mmctx.tuning import merge, unmerge
from mmctx.tuning.apply import set_merged

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "targets": ["trunk", "audio.projector"]},
    "adalora": {"kind": "adalora", "initial_rank": 4, "rank": 2, "start": 1, "settle": 2},
    "prefix": {"kind": "prefix", "num_tokens": 5},
    "adapter": {"kind": "adapter", "width": 6},
}
STEPS = 8
ADDED = ("lora_", "prefix", "bottleneck")


@pytest.fixture(scope="module")
def base_tree(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the run that the others start from."""
    tree = tiny_tree(corpus, tmp_path_factory.mktemp("runs"))
    tree["run"]["name"] = "base"
    tree["model"]["transformer"]["windows"] = [None, 40]
    tree["train"] |= {"steps": 12, "save_every": 100, "optimizer": {"lr": 3e-3}}
    tree["eval"] = {}
    return tree


@pytest.fixture(scope="module")
def base(base_tree: dict[str, Any]) -> Path:
    return train(build_config(RunConfig, base_tree, "base")).run_dir


def tuned_tree(base_tree: dict[str, Any], base: Path, name: str, **changes: Any) -> dict[str, Any]:
    """What a YAML says that starts from the base: only what differs."""
    tree = json.loads(json.dumps(base_tree))
    tree["run"]["name"] = name
    tree["train"] |= {"init": str(base), "steps": STEPS, "save_every": 4, "seed": 5, "keep": {"last": 9}}
    tree["train"]["optimizer"] = {"lr": 0.02}
    del tree["model"], tree["data"]["tokenizer"]
    return overlaid(tree, changes)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tuned(base_tree: dict[str, Any], base: Path, kind: str) -> Path:
    """The folder of a run of each kind, to its end."""
    held_out = tiny_tree(Path(base_tree["data"]["tokenizer"]).parent, base)["eval"]["sources"]
    changes = {"train": {"tune": KINDS[kind], "ema": {"decay": 0.5}, "audit": kind == "prefix"}}
    if kind in ("lora", "prefix"):  # of averaged weights, as the run goes on
        changes["eval"] = {"sources": held_out, "weights": "ema", "every": STEPS}
    tree = tuned_tree(base_tree, base, kind, **changes)
    return train(build_config(RunConfig, tree, kind)).run_dir


def only(kind: str, *kinds: str) -> None:
    """What holds for some kinds alone. (A fixture's parameters that a test sets otherwise would leave `tuned` that of another kind.)"""
    if kind not in kinds:
        pytest.skip(f"holds for {', '.join(kinds)}")


def data_of(folder: Path) -> tuple[MmctxModel, RunData]:
    model, _, config = load_model(folder)
    return model, build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)


def documents_of(data: RunData) -> list[Document]:
    return [d for source, count in ((0, 3), (1, 4)) for n in range(count) for d in data.dataset.documents(source, n, 0)]


def pack(data: RunData, documents: list[Document]) -> PackedBatch:
    return pack_documents(documents, data.tokenizer.placeholder_ids)


def test_a_run_trains_what_it_added_and_nothing_of_the_base(tuned: Path, base: Path, kind: str) -> None:
    lines = read_lines(tuned / "metrics.jsonl")
    if kind in ("lora", "prefix"):
        (entry,) = json.loads((tuned / "eval.json").read_text())["evaluations"]
        assert np.isfinite(entry["loss"]["captioning"]["held_out"]), entry
        assert any("eval/loss/captioning/held_out" in line for line in lines), lines
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    weights, theirs = (
        load_file(tuned / "latest" / "model.safetensors"),
        load_file(base / "latest" / "model.safetensors"),
    )
    assert theirs.keys() < weights.keys()  # the base keeps its names
    changed = {name for name, tensor in theirs.items() if not torch.equal(tensor, weights[name])}
    assert changed == {name for name in theirs if name.startswith("objectives.")}
    added = weights.keys() - theirs.keys()
    state = load_file(tuned / "latest" / "trainer" / "optimizer" / "optimizer.safetensors")
    trained = {place.rpartition("/")[0].replace(".base_layer.", ".") for place in state}
    assert trained == changed | {name for name in added if "ranknum" not in name}


def test_what_was_added_alone_learns(tuned: Path, kind: str) -> None:
    """Something that the base does not do: to say one word all the time."""
    model, data = data_of(tuned)
    batch = pack(data, [d for d in documents_of(data) if d.objective == "captioning"])
    batch = replace(batch, labels=torch.where(batch.labels == IGNORE_INDEX, IGNORE_INDEX, 300))
    added = [p for name, p in model.named_parameters() if any(part in name for part in ADDED)]
    optimizer, losses = torch.optim.Adam(added, lr=0.02), []
    for _ in range(25):
        loss = model(batch).losses["captioning"]
        losses.append(float(loss.total.detach()) / loss.count)
        loss.total.div(loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1  # embeddings are near zero still, and with them all logits


def test_a_run_goes_on_bitwise_without_what_it_started_from(
    base_tree: dict[str, Any], base: Path, tuned: Path, kind: str, tmp_path: Path
) -> None:
    """From step 4 again, with the YAML that said only what differs, while the base is elsewhere."""
    copy, gone = tmp_path / "again", base.with_name("gone")
    shutil.copytree(tuned, copy, symlinks=True)
    shutil.rmtree(copy / f"checkpoint-{STEPS}")
    tree = tuned_tree(
        base_tree, base, "again", run={"dir": str(tmp_path)}, train={"tune": KINDS[kind], "ema": {"decay": 0.5}}
    )
    base.rename(gone)
    try:
        train(build_config(RunConfig, tree, "again"))
    finally:
        gone.rename(base)
    for name in ("model.safetensors", "trainer/optimizer/optimizer.safetensors", "trainer/ema.safetensors"):
        ours, theirs = (load_file(run / f"checkpoint-{STEPS}" / name) for run in (copy, tuned))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs)


def test_documents_in_a_pack_do_not_see_each_other(tuned: Path, kind: str) -> None:
    """Losses and gradients of a pack are the sums of those of its documents alone, causal ones and others."""
    model, data = data_of(tuned)
    model = model.double().train()
    for block in model.trunk.blocks:
        block.dropout = 0.0  # type: ignore[assignment]
    documents = [d for d in documents_of(data) if d.objective != "similarity"]
    added = [p for name, p in model.named_parameters() if any(part in name for part in ADDED)]

    def loss(documents: list[Document]) -> torch.Tensor:
        found = model(pack(data, documents)).losses
        return found["captioning"].total + found["masked_lm"].total

    packed, alone = loss(documents), torch.stack([loss([document]) for document in documents]).sum()
    torch.testing.assert_close(packed, alone, rtol=1e-11, atol=1e-11)
    ours, theirs = (torch.autograd.grad(total, added, allow_unused=True) for total in (packed, alone))
    assert any(gradient is not None and bool(gradient.any()) for gradient in ours)
    for a, b in zip(ours, theirs, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_recomputed_activations_change_nothing(tuned: Path, kind: str) -> None:
    from mmctx.activations import ActivationsConfig

    model, data = data_of(tuned)
    model = model.double().train()
    batch, found = pack(data, documents_of(data)[:8]), []
    added = [p for name, p in model.named_parameters() if "trunk" in name and any(part in name for part in ADDED)]
    for settings in (
        ActivationsConfig(),
        ActivationsConfig(checkpoint="selective"),
        ActivationsConfig(checkpoint="full"),
    ):
        model.set_activations(settings)
        torch.manual_seed(0)
        found.append(torch.autograd.grad(model(batch).losses["captioning"].total, added))
    for a, b in zip(found[0] * 2, (*found[1], *found[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_merged_and_unmerged_models_give_the_same(
    base_tree: dict[str, Any], tuned: Path, kind: str, tmp_path: Path, base: Path
) -> None:
    only(kind, "lora", "adalora")
    model, data = data_of(tuned)
    batch = pack(data, documents_of(data))
    base_model, _, _ = load_model(base)
    with torch.no_grad():
        want, before = model.encode(batch), base_model.encode(batch)
        assert not torch.allclose(want, before, atol=1e-3)
        set_merged(model, True)
        torch.testing.assert_close(model.encode(batch), want, rtol=0, atol=1e-5)
        unmerge(model)
        torch.testing.assert_close(model.encode(batch), want, rtol=0, atol=1e-5)
    merge_checkpoint(tuned, tmp_path / "out")
    merged, _, config = load_model(tmp_path / "out")
    assert config.train.tune.kind == "full"
    assert merged.state_dict().keys() == base_model.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(merged.encode(batch), want, rtol=0, atol=1e-5)
    fresh = tuned_tree(base_tree, tmp_path / "out", "fresh")
    started = build_model(build_config(RunConfig, fresh, "fresh"), merged.vocab_size)
    assert all(torch.equal(a, b) for a, b in zip(started.parameters(), merged.parameters(), strict=True))
    from_tuned = build_model(build_config(RunConfig, tuned_tree(base_tree, tuned, "y"), "y"), merged.vocab_size)
    assert all(torch.equal(a, b) for a, b in zip(from_tuned.parameters(), merged.parameters(), strict=True))


def test_what_no_matrix_can_hold_is_not_merged(tuned: Path, kind: str, tmp_path: Path) -> None:
    only(kind, "prefix", "adapter")
    with pytest.raises(ConfigError, match=f"tune.kind={kind} adds what no matrix"):
        merge_checkpoint(tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_generation_sees_the_prefix(tuned: Path, kind: str) -> None:
    """Greedy decoding with a cache, and scored branches, equal reading the whole document again."""
    only(kind, "prefix")
    from mmctx.generate import generate
    from mmctx.kv_cache import KVCache

    model, data = data_of(tuned)
    documents = [d for d in documents_of(data) if d.objective == "captioning"][:5]
    prompts = [_cut(document) for document in documents]
    together = generate(model, pack(data, prompts), data.tokenizer.eos_id, 6)
    with torch.no_grad():
        for prompt, ids in zip(prompts, together, strict=True):
            for place, token in enumerate(ids):
                hidden = model.encode(pack(data, [_longer(prompt, ids[:place])]))
                assert int(model.next_token_logits(hidden[-1:]).argmax()) == token
        cache = KVCache(4)
        model.prefill(pack(data, prompts[:2]), cache)
        branches = [torch.tensor([5, 6, 7]), torch.tensor([8])]
        found = model.branch(branches, cache, 1).split([3, 1])
        for ids, states in zip(branches, found, strict=True):
            want = model.encode(pack(data, [_longer(prompts[1], ids.tolist())]))[-len(ids) :]
            torch.testing.assert_close(states, want, rtol=1e-4, atol=1e-5)


def _cut(document: Document) -> Document:
    return _longer(document, [], document.media[0][1].num_tokens)


def _longer(document: Document, ids: list[int], keep: int | None = None) -> Document:
    tokens = np.concatenate([document.input_ids[:keep], np.array(ids, np.int64)])
    media = tuple((at, item) for at, item in document.media if at + item.num_tokens <= len(tokens))
    return replace(document, input_ids=tokens, labels=np.full_like(tokens, -100), media=media)


def test_the_budget_ends_at_its_rank(tuned: Path, kind: str) -> None:
    only(kind, "adalora")
    weights = load_file(tuned / "latest" / "model.safetensors")
    diagonals = [tensor for name, tensor in weights.items() if ".lora_E." in name]
    kept = sum(int((diagonal != 0).sum()) for diagonal in diagonals)
    assert kept == 2 * len(diagonals)
    assert all(len(diagonal) == 4 for diagonal in diagonals)


def test_peft_reads_the_adapter(tuned: Path, base: Path, kind: str) -> None:
    """Onto a fresh copy of the base, by peft's own loader."""
    import peft

    folder = tuned / "latest" / "adapter"
    if kind == "adapter":
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"
        return
    config, tensors = peft.PeftConfig.from_pretrained(str(folder)), load_file(folder / "adapter_model.safetensors")
    assert str(base) == config.base_model_name_or_path
    model, data = data_of(tuned)
    if kind == "prefix":
        assert tensors["prompt_embeddings"].shape == (5, 2 * 2 * config.token_dim)
        return
    plain, _, _ = load_model(base)
    config.modules_to_save = None
    injected = peft.inject_adapter_in_model(config, plain)
    ours = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    report = peft.set_peft_model_state_dict(injected, ours)
    assert not [name for name in report.unexpected_keys if not name.startswith("objectives.")]
    batch = pack(data, documents_of(data))
    with torch.no_grad():
        torch.testing.assert_close(injected.encode(batch), model.encode(batch), rtol=0, atol=1e-5)


def test_averages_and_memory_know_the_tuning(tuned: Path, kind: str) -> None:
    only(kind, "lora")
    from mmctx.train.checkpoints.load import load_run_config
    from mmctx.train.config import TrainConfig
    from mmctx.train.memory import estimate_memory

    model, data = data_of(tuned)
    config = load_run_config(tuned / "latest")
    batch = pack(data, documents_of(data))
    full = config.model_copy(
        update={"train": TrainConfig(**{**dict(config.train), "tune": {"kind": "full"}, "init": None})}
    )
    tuning, everything = (estimate_memory(c, batch, len(data.tokenizer)) for c in (config, full))
    assert tuning["optimizer"] < everything["optimizer"]
    assert tuning["gradients"] < everything["gradients"]
    names = {name for name, _ in model.named_parameters()}
    assert Ema(model, EmaConfig()).average.keys() == names


class TestStarts:
    def test_a_fresh_run_has_the_weights_and_says_what_is_new(
        self, base_tree: dict[str, Any], base: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        objectives = {"captioning": {"kind": "captioning"}, "sort": {"kind": "next_sentence"}}
        tree = tuned_tree(base_tree, base, "start")
        tree["objectives"] = objectives
        tree["data"]["sources"].pop("books")
        tree["data"]["sources"]["triples"]["objectives"] = ["captioning", "sort"]
        config = build_config(RunConfig, tree, "tree")
        assert config.model.transformer == build_config(RunConfig, base_tree, "base").model.transformer
        theirs = load_file(base / "latest" / "model.safetensors")
        model = build_model(config, load_model(base)[0].vocab_size)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, theirs[name]) if name in theirs else name.startswith("objectives.sort.")
        said = model.origin.describe()  # type: ignore[attr-defined]
        assert "new, from the run's seed: objectives.sort.probe" in said
        assert "not used: objectives.similarity" in said
        tree["train"] |= {"steps": 1}
        train(build_config(RunConfig, tree, "tree"))
        assert said in capsys.readouterr().err

    def test_what_differs_is_said_and_the_rest_inherited(self, base_tree: dict[str, Any], base: Path) -> None:
        tree = tuned_tree(base_tree, base, "x", model={"image": None, "transformer": {"dropout": 0.3}})
        config = build_config(RunConfig, tree, "tree")
        assert config.model.image is None
        assert (config.model.transformer.width, config.model.transformer.dropout) == (32, 0.3)
        assert config.data.tokenizer == str((base / "latest").resolve())

    def test_a_tensor_that_does_not_fit_is_named(self, base_tree: dict[str, Any], base: Path, tmp_path: Path) -> None:
        for changes, said in (
            (
                {"model": {"transformer": {"mlp_width": 64}}},
                r"mlp.down.weight has the shape \[32, 48\] there and \[32, 64\]",
            ),
            (
                {"objectives": {"similarity": {"dim": 7}}},
                r"objectives.similarity.*give objectives.similarity another name",
            ),
        ):
            config = build_config(RunConfig, tuned_tree(base_tree, base, "x", **changes), "tree")
            with pytest.raises(ConfigError, match=said):
                build_model(config, load_model(base)[0].vocab_size)
        tree = tuned_tree(base_tree, base, "x")
        tree["data"]["tokenizer"] = str(make_tokenizer(tmp_path / "tokenizer"))
        with pytest.raises(ConfigError, match=r"embedding.weight.*leave out data.tokenizer"):
            build_model(build_config(RunConfig, tree, "tree"), 900)

    def test_what_would_stay_at_random_is_an_error(self, base_tree: dict[str, Any], base: Path) -> None:
        model = {"transformer": {"tie_embeddings": False}}
        tree = tuned_tree(base_tree, base, "x", model=model, train={"tune": {"kind": "lora"}})
        with pytest.raises(ConfigError, match=r"has no head.weight.*modules=\{head: \{freeze: false\}\}"):
            build_model(build_config(RunConfig, tree, "tree"), load_model(base)[0].vocab_size)
        tree["train"]["modules"] = {"head": {"freeze": False}}
        built = build_model(build_config(RunConfig, tree, "tree"), load_model(base)[0].vocab_size)
        assert built.head is not None

    def test_there_must_be_a_checkpoint(self, base_tree: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="neither a whole checkpoint"):
            build_config(RunConfig, tuned_tree(base_tree, tmp_path / "nothing", "x"), "tree")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"tune": {"kind": "prefix"}, "sequence_parallel": 2}, "prefix puts tokens in front of whole documents"),
            ({"tune": {"kind": "adalora"}, "distribution": {"kind": "fsdp2"}}, "ranks the entries of all layers"),
            ({"tune": {"kind": "adalora", "start": 5, "settle": 5}}, "leave none of the run's 8 steps"),
            ({"tune": {"kind": "adalora", "rank": 20}}, "more than initial_rank"),
            ({"tune": {"kind": "lora", "targets": []}}, "at least 1 item"),
            ({"tune": {"kind": "lora"}, "init": None}, "frozen weights that nothing has trained"),
        ],
    )
    def test_what_does_not_go_together_is_said(
        self, base_tree: dict[str, Any], base: Path, changes: Any, said: str
    ) -> None:
        tree = tuned_tree(
            base_tree, base, "x", model=base_tree["model"], data={"tokenizer": base_tree["data"]["tokenizer"]}
        )
        tree["train"] |= changes
        with pytest.raises(ConfigError, match=said):
            build_config(RunConfig, tree, "tree")

    def test_a_target_that_is_none_is_said(self, base_tree: dict[str, Any], base: Path) -> None:
        tree = tuned_tree(base_tree, base, "x", train={"tune": {"kind": "lora", "targets": ["attention.q"]}})
        with pytest.raises(ConfigError, match=r"no linear layer is named 'attention.q'; there are .*attention.qkv"):
            build_model(build_config(RunConfig, tree, "tree"), load_model(base)[0].vocab_size)


def test_merging_nothing_changes_nothing(base: Path) -> None:
    model, _, _ = load_model(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
