"""Suite `memory_recall`: is a fact recalled from 1, 2, 4 ... 32 windows back, with the memory and without?

Asks the same questions as `recall`, of held-out documents that `mmctx data build recall` made: needles and associative recall, pictures as
keys and, with `--picture-values`, as values. Here they are told apart by how far back the fact stands, in windows of the layers with a
memory: beyond as many windows as there are layers, a model without a memory cannot know. The memory is switched off in the same weights;
a model that was trained without one is a run of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmctx.eval.context import EvalContext, each
from mmctx.eval.documents import grouped, num_tokens
from mmctx.eval.suites.recall import Answer, Quiz, answer_quizzes, load_quizzes, score
from mmctx.layer_memory import LayerMemory, memory_off
from mmctx.transformer import TransformerConfig

Told = tuple[int, Answer]
"""How many windows back a fact stands (a power of two, 0 within the window), and how its question was answered."""


def evaluate_memory_recall(context: EvalContext) -> dict[str, Any]:
    """`{"window", "reach", "distances": {M: {"on": scores, "off": scores}}}`, M windows back up to 2 M, scores by kind as in `recall`.

    `reach` is how many tokens back a fact can come through windows alone, from layer to layer. A model without a memory has "off" alone.
    Nothing where no layer has a window, or no held-out document has questions.
    """
    trunk = context.model.config.transformer
    window = memory_window(trunk)
    if window is None:
        return {}
    quizzes = load_quizzes(context)
    groups = grouped(quizzes, num_tokens([quiz.document for quiz in quizzes]), context.data.config.bin_tokens)
    remembers = any(isinstance(module, LayerMemory) for module in context.model.modules())

    def answer(group: list[Quiz]) -> dict[str, list[Told]]:
        windows_back = [_windows_back(q.ask[1] - 1 - q.fact[1], window) for quiz in group for q in quiz.questions]

        def ask() -> list[Told]:
            return list(zip(windows_back, answer_quizzes(context, group), strict=True))

        found = {"on": ask()} if remembers else {}
        with memory_off(context.model):
            return found | {"off": ask()}

    found = context.map("memory_recall", groups, answer)
    if not found:
        return {}
    told = {mode: list(each([part[mode] for part in found])) for mode in found[0]}
    distances = sorted({back for back, _ in told["off"]})
    return {
        "window": window,
        "reach": _reach(trunk),
        "distances": {
            str(d): {mode: _by_kind([a for b, a in all_ if b == d]) for mode, all_ in told.items()} for d in distances
        },
    }


def memory_recall_headline(results: Mapping[str, Any]) -> dict[str, float]:
    """The share of exact answers at each distance, on and off."""
    return {
        f"{distance}x/{mode}": scores["all"]["exact"]
        for distance, modes in results.get("distances", {}).items()
        for mode, scores in modes.items()
    }


def memory_window(trunk: TransformerConfig) -> int | None:
    """The shortest window of the layers with a memory; of a trunk without one, the longest window. None where a layer sees everything."""
    if trunk.memory is not None:
        return min(trunk.layer_window(layer) or 0 for layer in trunk.memory.layers)
    windows = [trunk.layer_window(layer) for layer in range(trunk.depth)]
    return None if None in windows else max(window for window in windows if window is not None)


def _reach(trunk: TransformerConfig) -> int | None:
    """Tokens back that windows, one upon the other, let anything come from; None for all."""
    windows = [trunk.layer_window(layer) for layer in range(trunk.depth)]
    return None if None in windows else sum(window - 1 for window in windows if window is not None)


def _windows_back(distance: int, window: int) -> int:
    """The largest power of two of windows that are no more than `distance` tokens; 0 within the window."""
    return 1 << (distance // window).bit_length() - 1 if distance >= window else 0


def _by_kind(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    kinds = sorted({answer.kind for answer in answers})
    return {"all": score(answers)} | {kind: score([a for a in answers if a.kind == kind]) for kind in kinds}
