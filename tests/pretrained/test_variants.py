"""GPT-2's and BERT's shapes under what holds for every trunk: packing, audit, compilation, memory estimates, caches, longer contexts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ours import load, logits
from small_models import VOCAB
from torch import Tensor
from torch._dynamo.utils import counters

from mmctx import api
from mmctx.activations import ActivationsConfig
from mmctx.config import build_config
from mmctx.errors import ConfigError
from mmctx.generate import generate
from mmctx.kv_cache import KVCache
from mmctx.layout import DocumentLayout
from mmctx.learned_positions import resize_positions
from mmctx.train.config import RunConfig
from mmctx.train.memory import estimate_memory
from mmctx.transformer import Transformer, TransformerConfig

BIASES = {"mlp_bias": True, "qkv_bias": True, "out_bias": True, "qk_norm": False, "norm": "layer"}
GPT2 = BIASES | {"learned_positions": 128, "activation": "gelu_tanh"}
BERT = BIASES | {
    "learned_positions": 128,
    "activation": "gelu",
    "norm_place": "post",
    "embedding_norm": True,
    "head_transform": True,
}
SHAPES = pytest.mark.parametrize("shape", [GPT2, BERT], ids=["gpt2", "bert"])
PACKS = [([40, 24], 1), ([7, 50, 3], 2), ([11] * 9, 9), ([33, 32], 0)]


def make_trunk(shape: dict[str, Any]) -> Transformer:
    torch.manual_seed(0)
    tree = {"width": 32, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 48} | shape
    return Transformer(TransformerConfig.model_validate(tree)).train()


def step(trunk: Transformer, lengths: list[int], num_causal: int) -> tuple[Tensor, list[Tensor]]:
    layout = DocumentLayout.from_lengths(lengths, num_causal)
    generator = torch.Generator().manual_seed(sum(lengths))
    x = torch.randn(sum(lengths), 32, generator=generator, requires_grad=True)
    target = torch.randn(sum(lengths), 32, generator=generator)
    loss = (trunk(x, torch.cat([torch.arange(n) for n in lengths]), layout) * target).sum()
    return loss.detach(), list(torch.autograd.grad(loss, [x, *trunk.parameters()]))


@pytest.mark.slow
@SHAPES
def test_blocks_compile_once_and_recompute(shape: dict[str, Any]) -> None:
    torch._dynamo.reset()
    counters.clear()
    trunk, eager = make_trunk(shape), make_trunk(shape)
    trunk.set_activations(ActivationsConfig(checkpoint="full", every=2, mlp_tile=16))
    trunk.set_compiler("aot_eager")
    step(trunk, *PACKS[0])
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths, num_causal in PACKS[1:]:
            loss, gradients = step(trunk, lengths, num_causal)
            want, want_gradients = step(eager, lengths, num_causal)
            torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(gradients, want_gradients, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


@pytest.mark.slow
@SHAPES
def test_no_document_sees_another(shape: dict[str, Any], tree: dict[str, Any], tmp_path: Path) -> None:
    tree["model"]["transformer"] |= shape | {"depth": 1}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    report = api.audit(path, tokens=100)
    assert report.ok
    assert len(report.rows) > 10


@SHAPES
def test_memory_is_foretold_without_weights(shape: dict[str, Any], tree: dict[str, Any]) -> None:
    tree["model"]["transformer"] |= shape
    config = build_config(RunConfig, tree, "tree")
    data = api.build_dataset(config)
    batch = api._first_batch(config)
    assert batch is not None
    found = estimate_memory(config, batch, len(data.tokenizer))
    assert found["weights"] == sum(p.nbytes for p in api.build_model(config, data).parameters())


def test_positions_become_more(folders: dict[str, Path]) -> None:
    """Of 40, 100: the first 40 of repeated ones are theirs; stretched ones begin and end with theirs."""
    texts = [torch.arange(n) % VOCAB for n in (40, 3)]
    want = logits(load(folders["gpt2"], VOCAB), texts, causal=True)
    longer = load(folders["gpt2"], VOCAB, learned_positions=100, resize_positions="repeat")
    torch.testing.assert_close(logits(longer, texts, causal=True), want)
    assert torch.equal(longer.trunk.positions.weight[40:80], longer.trunk.positions.weight[:40])
    shorter = load(folders["gpt2"], VOCAB, learned_positions=41, resize_positions="interpolate")
    short = load(folders["gpt2"], VOCAB, learned_positions=20)
    theirs = longer.trunk.positions.weight[:40]
    torch.testing.assert_close(shorter.trunk.positions.weight[[0, -1]], theirs[[0, -1]])
    torch.testing.assert_close(short.trunk.positions.weight, theirs[:20])
    with pytest.raises(ConfigError, match=r"learned_positions=100, but the pretrained weights have 40 positions; set"):
        load(folders["gpt2"], VOCAB, learned_positions=100)


def test_stretched_positions_lie_between_their_neighbours() -> None:
    table = torch.tensor([[0.0], [1.0], [4.0]])
    assert resize_positions(table, 5, "interpolate")[:, 0].tolist() == [0.0, 0.5, 1.0, 2.5, 4.0]


def test_a_context_beyond_the_positions_is_refused(tree: dict[str, Any]) -> None:
    tree["model"]["transformer"] |= GPT2 | {"learned_positions": 100}
    with pytest.raises(
        ConfigError, match=r"data\.context_length=128 is longer than model\.transformer\.learned_positions=100"
    ):
        build_config(RunConfig, tree, "tree")
    tree["data"]["context_length"] = 64
    tree["train"].pop("steps")
    tree["schedule"] = [{"steps": 1}, {"steps": 1, "context_length": 101}]
    with pytest.raises(ConfigError, match="context_length=101 is longer"):
        build_config(RunConfig, tree, "tree")


def test_generation_beyond_the_positions_is_refused(folders: dict[str, Path]) -> None:
    from ours import batch_of

    model, prompt = load(folders["gpt2"], VOCAB), torch.arange(31)
    prompts = batch_of([prompt], causal=True)
    assert len(generate(model, prompts, eos_id=-1, max_new_tokens=9)[0]) == 9
    with pytest.raises(ConfigError, match=r"31 tokens and 10 new ones needs more positions than .*=40"):
        generate(model, prompts, eos_id=-1, max_new_tokens=10)
    cache = KVCache(1)
    model.prefill(prompts, cache)
    with pytest.raises(ConfigError, match="a document of 41 tokens"):
        model.branch([torch.arange(4), torch.arange(10)], cache, 0)
