"""A training step (bar C1) on documents of uneven lengths, against Transformers' Llama with the same weights.

    python benchmarks/train_step.py [--json] [--quick] [--repeats 5]

Forward, backward and AdamW of a Llama (4 layers of width 256, 4 heads, feed-forward 768, 8,192 tokens, tied) in float32 on one thread.
Sixteen documents with lognormal(5.5, 0.9) lengths between 16 and 2,048 tokens go through

- padded: Transformers on a rectangle, with its attention mask;
- packed: Transformers on one row with restarting position ids, from which it makes the block-diagonal mask itself;
- one by one: Transformers on each document alone, gradients added up: what its users can do to have no padding and no mask;
- ours: one packed batch.

Sixteen documents of 512 tokens, where there is no padding to win, go through Transformers without a mask, and ours. First it is asserted
that all give one loss (to 1e-5) and one gradient of every matrix (to 1e-4 of its largest element).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from common import best_in_turns, machine, parse, report, versions
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mmctx.model import MmctxModel, ModelConfig
from mmctx.objectives.base import next_token_labels
from mmctx.objectives.captioning import CaptioningConfig
from mmctx.pack import IGNORE_INDEX, Document, pack_documents
from mmctx.transformer import TransformerConfig

SHAPE = TransformerConfig(width=256, depth=4, num_heads=4, mlp_width=768, qk_norm=False)
VOCAB = 8192
BARS = {"padded": 4.0, "packed": 2.3, "equal": 0.98}
"""Their seconds over ours."""
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4

Loss = Callable[[], Tensor]


def theirs(shape: TransformerConfig) -> LlamaForCausalLM:
    """Transformers' model, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.num_heads,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).train()


def ours(shape: TransformerConfig, their_model: LlamaForCausalLM) -> MmctxModel:
    """Our model with their weights, where they are."""
    model = MmctxModel(ModelConfig(transformer=shape), {"captioning": CaptioningConfig()}, VOCAB).train()
    model.load_state_dict(in_our_names(their_model, lambda parameter: parameter.detach().clone()))
    return model.to(their_model.device)


def in_our_names(model: LlamaForCausalLM, value: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """A value of each of their parameters (itself, its gradient), laid out as in our fused matrices."""
    found = {
        "embedding.weight": value(model.model.embed_tokens.weight),
        "trunk.norm.weight": value(model.model.norm.weight),
    }
    for number, layer in enumerate(model.model.layers):
        attention, mlp, block = layer.self_attn, layer.mlp, f"trunk.blocks.{number}."
        parts = {
            "attention_norm": [layer.input_layernorm],
            "attention.qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
            "attention.out": [attention.o_proj],
            "mlp_norm": [layer.post_attention_layernorm],
            "mlp.gate_up": [mlp.gate_proj, mlp.up_proj],
            "mlp.down": [mlp.down_proj],
        }
        found |= {
            f"{block}{name}.weight": torch.cat([value(m.weight) for m in modules]) for name, modules in parts.items()
        }
    return found


def documents(lengths: Sequence[int]) -> list[Tensor]:
    """Random ids."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]


def num_predictions(texts: list[Tensor]) -> int:
    """What the loss is divided by: all predictions, every token but the first of each document."""
    return sum(len(text) - 1 for text in texts)


def padded(model: LlamaForCausalLM, texts: list[Tensor]) -> Loss:
    """A rectangle with a mask, or without one where nothing is padded."""
    rows = nn.utils.rnn.pad_sequence(texts, batch_first=True)  # (B, L)
    lengths = torch.tensor([len(text) for text in texts])[:, None]
    real = torch.arange(rows.shape[1]) < lengths
    batch = {"input_ids": rows, "labels": rows.masked_fill(~real, IGNORE_INDEX)}
    if not real.all():
        batch["attention_mask"] = real.long()
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    return lambda: model(**batch, num_items_in_batch=num_predictions(texts)).loss


def packed(model: LlamaForCausalLM, texts: list[Tensor]) -> Loss:
    """One row, as Transformers' `DataCollatorWithFlattening` makes it."""
    labels = torch.cat([torch.cat([torch.tensor([IGNORE_INDEX]), text[1:]]) for text in texts])[None]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    batch = {"input_ids": torch.cat(texts)[None], "labels": labels, "position_ids": positions}
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    return lambda: model(**batch, num_items_in_batch=num_predictions(texts)).loss


def one_by_one(model: LlamaForCausalLM, texts: list[Tensor]) -> Loss:
    """Each document by itself; its backward runs at once, so that memory is that of one."""

    def loss() -> Tensor:
        total = torch.zeros((), requires_grad=True)
        for text in texts:
            part = model(input_ids=text[None], labels=text[None], num_items_in_batch=num_predictions(texts)).loss
            part.backward()
            total = total + part.detach()
        return total

    return loss


def our_loss(model: MmctxModel, texts: list[Tensor]) -> Loss:
    """One packed batch."""
    arrays = [text.numpy() for text in texts]
    made = [Document("captioning", ids, next_token_labels(ids, {}), causal=True) for ids in arrays]
    batch = pack_documents(made, placeholder_ids={}).to(model.embedding.weight.device)

    def loss() -> Tensor:
        found = model(batch).losses["captioning"]
        return found.total / found.count

    return loss


def check_equal(their_model: LlamaForCausalLM, our_model: MmctxModel, losses: Mapping[str, Loss]) -> dict[str, float]:
    """Largest differences from our loss and gradients, after asserting that they are small."""
    found: dict[str, tuple[float, dict[str, Tensor]]] = {}
    for name, loss in losses.items():
        for model in (their_model, our_model):
            model.zero_grad()
        value = loss()
        value.backward()
        if name == "ours":
            gradients = {key: parameter.grad.clone() for key, parameter in our_model.named_parameters()}  # type: ignore[union-attr]
        else:
            gradients = in_our_names(their_model, lambda parameter: parameter.grad.clone())  # type: ignore[union-attr]
        found[name] = value.item(), gradients
    mine, my_gradients = found.pop("ours")
    loss_difference = max(abs(value - mine) for value, _ in found.values())
    gradient_difference = max(
        float((gradient - my_gradients[key]).abs().max() / gradient.abs().max())
        for _, gradients in found.values()
        for key, gradient in gradients.items()
    )
    assert loss_difference <= LOSS_TOLERANCE, f"losses differ: ours {mine}, { ({n: v for n, (v, _) in found.items()}) }"
    assert gradient_difference <= GRADIENT_TOLERANCE, f"gradients differ by {gradient_difference:.1e} of the largest"
    return {"loss": loss_difference, "gradient": gradient_difference}


def step(loss: Loss, optimizer: torch.optim.Optimizer) -> None:
    """One step of training."""
    loss().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def race(lengths: Sequence[int], peers: Mapping[str, Callable[..., Loss]], repeats: int) -> dict[str, Any]:
    """Checks and times one set of documents: ratios of the best turns, taken in turns."""
    their_model = theirs(SHAPE)
    our_model = ours(SHAPE, their_model)
    texts = documents(lengths)
    losses = {name: make(their_model, texts) for name, make in peers.items()} | {"ours": our_loss(our_model, texts)}
    differences = check_equal(their_model, our_model, losses)
    their_optimizer, our_optimizer = (
        torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for model in (their_model, our_model)
    )
    sides = {
        name: partial(step, loss, our_optimizer if name == "ours" else their_optimizer) for name, loss in losses.items()
    }
    best = best_in_turns(sides, repeats, warm_up=1)
    return {
        "tokens": sum(lengths),
        "differences": differences,
        "seconds": {name: round(found["clock"], 4) for name, found in best.items()},
        "times_faster": {
            by: {name: round(best[name][by] / best["ours"][by], 2) for name in peers} for by in ("clock", "processor")
        },
    }


def main() -> None:
    arguments = parse(__doc__, repeats=5)
    torch.set_num_threads(1)
    count, longest = (4, 64) if arguments.quick else (16, 2048)
    drawn = np.random.default_rng(0).lognormal(5.5, 0.9, count)
    uneven = np.clip(drawn, 16, longest).astype(int).tolist()
    result = {
        "uneven": race(uneven, {"padded": padded, "packed": packed, "one by one": one_by_one}, arguments.repeats),
        "equal": race([longest // 4] * count, {"equal": padded}, arguments.repeats),
        "lengths": uneven,
        "bars": BARS,
        "machine": machine(),
        "versions": versions("torch", "transformers", "mmctx"),
    }
    lines = []
    for name in ("uneven", "equal"):
        found = result[name]
        lines.append(f"{name}: {found['tokens']} tokens; losses and gradients differ by {found['differences']}")
        lines += [f"  {side:<12} {seconds:8.3f} s a step" for side, seconds in found["seconds"].items()]
        lines += [f"  times faster than theirs, by the {by}: {ratios}" for by, ratios in found["times_faster"].items()]
    report(result, [*lines, f"bars {BARS}"], arguments.json)


if __name__ == "__main__":
    main()
