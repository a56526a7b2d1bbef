"""Sections of `gpu.py` about whole training steps: forward, backward and AdamW under bf16 autocast, as `mmctx train` runs them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_common import DEVICE, attempt, peak_flops, peak_gib, seconds

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_step

from mmctx.activations import ActivationsConfig
from mmctx.flops import estimate_work
from mmctx.model import MmctxModel, ModelConfig, count_parameters
from mmctx.objectives.base import next_token_labels
from mmctx.objectives.captioning import CaptioningConfig
from mmctx.pack import Document, PackedBatch, pack_documents
from mmctx.transformer import TransformerConfig

Emit = Callable[..., None]

BILLION = {"width": 2048, "depth": 16, "num_heads": 16, "mlp_width": 8192, "qk_norm": False}
TINY = {"width": 32, "depth": 2, "num_heads": 2, "mlp_width": 64, "qk_norm": False}
VOCAB = 32_768
TILE = 4096
"""Tokens of an MLP at a time, where memory is short."""

LIGHT = {"checkpoint": "none"}
MIDDLE = {"checkpoint": "selective", "mlp_tile": TILE}
FULL = {"checkpoint": "full", "mlp_tile": TILE}
OFFLOADED = {**FULL, "offload": True}


class Trainer:
    """A model of random weights, its optimizer, and steps over random tokens.

    Args:
        toy: a tiny model instead of 1B parameters.
        window: tokens that every layer sees; None for all.
    """

    def __init__(self, toy: bool, window: int | None = None) -> None:
        shape = TransformerConfig(**(TINY if toy else BILLION), windows=(window,))
        self.config = ModelConfig(transformer=shape)
        self.vocab = 128 if toy else VOCAB
        torch.manual_seed(0)
        with DEVICE:
            self.model = MmctxModel(self.config, {"captioning": CaptioningConfig()}, self.vocab).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def batch(self, lengths: Sequence[int]) -> PackedBatch:
        """Random documents."""
        rng = np.random.default_rng(0)
        texts = [rng.integers(0, self.vocab, length) for length in lengths]
        documents = [Document("captioning", ids, next_token_labels(ids, {}), causal=True) for ids in texts]
        return pack_documents(documents, placeholder_ids={}).to(DEVICE)

    def step(self, batch: PackedBatch) -> None:
        """Forward, backward, update."""
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = self.model(batch).losses["captioning"]
        (loss.total / loss.count).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def flops(self, lengths: Sequence[int]) -> int:
        """Model FLOPs of a step."""
        work = estimate_work(self.config, self.vocab)
        tokens = sum(lengths)
        attention = int(work.attention(np.array(lengths), causal=True).sum())
        return work.token * tokens + work.label * (tokens - len(lengths)) + attention

    def measure(
        self, lengths: Sequence[int], activations: dict[str, Any], repeats: int, warm_up: int = 1
    ) -> dict[str, Any]:
        """Speed and memory of steps over documents of these lengths."""
        self.model.set_activations(ActivationsConfig(**activations))
        self.model.set_compiler("inductor" if DEVICE.type == "cuda" else None)
        self.optimizer.zero_grad(set_to_none=True)  # of a step that failed
        batch = self.batch(lengths)
        peak_gib()
        taken = seconds(lambda: self.step(batch), repeats, warm_up)
        rate, peak = self.flops(lengths) / taken, peak_flops()
        return {
            "tokens_per_second": round(sum(lengths) / taken),
            "seconds": round(taken, 3),
            "model_tflops": round(rate / 1e12, 1),
            "mfu": None if peak is None else round(rate / peak, 3),
            "peak_gib": peak_gib(),
        }


def training(emit: Emit, toy: bool) -> None:
    """Bar G1: tokens a second at 8k, 32k and 128k in one document, by the lightest setting that fits and those that save more."""
    trainer = Trainer(toy)
    emit(case="model", parameters=count_parameters(trainer.model))
    plan = {8192: (LIGHT, FULL), 32_768: (LIGHT, MIDDLE, FULL), 131_072: (MIDDLE, FULL)}
    for length, settings in ({64: (LIGHT, MIDDLE, FULL)} if toy else plan).items():
        for activations in settings:
            case = f"{length} tokens, {activations['checkpoint']}"
            measure = partial(trainer.measure, [length], activations, 1 if length > 100_000 else 3)
            found = attempt(emit, case, measure)
            if found is not None and activations is not LIGHT:
                break  # the rest saves more and is slower


def longest(emit: Emit, toy: bool) -> None:
    """Bar G2, as far as minutes go: memory at full length, where windows spare attention's time but not its memory, and 256k in earnest."""
    trainer = Trainer(toy, window=16 if toy else 4096)
    plan = [(524_288, FULL), (1_048_576, OFFLOADED), (1_048_576, FULL)]
    for length, activations in [(128, FULL)] if toy else plan:
        case = f"{length} tokens, windows, {'offload' if 'offload' in activations else 'no offload'}"
        attempt(emit, case, partial(trainer.measure, [length], activations, 1, warm_up=0))
    del trainer
    trainer = Trainer(toy)
    length = 128 if toy else 262_144
    attempt(emit, f"{length} tokens, global", partial(trainer.measure, [length], MIDDLE, 1, warm_up=0))


def longest_global(emit: Emit, toy: bool) -> None:
    """Bar G2 in earnest: one step over one document in which every token sees all before it."""
    trainer = Trainer(toy)
    for length, activations in [(128, FULL)] if toy else [(524_288, FULL), (1_048_576, OFFLOADED)]:
        case = f"{length} tokens, global, {'offload' if 'offload' in activations else 'no offload'}"
        attempt(emit, case, partial(trainer.measure, [length], activations, 1, warm_up=0))


def packing(emit: Emit, toy: bool) -> None:
    """Uneven documents: Transformers padded and packed against ours, same weights, bf16 autocast."""
    shape = TransformerConfig(
        **(TINY if toy else {**BILLION, "width": 1024, "depth": 8, "num_heads": 8, "mlp_width": 3072})
    )
    lengths = np.clip(np.random.default_rng(0).lognormal(6.5, 0.9, 4 if toy else 32), 16, 64 if toy else 8192).astype(
        int
    )
    their_model = train_step.theirs(shape).to(DEVICE)
    our_model = train_step.ours(shape, their_model)
    texts = train_step.documents(lengths.tolist())
    losses = {
        "padded": train_step.padded(their_model, texts),
        "packed": train_step.packed(their_model, texts),
        "one by one": train_step.one_by_one(their_model, texts),
        "ours": train_step.our_loss(our_model, texts),
    }
    for name, loss in losses.items():
        model = our_model if name == "ours" else their_model
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)  # so that losses can be compared

        def step(loss=loss, optimizer=optimizer) -> float:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return value.item()

        def measure(step=step) -> dict[str, Any]:
            peak_gib()
            taken = seconds(step, 1 if toy else 3)
            rate = round(int(lengths.sum()) / taken)
            return {"tokens_per_second": rate, "loss": round(step(), 4), "peak_gib": peak_gib()}

        attempt(emit, name, measure)
