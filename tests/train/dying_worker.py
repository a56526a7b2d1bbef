"""A rank that trains until something of no account breaks in its fifth step; the first rank goes on as long as it can."""

from __future__ import annotations

import os
import time

from torch.distributed.elastic.multiprocessing.errors import record

from mmctx.cli import main
from mmctx.train.optim import learning_rate, update


def break_down(step: int, *rest) -> float:
    """Stands before the optimizer's step."""
    if step == 4 and os.environ["RANK"] == "1":
        print("died at", time.time(), flush=True)
        raise RuntimeError("the cosmic ray of step 5")
    return learning_rate(step, *rest)


if __name__ == "__main__":
    update.learning_rate = break_down
    record(main)(["train"])
