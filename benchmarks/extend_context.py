"""A finished run is lengthened from 2,048 to 8,192 tokens by one more stage, with YaRN: what it loses and what it gains (promise 4).

    python benchmarks/extend_context.py [--json] [--quick]

Trains a small model on Python's standard library, real documents of up to 100,000 tokens that every machine has, at a context of 2,048.
Then the same run goes on with one more stage in its `schedule`, at 8,192. Before and after, the loss of held-out files is taken by
position, over documents of 8,192 tokens. It should stay within 2% where the model could read before, and fall beyond. About six minutes.
"""

from __future__ import annotations

import sysconfig
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import machine, parse, report, versions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmctx import api
from mmctx.config import build_config
from mmctx.datasets.build.text import build_text
from mmctx.datasets.build.writer import BuildOptions
from mmctx.datasets.planning.plan import plan_once
from mmctx.model import MmctxModel
from mmctx.pack import IGNORE_INDEX, PackedBatch
from mmctx.train.config import RunConfig
from mmctx.train.loop import train

DOCUMENTS = 24
BARS = {"kept": 1.02, "beyond": 1.0}
"""Loss after over loss before: at positions that the model could read, and beyond them."""


def write_texts(folder: Path, quick: bool) -> None:
    """Shards of the long files of the standard library, a tenth of them held out, and a tokenizer of 2,048 pieces."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in library.rglob("*.py") if p.stat().st_size > 30_000 and "site-packages" not in p.parts)
    files = [path for path in files if "test" not in path.parts][: 12 if quick else None]
    build_text(files, folder / "texts", options=BuildOptions(heldout=0.5 if quick else 0.1))
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    pieces.train([str(path) for path in files[::4]], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<|endoftext|>")
    fast.save_pretrained(str(folder / "tokenizer"))


def run_config(folder: Path, schedule: list[dict[str, Any]], short: int, width: int) -> RunConfig:
    """The run, whatever its stages."""
    texts = {"objectives": ["captioning"], "long_documents": "split"}
    tree = {
        "run": {"name": "extended", "dir": str(folder / "runs")},
        "data": {
            "tokenizer": str(folder / "tokenizer"),
            "context_length": short,
            "bin_tokens": 4 * short,
            "sources": {"library": texts | {"shards": str(folder / "texts/train/*.tar")}},
        },
        "model": {"transformer": {"width": width, "depth": 4, "num_heads": width // 64, "mlp_width": 3 * width}},
        "objectives": {"captioning": {"kind": "captioning"}},
        "train": {"optimizer": {"lr": 2e-3}, "schedule": {"warmup_steps": 20}, "log_every": 20},
        "schedule": schedule,
        "eval": {"sources": {"library": texts | {"shards": str(folder / "texts/heldout/*.tar")}}, "suites": ["loss"]},
    }
    return build_config(RunConfig, tree, "extend_context")


@torch.no_grad()
def losses_by_position(model: MmctxModel, batches: list[PackedBatch], edges: list[int]) -> list[float]:
    """Mean loss of the labelled positions of documents between every two edges."""
    totals, counts = torch.zeros(len(edges) - 1), torch.zeros(len(edges) - 1)
    for batch in batches:
        hidden = model.encode(batch)
        for rows in torch.arange(batch.num_tokens).split(1024):  # never all logits at once
            logits = model.next_token_logits(hidden[rows])
            losses = F.cross_entropy(logits, batch.labels[rows], reduction="none", ignore_index=IGNORE_INDEX)
            stretch = torch.bucketize(batch.position_ids[rows], torch.tensor(edges[1:]), right=True)
            labelled = (batch.labels[rows] != IGNORE_INDEX) & (stretch < len(totals))
            totals.index_add_(0, stretch[labelled], losses[labelled])
            counts.index_add_(0, stretch[labelled], torch.ones(int(labelled.sum())))
    return (totals / counts).tolist()


def held_out(config: RunConfig, long: int) -> list[PackedBatch]:
    """Held-out stretches of about `long` tokens."""
    data = config.data.model_copy(update={"context_length": long, "bin_tokens": long})
    opened = api.build_dataset(config.model_copy(update={"data": data}), held_out=True)
    bins = [bin for bin in plan_once(list(opened.tables.values()), long) if bin.tokens > 0.9 * long]
    return [opened.dataset[bin] for bin in bins[:DOCUMENTS]]


def main() -> None:
    arguments = parse(__doc__, repeats=1)
    short, long, first, more, width = (64, 256, 4, 2, 64) if arguments.quick else (2048, 8192, 160, 40, 128)
    rope = {"scaling": "yarn", "factor": long / short, "original_context": short}
    stages = [{"steps": first}, {"steps": more, "context_length": long, "rope": rope}]
    edges = [0, short // 2, short, 2 * short, long]
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder, arguments.quick)
        for when, count in (("before", 1), ("after", 2)):
            config = run_config(folder, stages[:count], short, width)
            run_dir = train(config).run_dir
            found[when] = losses_by_position(api.load_model(run_dir)[0], held_out(config, long), edges)
    change = [round(after / before, 4) for before, after in zip(found["before"], found["after"], strict=True)]
    spans = [f"{start}..{stop - 1}" for start, stop in pairwise(edges)]
    result = {
        "positions": spans,
        "loss": found,
        "after_over_before": change,
        "bars": BARS,
        "machine": machine(),
        "versions": versions("torch", "mmctx"),
    }
    lines = ["positions          before    after    ratio"]
    rows = zip(spans, found["before"], found["after"], change, strict=True)
    lines += [f"{span:<16} {before:8.4f} {after:8.4f} {ratio:8.4f}" for span, before, after, ratio in rows]
    report(result, [*lines, f"bars: {BARS['kept']} below {short}, {BARS['beyond']} from there"], arguments.json)


if __name__ == "__main__":
    main()
