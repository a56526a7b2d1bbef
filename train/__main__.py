"""`python -m mmctx.train CONFIG key=value ...`: the same as `mmctx train`, for `accelerate launch -m` and `torchrun -m`."""

from mmctx.cli import main

if __name__ == "__main__":
    main(["train"])
