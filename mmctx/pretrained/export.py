"""A model's trunk as a folder that Transformers loads, compared with the model before anyone else loads it.

Shapes: L tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmctx.layout import DocumentLayout
from mmctx.model import MmctxModel
from mmctx.pretrained.shape import FAMILIES
from mmctx.pretrained.trunk import export_trunk
from mmctx.tokenizer import TextTokenizer

_TOKENS = 64


def export(
    model: MmctxModel, tokenizer: TextTokenizer, folder: Path, to: str, *, context_length: int
) -> dict[str, Any]:
    """Writes trunk and tokenizer, loads the folder with Transformers and compares the logits of a random text.

    Args:
        model: in evaluation mode, on the CPU.
        tokenizer: written beside the weights.
        folder: made if it is missing.
        to: one of `FAMILIES`.
        context_length: longest document that the model was trained on.

    Returns:
        `folder`, `class` (of Transformers), `parameters`, `left_out` (modules that the folder has no room for),
        `largest_logit` and `largest_difference` of the logits.

    Raises:
        ConfigError: see `export_trunk`.
    """
    export_trunk(model, folder, to, context_length=context_length, eos_token_id=tokenizer.eos_id)
    tokenizer.save(folder)
    theirs = _load(folder, to)
    return {
        "folder": str(folder),
        "class": type(theirs).__name__,
        "parameters": theirs.num_parameters(),
        "left_out": [f"encoders.{kind}" for kind in model.encoders]
        + [f"objectives.{name}" for name, half in model.objectives.items() if any(True for _ in half.parameters())],
    } | _compare(model, theirs, causal=to != "bert")


def _load(folder: Path, to: str) -> Any:
    import transformers

    return getattr(transformers, FAMILIES[to].auto).from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def _compare(model: MmctxModel, theirs: Any, causal: bool) -> dict[str, float]:
    """Logits (L, V) of both, on ids drawn evenly."""
    length = min(_TOKENS, model.config.transformer.learned_positions or _TOKENS)
    ids = torch.randint(0, model.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    layout = DocumentLayout.from_lengths([length], int(causal))
    ours = model.next_token_logits(model.trunk(model.embedding(ids), torch.arange(length), layout))
    difference = ours - theirs(input_ids=ids[None]).logits[0]
    return {"largest_logit": float(ours.abs().max()), "largest_difference": float(difference.abs().max())}
