"""Suite `sts`: do embeddings of sentences lie as near to each other as people find their meanings alike?

Semantic textual similarity: Spearman's rank correlation between the cosine of a pair's embeddings and its gold score (STS benchmark, Cer et
al. 2017; as in Sentence-BERT, Reimers & Gurevych 2019).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmctx.errors import ConfigError, DataError
from mmctx.eval.config import EvalConfig
from mmctx.eval.context import EvalContext
from mmctx.eval.packages import require
from mmctx.eval.views import embed_texts


class Pair(NamedTuple):
    """Two sentences and how alike they are, on any scale that grows."""

    first: str
    second: str
    score: float


def evaluate_sts(context: EvalContext) -> dict[str, Any]:
    """`{FILE: {"spearman", "low", "high", "n"}}` for each of `eval.sts.files`, by the text embedding of the first `similarity` objective.

    Raises:
        ConfigError: no files, or no objective that embeds texts.
    """
    objective, tables = _embedder(context), _tables(context.config)
    return {
        name: score_pairs(lambda texts: embed_texts(context, objective, texts, "sts"), pairs)
        for name, pairs in tables.items()
    }


def check_sts(config: EvalConfig) -> None:
    """Raises ConfigError if there are no files or no scipy, DataError if one cannot be read."""
    require("scipy")
    _tables(config)


def _tables(config: EvalConfig) -> dict[str, list[Pair]]:
    if not config.sts.files:
        raise ConfigError("suite sts needs eval.sts.files, for example eval.sts.files={en: stsb-en-test.csv}")
    return {name: read_pairs(Path(path), config.sts.columns) for name, path in config.sts.files.items()}


def sts_headline(results: Mapping[str, Any]) -> dict[str, float]:
    """The correlation of each file."""
    return {name: scores["spearman"] for name, scores in results.items()}


def score_pairs(embed: Callable[[list[str]], Tensor], pairs: Sequence[Pair]) -> dict[str, float]:
    """Spearman's correlation of cosine and gold score, with its 95% interval (Bonett & Wright 2000).

    Args:
        embed: n texts -> (n, E), not necessarily of unit length; called once, with every different sentence.
        pairs: at least four.

    Returns:
        `{"spearman", "low", "high", "n"}`; 0 where all cosines are equal, which ranks nothing.
    """
    require("scipy")
    from scipy.stats import spearmanr

    firsts, seconds = [pair.first for pair in pairs], [pair.second for pair in pairs]
    rows = {text: row for row, text in enumerate(dict.fromkeys(firsts + seconds))}
    vectors = torch.nn.functional.normalize(embed(list(rows)).double(), dim=-1)
    first, second = (vectors[[rows[text] for text in texts]] for texts in (firsts, seconds))
    cosines = (first * second).sum(dim=-1)
    flat = float(cosines.max() - cosines.min()) < 1e-12
    correlation = 0.0 if flat else float(spearmanr(cosines.numpy(), [pair.score for pair in pairs])[0])  # type: ignore[arg-type]
    middle = math.atanh(max(min(correlation, 1 - 1e-12), 1e-12 - 1))
    half = 1.959964 * math.sqrt((1 + correlation**2 / 2) / (len(pairs) - 3))
    return {
        "spearman": correlation,
        "low": math.tanh(middle - half),
        "high": math.tanh(middle + half),
        "n": len(pairs),
    }


def read_pairs(path: Path, columns: Sequence[int | str]) -> list[Pair]:
    """The pairs of a table, see `StsConfig`.

    Raises:
        DataError: it cannot be read, naming the line.
    """
    if not path.is_file():
        raise DataError(f"eval.sts.files: there is no file {path}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        places = _places(path, columns, next(lines, []) if any(isinstance(c, str) for c in columns) else [])
        pairs = [_pair(path, lines.line_num, line, places) for line in lines if line]
    if len(pairs) < 4:
        raise DataError(f"{path}: {len(pairs)} pairs; a rank correlation needs four at least")
    return pairs


def _places(path: Path, columns: Sequence[int | str], header: list[str]) -> list[int]:
    for column in columns:
        if isinstance(column, str) and column not in header:
            raise DataError(f"{path}: no column {column!r} in the header {header}; set eval.sts.columns")
    return [header.index(column) if isinstance(column, str) else column for column in columns]


def _pair(path: Path, number: int, line: list[str], places: Sequence[int]) -> Pair:
    try:
        first, second, score = (line[place].strip() for place in places)
        pair = Pair(first, second, float(score))
    except (IndexError, ValueError) as error:
        raise DataError(
            f"{path}, line {number}: {error}; expected two sentences and a score in columns {list(places)}, found {line}"
        ) from None
    if not first or not second or not math.isfinite(pair.score):
        raise DataError(f"{path}, line {number}: a blank sentence, or a score that is not finite: {line}")
    return pair


def _embedder(context: EvalContext) -> str:
    for name, objective in context.objectives.items():
        if objective.kind == "similarity" and any(view.startswith(("text", "span")) for view in objective.views):
            return name
    raise ConfigError(
        f"suite sts needs an objective of kind similarity with a text view, such as pairs: [[image, text0]]; there are "
        f"{', '.join(context.objectives)}"
    )
