"""What simple models make of the held-out reviews, beside what runs made of them.

python examples/sentiment/compare.py data/sentiment runs/sentiment runs/sentiment_lora
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from mmctx.datasets.build.shards import read_shard
from mmctx.eval.packages import require
from mmctx.eval.results import read_results
from mmctx.eval.suites.classification import score_classes
from mmctx.tokenizer import TextTokenizer

MOODS = ("bad", "good")
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)
"""Values of C, of which the development set chooses."""


def read(data: Path, split: str) -> tuple[list[str], list[int]]:
    """Texts and numbers of their moods."""
    samples = [sample for path in sorted((data / split).glob("*.tar")) for sample in read_shard(path)]
    return [sample["txt"].decode() for sample in samples], [
        MOODS.index(json.loads(sample["json"])["mood"]) for sample in samples
    ]


def baselines(data: Path) -> dict[str, dict[str, float]]:
    """Scores by name: the commoner mood, and logistic regression on bags of characters, of the tokenizer's words, of runs of characters."""
    require("sklearn")
    train, dev, heldout = (read(data, split) for split in ("train", "dev", "heldout"))
    tokenizer = TextTokenizer(data / "tokenizer")
    words = lambda text: tokenizer.encode(text).tolist()  # noqa: E731
    most = max(MOODS, key=lambda mood: train[1].count(MOODS.index(mood)))
    found = {"the commoner mood": _score(heldout[1], [MOODS.index(most)] * len(heldout[1]))}
    bags: dict[str, tuple[str | Callable, tuple[int, int]]] = {
        "bag of characters": ("char", (1, 1)),
        "bag of words": (words, (1, 1)),
        "bag of 1 to 2 characters": ("char", (1, 2)),
        "bag of 1 to 3 characters": ("char", (1, 3)),
    }
    for name, (unit, lengths) in bags.items():
        found[name] = _score(heldout[1], classify(unit, lengths, train, dev, heldout[0]))
    return found


def classify(
    unit: str | Callable, lengths: tuple[int, int], train: tuple[list[str], list[int]], dev: tuple[list[str], list[int]],
    texts: Sequence[str],
) -> list[int]:  # fmt: skip
    """Moods of `texts` by logistic regression on TF-IDF, its penalty chosen on `dev`."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(
        analyzer=unit, ngram_range=lengths, sublinear_tf=True, min_df=2, lowercase=unit == "char"
    )
    features = vectorizer.fit_transform(train[0])
    models = [LogisticRegression(C=penalty, max_iter=1000).fit(features, train[1]) for penalty in PENALTIES]
    best = max(models, key=lambda model: model.score(vectorizer.transform(dev[0]), dev[1]))
    return best.predict(vectorizer.transform(texts)).tolist()


def _score(truth: Sequence[int], chosen: Sequence[int]) -> dict[str, float]:
    return score_classes(truth, chosen, MOODS)  # type: ignore[return-value]


def of_run(run: Path) -> dict[str, float]:
    """What `mmctx eval` found last."""
    return read_results(run)[-1]["classification"]["mood"]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path, nargs="*")
    arguments = parser.parse_args()
    found = baselines(arguments.data) | {str(run): of_run(run) for run in arguments.runs}
    print("| held-out reviews | accuracy | 95% interval | macro F1 |\n|---|---|---|---|")
    for name, score in found.items():
        print(
            f"| {name} | {score['accuracy']:.3f} | {score['low']:.3f} to {score['high']:.3f} | {score['macro_f1']:.3f} |"
        )


if __name__ == "__main__":
    main()
