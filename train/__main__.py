"""`python -m mmctx.train CONFIG key=value ...`: the same as `mmctx train`, for `accelerate launch -m` and `torchrun -m`."""

import os

from mmctx.cli import main

if __name__ == "__main__":
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun: it shows the traceback of the rank that failed first
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)
    main(["train"])
