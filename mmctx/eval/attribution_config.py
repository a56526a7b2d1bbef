"""Settings of the suite `attribution`."""

from __future__ import annotations

from pydantic import Field

from mmctx.config import StrictModel


class AttributionConfig(StrictModel):
    """On which parts of a document do answers rest?"""

    documents: int = Field(default=3, ge=0)
    """Held-out documents of each kind that are looked at: with a picture, with a clip, interleaved, text alone."""
    answer_tokens: int = Field(default=12, ge=1)
    """Longest answer: the model's own, in place of a document's last text."""
    longest: int = Field(default=2048, ge=2)
    """Tokens of a document at most: the gradient keeps all layers of it."""
    steps: int = Field(default=64, ge=1)
    """Places at which integrated gradients are taken: each costs a forward and a backward pass. `gap` in the results tells
    whether they are enough."""
