"""What suite `loss_by_position` reads."""

from __future__ import annotations

from pydantic import Field

from mmctx.config import StrictModel


class LossByPositionConfig(StrictModel):
    """Suite `loss_by_position`."""

    documents: int = Field(default=64, ge=1)
    """The longest held-out documents, so many, are read with less of their context and with it shuffled."""
    targets: int = Field(default=64, ge=1)
    """What is scored there: so many predictions at the end of each."""
    kept: tuple[int, ...] = (16, 64, 256, 1024, 4096, 16384)
    """Tokens in front of them that stay as they are; documents that have no more are left out of that point."""
