"""How a model answers: by log-probability among candidates, and by what it writes.

A prompt is read once, into a key/value cache; all candidates continue it from there in one call, and so does greedy decoding.

Candidates are compared by the sum of their tokens' log-probabilities, which is the probability that the model writes this candidate next:
it needs no choice of a unit of length, and what decides between names often is their first token alone, whose weight a mean over tokens
would dilute. A sum favours short candidates; that costs every model accuracy, and gives none an advantage, since the right one is drawn
evenly from the candidates: whoever does not read the document stays at chance. Where the answer is a number all candidates have equally
many digits, and names are drawn so that none is the beginning of another.

Shapes: C candidates, N scored tokens, D width, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmctx.eval.context import EvalContext
from mmctx.eval.haystack.probe import Probe, Speller
from mmctx.generate import continue_greedily, read_prompts
from mmctx.kv_cache import KVCache
from mmctx.model import MmctxModel
from mmctx.pack import Document, pack_documents

_ROWS = 64
"""Rows of logits (N, V) that exist at once."""
_SLACK = 6
"""Tokens that a model may write beyond the length of the right answer."""


@dataclass(frozen=True, slots=True)
class Reply:
    """How one question was answered.

    Attributes:
        found: of each reference, 1.0 if it is among the likeliest candidates, as many as there are right ones, else 0.0.
        exact: of each reference, whether the written text gives it (`GRADERS`); None where nothing was written.
        log_prob: of the right candidates among all candidates, on average.
        choice: the likeliest candidate of the first choice.
        text: what was written.
    """

    found: tuple[float, ...]
    exact: tuple[float, ...] | None
    log_prob: float
    choice: str
    text: str


def answer(
    context: EvalContext, probes: Sequence[Probe], prompts: Sequence[Document], speller: Speller, grader: str | None
) -> list[Reply]:
    """Answers to questions, all prompts read in one packed batch.

    Args:
        context: the model and its device.
        probes: the questions.
        prompts: their documents, each up to where its answer begins.
        speller: of the run's tokenizer.
        grader: one of `GRADERS`; None writes nothing.
    """
    model, tokenizer = context.model, speller.tokenizer
    written = max(len(speller.join(probe.answer)) for probe in probes) + _SLACK if grader else 1
    batch = pack_documents(prompts, tokenizer.placeholder_ids).to(context.device)
    last, cache = read_prompts(model, batch, written)  # (B, D)
    scores = [_scores(model, last[row], cache, row, probe, speller) for row, probe in enumerate(probes)]
    texts = [""] * len(probes)
    if grader:
        ids = continue_greedily(model, last, cache, tokenizer.eos_id, written)
        texts = [tokenizer.decode(part) for part in ids]
    return [_reply(*each, grader) for each in zip(probes, scores, texts, strict=True)]


def continuation_log_probs(
    model: MmctxModel, last: Tensor, cache: KVCache, row: int, leads: Sequence[np.ndarray], ends: Sequence[np.ndarray]
) -> np.ndarray:
    """(C,) float64 sums of log P(token | prompt, tokens before) over the tokens of each end, given the prompt and the end's lead.

    Args:
        model: in evaluation mode.
        last: (D,) the prompt's last hidden state.
        cache: that the prompt was read into; it stays as it is.
        row: the prompt's number in it.
        leads: ids between the prompt and each end, not scored; may be empty.
        ends: ids that are scored, at least one each.
    """
    read = [np.concatenate([lead, end[:-1]]) for lead, end in zip(leads, ends, strict=True)]  # what predicts the ends
    branches = [torch.from_numpy(ids).to(last.device) for ids in read if len(ids)]
    states = [last[None]]
    if branches:
        states.append(model.branch(branches, cache, row))
    hidden = torch.cat(states)  # (1 + T, D)
    rows, targets, owners, start = [], [], [], 1
    for number, (lead, end, ids) in enumerate(zip(leads, ends, read, strict=True)):
        for place, token in enumerate(end.tolist(), start=len(lead)):
            rows.append(start + place - 1 if place else 0)
            targets.append(token)
            owners.append(number)
        start += len(ids)
    found = token_log_probs(model, hidden[torch.tensor(rows, device=hidden.device)], targets)  # (N,)
    return np.bincount(owners, weights=found, minlength=len(ends))


def token_log_probs(model: MmctxModel, hidden: Tensor, targets: Sequence[int]) -> np.ndarray:
    """(N,) float64 log-probabilities of tokens (N,) after hidden states (N, D), in float32 whatever the model runs in."""
    wanted = torch.tensor(targets, device=hidden.device)
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):
        for some, tokens in zip(hidden.float().split(_ROWS), wanted.split(_ROWS), strict=True):
            logits = model.next_token_logits(some).double()  # (n, V)
            parts.append(logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=1))
    return torch.cat(parts).cpu().numpy()


def _scores(
    model: MmctxModel, last: Tensor, cache: KVCache, row: int, probe: Probe, speller: Speller
) -> list[np.ndarray]:
    """(C,) of each choice."""
    leads = [speller.join(choice.lead) for choice in probe.choices for _ in choice.candidates]
    ends = [speller.ids(candidate) for choice in probe.choices for candidate in choice.candidates]
    found = continuation_log_probs(model, last, cache, row, leads, ends)
    return np.split(found, np.cumsum([len(choice.candidates) for choice in probe.choices])[:-1])


def _reply(probe: Probe, scores: Sequence[np.ndarray], text: str, grader: str | None) -> Reply:
    found: list[float] = []
    log_probs: list[float] = []
    for choice, score in zip(probe.choices, scores, strict=True):
        likeliest = np.argsort(-score, kind="stable")[
            : len(choice.right)
        ]  # ties fall to the first: their order is random
        found += [float(right in likeliest) for right in choice.right]
        normalised = score - np.logaddexp.reduce(score)
        log_probs += normalised[list(choice.right)].tolist()
    exact = GRADERS[grader](text, probe) if grader else None
    best = probe.choices[0].candidates[int(np.argmax(scores[0]))].strip()
    return Reply(tuple(found), exact, float(np.mean(log_probs)), best, text)


def says(text: str, answer: str) -> bool:
    """Whether a text holds an answer as whole words and numbers, in any case.

    RULER asks whether the answer is part of the text as a string, which a longer number that holds it passes, too.
    """
    pattern = r"\s+".join(map(re.escape, answer.lower().split()))
    return re.search(rf"(?<!\w){pattern}(?!\w)", text.lower()) is not None


def contains(text: str, probe: Probe) -> tuple[float, ...]:
    """RULER's: of each reference, whether the text holds it; see `says`."""
    return tuple(float(says(text, reference)) for reference in probe.references)


def positions(text: str, probe: Probe) -> tuple[float, ...]:
    """MM-NIAH's soft accuracy of counts: of each reference, whether the text's number at its place is the same."""
    numbers = re.findall(r"\d+", text)
    return tuple(
        float(place < len(numbers) and int(numbers[place]) == int(reference))
        for place, reference in enumerate(probe.references)
    )


def first_integer(text: str, probe: Probe) -> tuple[float, ...]:
    """The passkey test's: the first integer of the text is the reference (Mohtashami and Jaggi 2023)."""
    found = re.search(r"\d+", text)
    return (float(found is not None and int(found.group()) == int(probe.references[0])),)


def labels(text: str, probe: Probe) -> tuple[float, ...]:
    """BABILong's: the labels that the text's first sentence holds, less those of the question, are the reference and nothing else."""
    sentence = re.split(r"[.\n]", text.strip())[0]
    found = {label for label in probe.labels if says(sentence, label)} - set(probe.asked_labels)
    return (float(found == {probe.references[0]}),)


GRADERS: dict[str, Callable[[str, Probe], tuple[float, ...]]] = {
    "contains": contains,
    "positions": positions,
    "first_integer": first_integer,
    "labels": labels,
}
"""What counts as an exact answer, by name."""
