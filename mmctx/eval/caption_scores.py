"""Scores of generated texts against references: word overlap by pycocoevalcap, edits by jiwer."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mmctx.eval.packages import require

FEWEST_FOR_CIDER = 50
"""CIDEr weighs words by how rare they are among the references: of fewer captions than this it says little."""

_BY_CHARACTER = r"\u2e80-\u2fff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = rf"[^\W_{_BY_CHARACTER}]+"
_ENDING = r"n't|'(?:s|re|ve|ll|d|m)"
_SPLIT = re.compile(rf"(?<=[^\W_])({_ENDING})(?![^\W_])|(?<=\bcan)(not)\b")
_TOKEN = re.compile(
    rf"[{_BY_CHARACTER}]|(?:{_ENDING})(?![^\W_])|{_WORD}(?:(?:[-.&/'@]|(?<=\d)[,:](?=\d)){_WORD})*|[#$%&()\[\]{{}}+=*@]"
)


def caption_tokens(text: str) -> list[str]:
    """Lower-cased words as the Penn Treebank has them ("isn't" is "is", "n't"), punctuation left out; Chinese and Japanese by characters.

    What pycocoevalcap's own tokenizer makes of captions, without its Java; abbreviations lose their last dot.
    """
    return _TOKEN.findall(_SPLIT.sub(r" \1\2", text.lower().replace("’", "'")))


def overlap_scores(
    references: Sequence[Sequence[str]], predictions: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """BLEU of 1 to 4 words (Papineni et al. 2002), ROUGE-L (Lin 2004) and CIDEr-D (Vedantam et al. 2015) of n texts.

    Args:
        references: one or more for each prediction.
        predictions: n.

    Returns:
        `bleu_1` to `bleu_4` and `rouge_l` in 0..1, `cider` in 0..10; and what was left out, with the reason.

    Raises:
        ConfigError: pycocoevalcap is not installed.
    """
    require("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    wanted = {n: [" ".join(caption_tokens(text)) for text in texts] for n, texts in enumerate(references)}
    found = {n: [" ".join(caption_tokens(text))] for n, text in enumerate(predictions)}
    bleu, _ = Bleu().compute_score(wanted, found, verbose=0)
    scores = {f"bleu_{n}": float(value) for n, value in enumerate(bleu, start=1)}
    scores["rouge_l"] = float(Rouge().compute_score(wanted, found)[0])
    if len(predictions) < FEWEST_FOR_CIDER:
        return scores, {
            "cider": f"{len(predictions)} captions; CIDEr needs {FEWEST_FOR_CIDER} to know which words are rare"
        }
    return scores | {"cider": float(Cider().compute_score(wanted, found)[0])}, {}


def error_rates(references: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Character and word error rate (edits over reference length, all texts together), and the share of exact matches, of lower-cased
    texts.
    """
    require("jiwer")
    import jiwer

    references, predictions = (
        [" ".join(text.lower().split()) for text in texts] for texts in (references, predictions)
    )
    return {
        "cer": float(jiwer.cer(references, predictions)),
        "wer": float(jiwer.wer(references, predictions)),
        "exact": float(np.mean([r == p for r, p in zip(references, predictions, strict=True)])),
        "n": len(references),
    }
