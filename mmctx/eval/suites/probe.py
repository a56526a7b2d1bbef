"""Suite `probe`: how much of a sample's class do the frozen embeddings of its picture, sound or text hold?

Three readings of each view: `input`, the mean of what goes into the trunk (of a picture, its encoder's output; of a text, its words'
embeddings), `trunk`, the mean of what comes out, and `embedding`, that of the similarity objective that embeds the view, if there is one.
On each, a linear classifier is fitted (Alain & Bengio 2016) and nearest neighbours are asked (Wu et al. 2018): on training samples, and
measured on held-out ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mmctx.datasets.assemble import RunData, build_data
from mmctx.datasets.config import SourceConfig
from mmctx.datasets.planning.order import derive_key, permute
from mmctx.datasets.shards.contents import parse_json
from mmctx.errors import ConfigError, DataError, SampleError
from mmctx.eval.classifiers import classify
from mmctx.eval.config import EvalConfig
from mmctx.eval.context import EvalContext, each
from mmctx.eval.documents import grouped, num_tokens
from mmctx.eval.packages import require
from mmctx.objectives.base import lay_out, text_of
from mmctx.pack import IGNORE_INDEX, MODALITIES, Document, MediaItem, pack_documents
from mmctx.sample import Sample

CHUNK = 64
"""Samples that a rank takes at a time."""


class Features(NamedTuple):
    """One view of one sample.

    Attributes:
        view: such as `image`.
        key: source and key of the sample.
        label: its class.
        readings: (F,) float32 each: `input`, `trunk`, and `embedding` where there is one.
    """

    view: str
    key: str
    label: str
    readings: dict[str, np.ndarray]


def evaluate_probe(context: EvalContext) -> dict[str, Any]:
    """`{VIEW: {"input": {"linear": {"accuracy", "low", "high", "C"}, "1-NN": ..., "5-NN": ..., "20-NN": ...}, "trunk": ..., "embedding":
    ..., "label", "classes", "n_train", "n", "unseen", "chance", "majority"}}`, accuracies on `n` held-out samples, see `classify`.

    `chance` is what guessing among the classes of training reaches, `majority` always naming the commonest of them. `unseen` held-out
    samples have a class that no training sample has, and are never right.

    Raises:
        ConfigError: `eval.probe.labels` is empty, or `eval.probe.train` names no source of the run.
        DataError: a view has no samples to fit on or to classify.
    """
    labels = _labels(context.config)
    train_data = _train_data(context)
    train = _features(context, train_data, _draw(context, train_data))
    test = _features(context, context.data, _all_places(context.data))
    parts = {
        view: ([one for one in train if one.view == view], [one for one in test if one.view == view]) for view in labels
    }
    for view, (fit, asked) in parts.items():
        if len({one.label for one in fit}) < 2 or not asked:
            raise DataError(
                f"suite probe, {view}: {len(fit)} training samples of {len({one.label for one in fit})} classes at {labels[view]!r}, and "
                f"{len(asked)} held-out ones; it needs two classes and a sample to classify: see eval.probe.labels and eval.probe.train"
            )
    jobs = [(view, reading) for view, (fit, _) in parts.items() for reading in fit[0].readings]
    scores = context.map("probe", jobs, lambda job: _score(context, *parts[job[0]], job[1]))
    results: dict[str, dict[str, Any]] = {view: {} for view in labels}
    for (view, reading), found in zip(jobs, scores, strict=True):
        results[view][reading] = found
    return {view: found | {"label": labels[view]} | _counts(*parts[view]) for view, found in results.items()}


def probe_headline(results: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy of the linear probe on each reading of each view."""
    return {
        f"{view}/{reading}": scores["linear"]["accuracy"]
        for view, found in results.items()
        for reading, scores in found.items()
        if isinstance(scores, Mapping)
    }


def check_probe(config: EvalConfig) -> None:
    """Raises ConfigError if no labels are named or scikit-learn is not installed."""
    require("sklearn")
    _labels(config)


def read_label(entry: str, members: Mapping[str, bytes]) -> str | None:
    """The class at `entry`, a member's extension or `json:dotted.path`: a text, number or truth value, as text; None where there is none.

    Raises:
        SampleError: the json member cannot be read.
    """
    if not entry.startswith("json:"):
        return members[entry].decode("utf-8", "replace").strip() if entry in members else None
    node = parse_json(members)
    for part in entry.removeprefix("json:").split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return str(node).strip() if isinstance(node, str | int | float) else None


def _labels(config: EvalConfig) -> dict[str, str]:
    if not config.probe.labels:
        raise ConfigError('suite probe needs eval.probe.labels, for example eval.probe.labels={image: "json:class"}')
    return config.probe.labels


def _score(context: EvalContext, train: Sequence[Features], test: Sequence[Features], reading: str) -> dict[str, Any]:
    names = {label: number for number, label in enumerate(sorted({one.label for one in train}))}
    fit, asked = (np.stack([one.readings[reading] for one in part]).astype(np.float64) for part in (train, test))
    order = np.array([derive_key(context.data.dataset.seed, "probe", one.key) for one in train], dtype=np.uint64)
    labels, wanted = (np.array([names.get(one.label, -1) for one in part]) for part in (train, test))
    config = context.config.probe
    return classify(fit, labels, asked, wanted, config.neighbours, config.inverse_penalties, order)


def _counts(train: Sequence[Features], test: Sequence[Features]) -> dict[str, Any]:
    known = Counter(one.label for one in train)
    commonest = min(known, key=lambda label: (-known[label], label))
    return {
        "classes": len(known),
        "n_train": len(train),
        "n": len(test),
        "unseen": sum(one.label not in known for one in test),
        "chance": 1 / len(known),
        "majority": sum(one.label == commonest for one in test) / len(test),
    }


def _train_data(context: EvalContext) -> RunData:
    """The samples to fit on, as they are; one rank indexes them where that was not done yet."""
    wanted, known = context.config.probe.train, context.data.config.sources
    if isinstance(wanted, str) and wanted not in known:
        raise ConfigError(f"eval.probe.train: the run has no training source {wanted!r}; there are {', '.join(known)}")
    chosen = {"probe": wanted} if isinstance(wanted, SourceConfig) else {wanted: known[wanted]} if wanted else known
    sources = {name: source.model_copy(update={"augment": None}) for name, source in chosen.items()}

    def build() -> RunData:
        seed = context.data.dataset.seed
        return build_data(context.data.config, sources, context.model.config, context.objectives, seed)

    first = build() if context.ranks.rank == 0 else None
    context.ranks.gather(None)  # nobody goes on before the first rank is done
    return first or build()


def _all_places(data: RunData) -> list[tuple[int, int]]:
    """(source number, sample id) of every sample that can be used."""
    tables = data.dataset.tables
    ids = [np.arange(table.num_samples) for table in tables]
    return [(n, i) for n, table in enumerate(tables) for i in ids[n][table.source.flags(ids[n]) == 0].tolist()]


def _draw(context: EvalContext, data: RunData) -> list[tuple[int, int]]:
    """As `_all_places`, of no more than `eval.probe.samples` samples."""
    ends = np.cumsum([table.num_samples for table in data.dataset.tables])
    size, key = int(ends[-1]), derive_key(context.data.dataset.seed, "probe", "train")
    drawn = np.sort(permute(np.arange(min(size, context.config.probe.samples)), size, key))
    owners = np.searchsorted(ends, drawn, side="right")
    found: list[tuple[int, int]] = []
    for number, table in enumerate(data.dataset.tables):
        ids = drawn[owners == number] - (ends[number] - table.num_samples)
        found += [(number, i) for i in ids[table.source.flags(ids) == 0].tolist()]
    return found


def _features(context: EvalContext, data: RunData, places: Sequence[tuple[int, int]]) -> list[Features]:
    """Of every view that has a label, in the order of places."""
    chunks = [places[start : start + CHUNK] for start in range(0, len(places), CHUNK)]
    return list(each(context.map("probe", chunks, lambda chunk: list(_of_chunk(context, data, chunk)))))


def _of_chunk(context: EvalContext, data: RunData, chunk: Sequence[tuple[int, int]]) -> Iterator[Features]:
    samples = [found for place in chunk if (found := _labelled(context, data, *place)) is not None]
    for view in context.config.probe.labels:
        made = [
            (f"{sample.source}/{sample.key}", labels[view], document)
            for sample, labels in samples
            if view in labels and (document := _document(context, data, sample, view)) is not None
        ]
        lengths = num_tokens([document for *_, document in made])
        for group in grouped(made, lengths, data.config.bin_tokens):
            readings = _readings(context, [document for *_, document in group])
            for (key, label, _), found in zip(group, readings, strict=True):
                yield Features(view, key, label, found)


def _labelled(context: EvalContext, data: RunData, number: int, sample_id: int) -> tuple[Sample, dict[str, str]] | None:
    """A sample with the labels of its views; None where it has none, or cannot be used."""
    try:
        members = data.dataset.tables[number].source.read(sample_id).members
        found = {view: read_label(entry, members) for view, entry in context.config.probe.labels.items()}
        labels = {view: label for view, label in found.items() if label}
        return (data.dataset.sample(number, sample_id), labels) if labels else None
    except SampleError as error:
        data.dataset.note(number, sample_id, error)
        return None


def _document(context: EvalContext, data: RunData, sample: Sample, view: str) -> Document | None:
    """A document of one view and nothing else, as a similarity objective makes it; where none does, the view alone, which attends in both
    directions if some objective's documents do. A text is cut to the context, a medium that does not fit into it is left out.
    """
    begin = data.tokenizer.begin
    part = _part(sample, view, data.config.context_length - len(begin) - 1)
    if part is None:
        return None
    embedder = _embedder(context, view)
    if embedder is not None:
        return data.dataset.objectives[embedder].view_document(sample, view, part)  # type: ignore[attr-defined]
    input_ids, media = lay_out([begin, part], data.tokenizer.placeholder_ids)
    causal = all(half.causal for half in data.dataset.objectives.values())
    labels = np.full_like(input_ids, IGNORE_INDEX)
    return Document("probe", input_ids, labels, causal=causal, media=media, view=view, key=sample.key)


def _part(sample: Sample, view: str, room: int) -> np.ndarray | MediaItem | None:
    if view not in MODALITIES:
        text = text_of(sample, int(view.removeprefix("text")))
        return None if text is None else text[:room]
    item: MediaItem | None = getattr(sample, view)
    return item if item is not None and item.num_tokens <= room else None


def _embedder(context: EvalContext, view: str) -> str | None:
    """The first similarity objective that embeds a view."""
    embedders = (name for name, one in context.objectives.items() if one.kind == "similarity" and view in one.views)
    return next(embedders, None)


def _readings(context: EvalContext, documents: Sequence[Document]) -> Iterator[dict[str, np.ndarray]]:
    """Of each document of one view; an embedding token behind it does not count into the means."""
    batch = pack_documents(documents, context.data.tokenizer.placeholder_ids).to(context.device)
    inputs = context.model.embed(batch)  # (T, D)
    states = context.model.read(inputs, batch)
    found: dict[str, list[np.ndarray]] = {}
    for reading, values in {"input": inputs, "trunk": states}.items():
        parts = values.float().split(num_tokens(documents))
        own = [document.pooled or len(document.input_ids) for document in documents]
        found[reading] = [part[:n].mean(dim=0).cpu().numpy() for part, n in zip(parts, own, strict=True)]
    for name, positions in batch.pooled.items():
        head: Any = context.model.objectives[documents[0].objective]
        embedded: torch.Tensor = head.embed(states, positions, batch.pool_sizes[name])
        found["embedding"] = list(embedded.float().cpu().numpy())
    for number in range(len(documents)):
        yield {reading: values[number] for reading, values in found.items()}
