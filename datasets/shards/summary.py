"""What indexed shards hold, in a few numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmctx.datasets.shards.measure import MEDIA_KINDS
from mmctx.datasets.shards.sidecar import ShardIndex


def summarise(shards: Sequence[ShardIndex]) -> dict[str, Any]:
    """Counts over indexed shards: samples, media, hours of sound, text tokens, and problems by reason."""
    reasons: Counter[str] = Counter()
    media: Counter[str] = Counter()
    tokens, hours = 0, 0.0
    for shard in shards:
        rows = shard.media
        reasons.update(problem.reason for problem in shard.problems())
        media.update({kind: int((rows["kind"] == code).sum()) for code, kind in enumerate(MEDIA_KINDS)})
        clips = rows[rows["kind"] == MEDIA_KINDS.index("audio")]
        hours += float((clips["a"] / clips["b"]).sum()) / 3600
        if shard.tokens is not None:
            tokens += int(np.maximum(shard.tokens, 0).sum(dtype=np.int64))
    num_samples = sum(shard.num_samples for shard in shards)
    return {
        "shards": len(shards),
        "samples": num_samples,
        "usable": num_samples - reasons.total(),
        "pictures": media["image"],
        "clips": media["audio"],
        "hours of sound": hours,
        "text tokens": tokens,
        "problems": dict(reasons),
    }
