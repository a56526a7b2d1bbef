"""`python -m mmctx.cli` is `mmctx`."""

from mmctx.cli import main

main()
