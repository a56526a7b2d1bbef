"""Settings of the suites `caption`, `sts`, `probe` and `robustness`."""

from __future__ import annotations

from mmctx.config import StrictModel


class CaptionEvalConfig(StrictModel):
    """Suite `caption`."""

    references: tuple[int, ...] = ()
    """Texts of a source, by their number in its `texts`, that are right besides the one that the objective predicts: further captions of a
    picture. BLEU, ROUGE-L and CIDEr count them."""
