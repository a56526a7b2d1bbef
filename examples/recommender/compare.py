"""Where the last item of held-out histories ranks among all that their users have not seen: by a run, and by simple recommenders.

    python examples/recommender/compare.py data/recommender runs/recommender

A run ranks titles by the log-probability that it gives them after the history. `told of habits` knows what the others have to find out: how
users were simulated, and the tastes of this one. No recommender can be better on average.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import mmctx
from mmctx.datasets.build.shards import read_shard
from mmctx.eval.answers import continuation_log_probs
from mmctx.eval.documents import excerpt, grouped
from mmctx.eval.intervals import wilson_interval
from mmctx.generate import read_prompts
from mmctx.pack import Document, pack_documents

NUM_DAYS = 7
DAYS_KEPT = (28, 6)
"""Of histories that are cut: four weeks, and no day of the same weekday."""
_BATCH = 4096  # tokens read at a time
Recommender = Callable[[list[int]], np.ndarray]
"""History -> score of each item (n,)."""


class User(NamedTuple):
    """A history but for its last item, that item, and the group of each weekday."""

    history: list[int]
    last: int
    tastes: list[int]


def read_users(folder: Path) -> list[User]:
    """All users of a split."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        for sample in read_shard(path):
            about = json.loads(sample["json"])
            found.append(User(about["items"][:-1], about["items"][-1], about["tastes"]))
    return found


def popularity(users: list[User], size: int) -> np.ndarray:
    """(n,) how often each item was looked at."""
    return np.bincount([item for user in users for item in (*user.history, user.last)], minlength=size).astype(float)


def recommenders(users: list[User], size: int) -> dict[str, Recommender]:
    """What training users tell, by name."""
    popular = popularity(users, size)
    follows, together = np.zeros((size, size)), np.zeros((size, size))
    for user in users:
        items = [*user.history, user.last]
        np.add.at(follows, (items[:-1], items[1:]), 1)
        together[np.ix_(items, items)] += 1
    cosine = together / np.sqrt(np.outer(popular, popular) + 1e-9)
    np.fill_diagonal(cosine, 0)
    tie = 1e-6 * popular / popular.sum()  # popular first where counts are equal
    return {
        "popularity": lambda history: popular,
        "what follows the last item": lambda history: follows[history[-1]] + tie,
        "what goes with the history": lambda history: cosine[history].sum(axis=0),
        "what goes with the same weekday": lambda history: cosine[history[-NUM_DAYS::-NUM_DAYS]].sum(axis=0),
    }


def told(user: User, simulator: dict[str, Any]) -> np.ndarray:
    """(n,) the probability of each item, by the simulator's own rules."""
    size, habit = simulator["GROUP_SIZE"], simulator["HABIT"]
    left = np.tile(simulator["POPULARITY"], (simulator["NUM_GROUPS"], 1))
    left.reshape(-1)[user.history] = 0
    left /= left.sum(axis=1, keepdims=True)
    groups = np.full(len(left), (1 - habit) / len(left))
    groups[user.tastes[len(user.history) % NUM_DAYS]] += habit
    return (groups[:, None] * left).reshape(-1, 1)[: len(left) * size, 0]


def rank(scores: np.ndarray, user: User) -> int:
    """Of the last item among all that were not seen, from 1; equal scores rank before it."""
    unseen = np.ones(len(scores), bool)
    unseen[[*user.history, user.last]] = False
    return 1 + int((scores[unseen] >= scores[user.last]).sum())


def summary(ranks: list[int]) -> dict[str, Any]:
    """R@1 and R@10 with Wilson intervals, MRR, NDCG@10 of one right item: `1 / log2(1 + rank)` up to rank 10."""
    found = np.array(ranks)
    hits = {k: int((found <= k).sum()) for k in (1, 10)}
    return {
        **{f"R@{k}": (hits[k] / len(found), *wilson_interval(hits[k], len(found))) for k in hits},
        "MRR": float((1 / found).mean()),
        "NDCG@10": float(np.where(found <= 10, 1 / np.log2(1 + found), 0).mean()),
    }


def ranks_of_run(run: Path, users: list[User], titles: list[str]) -> dict[str, list[int]]:
    """Ranks by a run's newest checkpoint, in the order of `users`: after the whole history, and after less of it."""
    model, tokenizer, config = mmctx.load_model(run)
    ends = [tokenizer.encode(f"{title} .") for title in titles]
    prompts = list(_prompts(run, config, tokenizer.encode("Monday :")[1]))
    found = {"": _ranks(model, tokenizer, [prompt for prompt, _ in prompts], users, ends)}
    for days in DAYS_KEPT:
        cut = [excerpt(prompt, [(starts[-1 - days], len(prompt.input_ids))]) for prompt, starts in prompts]
        found[f", last {days} days alone"] = _ranks(model, tokenizer, cut, users, ends)
    return found


def _prompts(run: Path, config: Any, colon: int) -> Iterator[tuple[Document, list[int]]]:
    """Each held-out history up to where its last title begins, and where its days begin."""
    data = mmctx.build_dataset(config, held_out=True).dataset
    for sample_id in range(data.tables[0].num_samples):
        (document,) = data.documents(0, sample_id, 0)
        starts = (np.flatnonzero(document.input_ids == colon) - 1).tolist()
        yield excerpt(document, [(0, starts[-1] + 2)]), starts


@torch.no_grad()
def _ranks(model: Any, tokenizer: Any, prompts: list[Document], users: list[User], ends: list[np.ndarray]) -> list[int]:
    found = []
    nothing = [np.zeros(0, np.int64)] * len(ends)
    for group in grouped(prompts, [len(prompt.input_ids) for prompt in prompts], _BATCH):
        last, cache = read_prompts(model, pack_documents(group, tokenizer.placeholder_ids), 1)
        for row in range(len(group)):
            scores = continuation_log_probs(model, last[row], cache, row, nothing, ends)
            found.append(rank(scores, users[len(found)]))
    return found


def compare(data: Path, run: Path, simulator: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Summaries by name."""
    users, heldout = read_users(data / "train"), read_users(data / "heldout")
    titles = [title for title, _ in json.loads((data / "catalogue.json").read_text())]
    found = {
        name: [rank(score(user.history), user) for user in heldout]
        for name, score in recommenders(users, len(titles)).items()
    }
    found |= {f"{run}{name}": ranks for name, ranks in ranks_of_run(run, heldout, titles).items()}
    found["told of habits"] = [rank(told(user, simulator), user) for user in heldout]
    return {name: summary(ranks) for name, ranks in found.items()}


def main() -> None:
    """Prints a table."""
    import runpy

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args()
    simulator = runpy.run_path(str(Path(__file__).with_name("data.py")))
    print(
        "| next item of held-out users | R@1 | 95% interval | R@10 | 95% interval | MRR | NDCG@10 |\n|---|---|---|---|---|---|---|"
    )
    for name, score in compare(arguments.data, arguments.run, simulator).items():
        shares = " | ".join("{:.3f} | {:.3f} to {:.3f}".format(*score[f"R@{k}"]) for k in (1, 10))
        print(f"| {name} | {shares} | {score['MRR']:.3f} | {score['NDCG@10']:.3f} |")


if __name__ == "__main__":
    main()
