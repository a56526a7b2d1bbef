"""Suite `robustness`: how much of what a model can do is left when pictures, sounds and texts get worse?

Retrieval and zero-shot classification of the suites of these names, as curves over severity: views are corrupted, one corruption at a
time, and look for their clean partners, or for their class. Severity 0 is what those suites find.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mmctx.datasets.assemble import RunData
from mmctx.eval.context import EvalContext
from mmctx.eval.corruptions import CORRUPTIONS, corrupt
from mmctx.eval.suites.retrieval import label, score_pair
from mmctx.eval.suites.zero_shot import score_classes
from mmctx.eval.views import View, embed_views
from mmctx.objectives.contrastive import matching_rows
from mmctx.pack import MODALITIES

CUTS = ("R@1", "R@10")


def evaluate_robustness(context: EvalContext) -> dict[str, Any]:
    """`{"severities": [0, 1, ...], "levels": {"image/noise": [...]}, "retrieval": {"image/noise": {"image_to_text": {"R@1": [...],
    "R@10": [...], "interval": {"R@1": [[low, high], ...], "R@10": ...}, "chance": {"R@1", "R@10"}, "n"}}}, "zero_shot": {"image/noise":
    {"image/OBJECTIVE": {"top1": [...], "low", "high", "chance", "n"}}}}`, a number for each severity.

    `levels` say how strong each corruption is from severity 1 on, see `CORRUPTIONS`. Retrieval is searched in by corrupted views, over all
    sources together; zero-shot classes are asked where `eval.zero_shot` names some. Empty where a model does neither.
    """
    config = context.config.robustness
    clean = {name: embed_views(context, name, "robustness") for name in context.names("similarity")}
    clean_classes = {medium: _zero_shot(context, context.data, medium) for medium in MODALITIES}
    retrieval: dict[str, Any] = {}
    zero_shot: dict[str, Any] = {}
    for name in config.corruptions:
        modality = name.partition("/")[0]
        ways = {way: [scores] for way, scores in _retrieval(context, clean, modality, None)}
        classes = {way: [scores] for way, scores in clean_classes.get(modality, {}).items()}
        for severity in config.severities if ways or classes else ():
            data = corrupt(context.data, name, severity)
            for way, scores in _retrieval(context, clean, modality, data):
                ways[way].append(scores)
            for way, scores in _zero_shot(context, data, modality).items():
                classes[way].append(scores)
        if ways:
            retrieval[name] = {way: _recall_curve(found) for way, found in ways.items()}
        if classes:
            zero_shot[name] = {way: _class_curve(found) for way, found in classes.items()}
    if not retrieval and not zero_shot:
        return {}
    levels = {
        name: [CORRUPTIONS[name][severity - 1] for severity in config.severities]
        for name in config.corruptions
        if name in retrieval or name in zero_shot
    }
    return {"severities": [0, *config.severities], "levels": levels, "retrieval": retrieval, "zero_shot": zero_shot}


def robustness_headline(results: Mapping[str, Any]) -> dict[str, float]:
    """R@1 and top 1 under each corruption: the mean over its severities, 0 left out."""
    found = {}
    for task, value in (("retrieval", "R@1"), ("zero_shot", "top1")):
        for name, ways in results.get(task, {}).items():
            found |= {
                f"{name}/{way}": float(np.mean(curve[value][1:])) for way, curve in ways.items() if curve[value][1:]
            }
    return found


def _retrieval(
    context: EvalContext, clean: Mapping[str, Mapping[str, View]], modality: str, data: RunData | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Views of a modality as queries among the clean ones that they are paired with, as in the suite `retrieval`; those of `data`, the same
    samples corrupted, or the clean ones themselves.
    """
    for number, (objective, views) in enumerate(clean.items()):
        pairs: Sequence[tuple[str, str]] = context.objectives[objective].pairs  # type: ignore[union-attr]
        ways = [
            (a, b) for pair in pairs for a, b in (pair, pair[::-1]) if a.startswith(modality) and {a, b} <= views.keys()
        ]
        if not ways:
            continue
        queries: Mapping[str, View] = views
        if data is not None:
            found = embed_views(context, objective, "robustness", data, modality)
            queries = {view: _with_contents(worse, views[view]) for view, worse in found.items() if view in views}
        for a, b in ways:
            if len(np.intersect1d(queries[a].samples, views[b].samples)):
                way = f"{label(a)}_to_{label(b)}"
                yield (f"{objective}/{way}" if number else way), score_pair(queries[a], views[b])


def _with_contents(worse: View, clean: View) -> View:
    """Corrupted views, which show the same thing where the clean ones do."""
    rows, places = matching_rows(worse.samples, clean.samples)
    return View(worse.take(rows).embeddings, worse.samples[rows], clean.contents[places])


def _zero_shot(context: EvalContext, data: RunData, modality: str) -> dict[str, Any]:
    """What the suite `zero_shot` finds on `data`; nothing without classes or samples that have one."""
    if context.config.zero_shot is None or modality not in MODALITIES:
        return {}
    found = score_classes(replace(context, data=data), "robustness", (modality,))
    return {way: scores for way, scores in found.items() if scores["n"]}


def _recall_curve(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        **{cut: [scores[cut] for scores in found] for cut in CUTS},
        "interval": {cut: [scores["interval"][cut] for scores in found] for cut in CUTS},
        "chance": {cut: found[0]["chance"][cut] for cut in CUTS},
        "n": found[0]["n"],
    }


def _class_curve(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    curves = {value: [scores[value] for scores in found] for value in ("top1", "low", "high")}
    return curves | {"chance": found[0]["chance"], "n": found[0]["n"]}
