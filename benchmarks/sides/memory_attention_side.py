"""One training step over one document in a process of its own: `memory_attention_side.py SETTINGS`, see `memory_attention.py`."""

from __future__ import annotations

import json
import sys
import time

import torch
from peak import peak_mib

from mmctx.activations import ActivationsConfig
from mmctx.flops import estimate_work
from mmctx.model import MmctxModel, ModelConfig
from mmctx.objectives import CaptioningConfig
from mmctx.pack import Document, pack_documents
from mmctx.transformer import TransformerConfig


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    trunk = TransformerConfig.model_validate(settings["trunk"])
    torch.manual_seed(0)
    model = MmctxModel(ModelConfig(transformer=trunk), {"text": CaptioningConfig()}, settings["vocab"])
    model.set_activations(ActivationsConfig(checkpoint="selective", mlp_tile=1024))
    tokens = settings["tokens"]
    ids = torch.randint(settings["vocab"], (tokens,)).numpy()
    batch = pack_documents([Document("text", ids, ids, causal=True)], {})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    seconds = {}

    def step() -> None:
        started = time.perf_counter(), time.process_time()
        loss = model.losses(batch)["text"].total / tokens
        loss.backward()
        seconds.update(clock=time.perf_counter() - started[0], processor=time.process_time() - started[1])

    peak = peak_mib(step)
    work = estimate_work(model.config, settings["vocab"])
    answer = {"peak_mib": round(peak, 1), "gflops": round(work.batch(batch) / 1e9, 1)}
    print(json.dumps(answer | {name: round(value, 2) for name, value in seconds.items()}))


if __name__ == "__main__":
    main()
