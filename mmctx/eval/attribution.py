"""On which tokens of its document does an answer rest? Gradients and attention of one causal document.

- gradient x input (Shrikumar et al. 2016): the derivative of the answer's log-probability along each token's own embedding.
- integrated gradients (Sundararajan et al. 2017): that derivative, averaged on the way from a document that says nothing, times the way.
  Their sum is what the document adds to the answer's log-probability (completeness).
- attention rollout (Abnar and Zuidema 2020): attention of all layers multiplied, half of each for the residual stream. Rows of attention
  are formed in blocks and summed at once, so that no (T, T) matrix is ever held.

Shapes: T tokens of the pack, L tokens of the document, C tokens of its context, A of the answer, H query heads, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from mmctx.errors import DataError
from mmctx.model import MmctxModel
from mmctx.pack import PackedBatch

METHODS = ("integrated", "gradient", "attention")
_ROWS = 128  # rows of attention at a time


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens whose log-probability is explained, all in one document of a pack.

    Attributes:
        start: position in the pack of the answer's first token; what stands before it in its document is the context.
        tokens: (A,) ids; the pack holds them at `start`, the last of them or all, or as many as it has room for.
    """

    start: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Attribution:
    """What each token of a context adds to an answer.

    Attributes:
        scores: by method, (C,) float64. Of gradients in nats, of either sign; attention sums to at most 1.
        log_prob: of the answer, nats.
        baseline: of the answer after a context that says nothing.
        gap: by how much the integrated gradients miss `log_prob - baseline`, nats: a share of it measures how rough the steps are.
    """

    scores: Mapping[str, np.ndarray]
    log_prob: float
    baseline: float
    gap: float


def attribute(model: MmctxModel, batch: PackedBatch, answer: Answer, *, steps: int = 64) -> Attribution:
    """Explains one answer by the tokens before it.

    The answer's own tokens stay as they are: what is explained is what the context adds. A context that says nothing has the mean of all
    text embeddings at every place.

    Args:
        model: in evaluation mode; its weights get no gradients.
        batch: on the model's device; the document of the answer is causal.
        answer: of one of its documents.
        steps: at which integrated gradients look (Gauss and Legendre's places, which need fewer than equal ones).

    Raises:
        DataError: nothing stands before the answer, or its document is not causal.
    """
    first, _ = _document(batch, answer.start - 1)
    with torch.no_grad():
        given = model.embed(batch)  # (T, D)
        empty = given.clone()
        empty[first : answer.start] = model.embedding.weight[: model.vocab_size].mean(0).to(given.dtype)
        attention = attention_rollout(model, batch, answer.start - 1)[first : answer.start]

    def place(share: float) -> tuple[float, Tensor]:
        return answer_gradient(model, batch, torch.lerp(empty, given, share), answer)

    log_prob, gradient = place(1.0)
    places, weights = np.polynomial.legendre.leggauss(steps)  # on -1 to 1
    mean = torch.zeros_like(gradient, dtype=torch.float64)
    for share, weight in zip(((places + 1) / 2).tolist(), (weights / 2).tolist(), strict=True):
        mean += weight * place(share)[1].double()
    with torch.no_grad():
        baseline = float(answer_log_prob(model, batch, empty, answer))
    inside = slice(first, answer.start)
    integrated = (mean * (given - empty).double()).sum(-1)[inside].cpu().numpy()
    return Attribution(
        scores={
            "integrated": integrated,
            "gradient": (gradient * given).double().sum(-1)[inside].cpu().numpy(),
            "attention": attention.double().cpu().numpy(),
        },
        log_prob=log_prob,
        baseline=baseline,
        gap=abs(float(integrated.sum()) - (log_prob - baseline)),
    )


def answer_gradient(model: MmctxModel, batch: PackedBatch, embeddings: Tensor, answer: Answer) -> tuple[float, Tensor]:
    """The answer's log-probability, and its derivative by every input embedding: (T, D), exactly zero in other documents."""
    with torch.enable_grad():
        inputs = embeddings.detach().requires_grad_()
        log_prob = answer_log_prob(model, batch, inputs, answer)
        (gradient,) = torch.autograd.grad(log_prob, inputs)
    return float(log_prob.detach()), gradient


def answer_log_prob(model: MmctxModel, batch: PackedBatch, embeddings: Tensor, answer: Answer) -> Tensor:
    """The summed log-probability of the answer's tokens, a scalar, when the model reads these embeddings (T, D)."""
    hidden = model.trunk(embeddings, model.positions(batch), batch.layout)  # (T, D)
    before = slice(answer.start - 1, answer.start - 1 + len(answer.tokens))
    logits = model.next_token_logits(hidden[before])  # (A, V)
    log_probs = logits.log_softmax(-1, dtype=_wide(logits))
    tokens = torch.tensor(answer.tokens, device=log_probs.device)
    return log_probs.gather(1, tokens[:, None]).sum()


@torch.no_grad()
def attention_rollout(model: MmctxModel, batch: PackedBatch, position: int) -> Tensor:
    """(T,) shares of every token in the state at `position`: attention of the layers multiplied from the last to the first.

    Each layer counts as half the mean of its heads and half the residual stream. Zero outside the position's document.
    """
    first, end = _document(batch, position)
    queries, keys = _queries_and_keys(model, batch, slice(first, end))
    weights = torch.zeros(end - first, dtype=_wide(queries[0]), device=queries[0].device)  # (L,)
    weights[position - first] = 1
    for layer in reversed(range(len(queries))):
        window = model.trunk.config.layer_window(layer)
        mixed = torch.zeros_like(weights)
        for start in range(0, end - first, _ROWS):
            rows = weights[start : start + _ROWS]  # (B,)
            if bool(rows.any()):
                mixed += rows @ attention_rows(queries[layer], keys[layer], start, start + len(rows), window)
        weights = (weights + mixed) / 2
    whole = weights.new_zeros(batch.num_tokens)
    whole[first:end] = weights
    return whole


def attention_rows(q: Tensor, k: Tensor, start: int, end: int, window: int | None) -> Tensor:
    """(B, L) attention of the queries `start` to `end` of a causal document, mean over heads; q (L, H, d), k (L, K, d)."""
    heads = q.shape[1] // k.shape[1]
    keys = k.repeat_interleave(heads, dim=1)  # query head h reads key head h // heads
    scores = torch.einsum("bhd,lhd->hbl", q[start:end], keys) * q.shape[-1] ** -0.5
    place = torch.arange(len(q), device=q.device)
    behind = place[start:end, None] - place[None]  # (B, L) how far back a key lies
    seen = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=_wide(scores)).mean(0)


def _wide(tensor: Tensor) -> torch.dtype:
    """The type for sums of exponentials: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _queries_and_keys(model: MmctxModel, batch: PackedBatch, document: slice) -> tuple[list[Tensor], list[Tensor]]:
    """Rotated queries (L, H, d) and keys (L, K, d) of a document in every layer."""
    trunk = model.trunk
    x, rope = trunk.enter(model.embed(batch), model.positions(batch), batch.layout)
    queries, keys = [], []
    for block in trunk.blocks:
        q, k, _ = block.project(x, rope)  # type: ignore[operator]
        queries.append(q[document])
        keys.append(k[document])
        x = block(x, rope, batch.layout)
    return queries, keys


def _document(batch: PackedBatch, position: int) -> tuple[int, int]:
    """[first, end) of the causal document that holds a position."""
    ends = list(accumulate(batch.layout.lengths))
    number = next((n for n, end in enumerate(ends) if position < end), None)
    if number is None or position < 0 or number >= batch.layout.num_causal:
        raise DataError(
            f"position {position} lies in no causal document: the pack has {batch.layout.num_causal} of them, which end at "
            f"{batch.layout.num_causal_tokens}"
        )
    first = ends[number] - batch.layout.lengths[number]
    return first, ends[number]
