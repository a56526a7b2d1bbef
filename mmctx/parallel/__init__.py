"""Sequence parallel: one packed batch over several ranks, cut by tokens outside attention and by heads inside it.

After DeepSpeed-Ulysses (Jacobs et al. 2023). `mesh` says who works with whom, `shard` cuts a batch, `exchange` moves rows between ranks,
`ulysses` wraps attention. This file imports none of them: `mmctx.pack` needs `exchange` alone.
"""
