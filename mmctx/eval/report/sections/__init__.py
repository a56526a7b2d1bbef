"""How the page shows each suite: `SECTIONS[suite](results)` makes a section of one run's results, or None where there is
nothing to show.

A suite without an entry is shown as a table of its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmctx.eval.report.pieces import Section
from mmctx.eval.report.sections.caption import caption_section
from mmctx.eval.report.sections.embeddings import probe_section, sts_section, zero_shot_section
from mmctx.eval.report.sections.knowledge import knowledge_section
from mmctx.eval.report.sections.labels import classification_section, regression_section
from mmctx.eval.report.sections.loss_by_position import loss_by_position_section
from mmctx.eval.report.sections.masked_lm import masked_lm_section, next_sentence_section
from mmctx.eval.report.sections.memory_recall import memory_recall_section
from mmctx.eval.report.sections.needle import grid_section
from mmctx.eval.report.sections.plain import plain_section
from mmctx.eval.report.sections.recall import recall_section
from mmctx.eval.report.sections.retrieval import retrieval_section
from mmctx.eval.report.sections.robustness import robustness_section
from mmctx.eval.report.sections.swapped_media import swapped_media_section

SECTIONS: dict[str, Callable[[Mapping[str, Any]], Section | None]] = {
    "retrieval": retrieval_section,
    "zero_shot": zero_shot_section,
    "caption": caption_section,
    "masked_lm": masked_lm_section,
    "next_sentence": next_sentence_section,
    "classification": classification_section,
    "regression": regression_section,
    "swapped_media": swapped_media_section,
    "sts": sts_section,
    "probe": probe_section,
    "robustness": robustness_section,
    "loss_by_position": loss_by_position_section,
    "needle": grid_section(
        "needle", "Needles in a haystack", "Facts hidden in long documents, asked for at their end."
    ),
    "passkey": grid_section("passkey", "Passkey", "One number hidden in a long document, asked for at its end."),
    "world": grid_section("world", "A small world", "Questions about who is where and has what, after a long story."),
    "recall": recall_section,
    "memory_recall": memory_recall_section,
    "knowledge": knowledge_section,
}
"""In the order of the page."""

__all__ = ["SECTIONS", "plain_section"]
