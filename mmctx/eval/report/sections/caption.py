"""Section of the suite `caption`: its scores; the texts themselves are shown as cards further down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmctx.eval.report.pieces import Cell, Note, Part, Row, Section, Table
from mmctx.eval.report.sections.cells import count_cell, number_cell, share_cell

_SHARES = {"cer": "character errors (CER)", "wer": "word errors (WER)", "exact": "exact", "rouge_l": "ROUGE-L"}
_SHARES |= {f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)}
_NUMBERS = {"cider": "CIDEr (0 to 10)", "n": "n"}


def caption_section(results: Mapping[str, Any]) -> Section | None:
    """A row for pictures and one for clips, of each captioning objective."""
    kinds = [name.removesuffix("_n") for name in results if name.endswith("_n")]
    if not kinds:
        return None
    labels = _SHARES | _NUMBERS
    metrics = [name for name in labels if any(f"{kind}_{name}" in results for kind in kinds)]
    rows = tuple(Row(kind, tuple(_cell(name, results.get(f"{kind}_{name}")) for name in metrics)) for kind in kinds)
    parts: list[Part] = [Table(name="scores", corner="of", columns=tuple(labels[name] for name in metrics), rows=rows)]
    if results.get("left_out"):
        parts.append(
            Note(name="left out", text="Left out: " + "; ".join(f"{k}, {v}" for k, v in results["left_out"].items()))
        )
    return Section(
        id="caption",
        title="Captions and transcripts",
        about="What the model writes for held-out media, against their own texts. CER and WER are edits per character and word: "
        "lower is better, and they may exceed 100%. Exact is the share of texts reproduced to the letter, case aside; of BLEU, "
        "ROUGE-L and CIDEr more is better.",
        parts=tuple(parts),
    )


def _cell(name: str, value: Any) -> Cell | None:
    return share_cell(value) if name in _SHARES else count_cell(value) if name == "n" else number_cell(value)
