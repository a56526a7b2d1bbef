"""Settings of the suites `caption`, `sts`, `probe` and `robustness`."""

from __future__ import annotations

from pydantic import Field

from mmctx.config import StrictModel


class CaptionEvalConfig(StrictModel):
    """Suite `caption`."""

    references: tuple[int, ...] = ()
    """Texts of a source, by their number in its `texts`, that are right besides the one that the objective predicts: further captions of a
    picture. BLEU, ROUGE-L and CIDEr count them."""


class StsConfig(StrictModel):
    """Suite `sts`."""

    files: dict[str, str] = Field(default_factory=dict)
    """Named tables of sentence pairs with a score of how alike they are: CSV, or TSV by that ending."""
    columns: tuple[int | str, int | str, int | str] = (0, 1, 2)
    """Where both sentences and the score stand: numbers from 0, or names, which mean that the first line is a header."""
