"""Sequence parallel (bar C9): a packed multimodal step on two ranks against the same step in one process.

    python benchmarks/sequence_parallel.py [--json] [--quick] [--repeats 5]

Two gloo processes take turns: the first computes the whole bin alone, then both compute it together. Losses and gradients must be equal
(asserted) before anything is timed. Peers cannot take part: PyTorch's context parallel has no CPU path, accelerate's forbids packing and
its sequence parallel needs DeepSpeed.

"Kept" is what autograd holds for the backward pass at the end of the forward pass, without parameters: counted, not measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common import interleaved, machine, parse, ratios, report, versions
from torch import Tensor

from mmctx.encoders.image import ImageEncoderConfig
from mmctx.encoders.log_mel import AudioEncoderConfig
from mmctx.model import MmctxModel, ModelConfig
from mmctx.objectives.base import lay_out, next_token_labels
from mmctx.objectives.captioning import CaptioningConfig
from mmctx.objectives.masked_lm import MaskedLMConfig
from mmctx.objectives.similarity import SimilarityConfig
from mmctx.pack import IGNORE_INDEX, Document, MediaItem, PackedBatch, pack_documents
from mmctx.parallel.mesh import Mesh, build_mesh
from mmctx.transformer import TransformerConfig

MIB = 1 << 20
VOCAB = 8192
PLACEHOLDERS = {"image": VOCAB - 1, "audio": VOCAB - 2}
OBJECTIVES = {
    "captioning": CaptioningConfig(),
    "masked_lm": MaskedLMConfig(),
    "similarity": SimilarityConfig(pairs=(("image", "text0"),)),
}


def build(quick: bool) -> MmctxModel:
    """Two key heads for eight query heads, every other layer local, a small ViT and a small sound encoder."""
    width = 64 if quick else 256
    trunk = TransformerConfig(
        width=width,
        depth=2 if quick else 6,
        num_heads=8,
        num_kv_heads=2,
        mlp_width=3 * width,
        windows=(None, 256),
    )
    tower = {"patch_size": 16, "embed_dim": width // 2, "depth": 2, "num_heads": 2}
    image = ImageEncoderConfig(name="vit_tiny_patch16_224", image_size=64, options=tower)
    audio = AudioEncoderConfig(width=width // 2, depth=2, num_heads=2)
    torch.manual_seed(0)
    return MmctxModel(ModelConfig(transformer=trunk, image=image, audio=audio), OBJECTIVES, VOCAB)


def make_batch(model: MmctxModel, tokens: int) -> PackedBatch:
    """A bin of one long interleaved document (half of it), captions, masked texts and pairs of views."""
    rng = np.random.default_rng(0)
    geometry: Any = model.encoders["image"].geometry  # type: ignore[union-attr]
    sound: Any = model.encoders["audio"].config  # type: ignore[union-attr]

    def picture() -> MediaItem:
        size = geometry.image_size
        return MediaItem(
            "image", torch.from_numpy(rng.integers(0, 256, (3, size, size), np.uint8)), geometry.num_tokens
        )

    def clip(frames: int) -> MediaItem:
        values = torch.from_numpy(rng.standard_normal((frames, sound.num_mels), np.float32))
        return MediaItem("audio", values, -(-frames // sound.frames_per_token))

    def text(count: int) -> np.ndarray:
        return rng.integers(0, VOCAB - 2, count)

    def causal(*segments: np.ndarray | MediaItem) -> Document:
        ids, media = lay_out(segments, PLACEHOLDERS)
        return Document("captioning", ids, next_token_labels(ids, PLACEHOLDERS), causal=True, media=media)

    def masked(*segments: np.ndarray | MediaItem) -> Document:
        ids, media = lay_out(segments, PLACEHOLDERS)
        hidden = (rng.random(len(ids)) < 0.15) & ~np.isin(ids, list(PLACEHOLDERS.values()))
        return Document("masked_lm", ids, np.where(hidden, ids, IGNORE_INDEX), causal=False, media=media)

    def view(name: str, pair: int, *segments: np.ndarray | MediaItem) -> Document:
        ids, media = lay_out(segments, PLACEHOLDERS)
        labels = np.full_like(ids, IGNORE_INDEX)
        return Document("similarity", ids, labels, causal=False, media=media, pooled=len(ids) - 1, view=name, pair=pair)

    book: list[np.ndarray | MediaItem] = []
    while sum(s.num_tokens if isinstance(s, MediaItem) else len(s) for s in book) < tokens // 2:
        book += [text(60), picture(), text(30), clip(160)]
    documents, pair = [causal(*book)], 0
    while sum(len(d.input_ids) for d in documents) < tokens:
        shown, caption = picture(), text(20)
        documents += [causal(shown, caption), causal(clip(100), caption), masked(shown, text(90))]
        documents += [view("image", pair, shown, text(1)), view("text0", pair, caption)]
        pair += 1
    return pack_documents(documents, PLACEHOLDERS)


def forward_and_backward(
    model: MmctxModel, batch: PackedBatch, counts: dict[str, int], mesh: Mesh
) -> tuple[Tensor, int]:
    """This rank's share of the loss, and bytes kept for the backward pass."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model.losses(mesh.shard(batch))
    loss = torch.stack([loss.total / counts[name] for name, loss in losses.items()]).sum()
    held = sum(kept.values())
    loss.backward()
    return loss.detach(), held


def assert_equal(model: MmctxModel, step: Callable[[Mesh], tuple[Tensor, int]], together: Mesh) -> dict[str, Any]:
    """The step alone and together: largest relative errors of loss and gradients, and bytes kept by either on this rank."""

    def run(mesh: Mesh) -> tuple[int, dict[str, Tensor]]:
        loss, kept = step(mesh)
        return kept, {
            "loss": loss,
            **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        }

    kept_alone, want = run(Mesh())
    kept, found = run(together)
    for tensor in found.values():
        dist.all_reduce(tensor)
    errors = {name: float((found[name] - g).abs().max() / g.abs().max().clamp(min=1e-3)) for name, g in want.items()}
    loss_error = errors.pop("loss")
    assert loss_error < 1e-6, loss_error
    assert max(errors.values()) < 1e-5, errors
    return {"loss_error": loss_error, "gradient_error": max(errors.values()), "alone": kept_alone, "together": kept}


def worker(out: Path, quick: bool, repeats: int) -> None:
    """One of the two ranks; the first writes the result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    alone, together = Mesh(), build_mesh("cpu", rank, 2, 2)
    model = build(quick)
    batch = make_batch(model, 1024 if quick else 8192)
    counts = {name: head.count(batch) for name, head in model.objectives.items()}  # type: ignore[operator]

    def step(mesh: Mesh) -> tuple[Tensor, int]:
        return forward_and_backward(model, batch, counts, mesh)

    def side(mesh: Mesh, threads: int) -> Callable[[], float]:
        def run() -> float:
            dist.barrier()
            torch.set_num_threads(threads)
            started = time.perf_counter()
            if mesh is together or rank == 0:
                step(mesh)
            torch.set_num_threads(1)
            dist.barrier()
            return time.perf_counter() - started

        return run

    equal = assert_equal(model, step, together)
    sides = {
        "one process, one thread": side(alone, 1),
        "one process, two threads": side(alone, 2),
        "two ranks, one thread each": side(together, 1),
    }
    seconds = interleaved(sides, repeats)
    ranks: list[Any] = [None, None]
    dist.all_gather_object(ranks, equal["together"])
    if rank == 0:
        result = {
            "tokens": batch.num_tokens,
            "documents": len(batch.layout.lengths),
            "longest": batch.layout.max_seqlen,
            **{name: equal[name] for name in ("loss_error", "gradient_error")},
            "kept": {"one process": equal["alone"], "ranks": ranks},
            "seconds": seconds,
        }
        out.write_text(json.dumps(result))
    dist.destroy_process_group()


def lines_of(result: dict[str, Any]) -> list[str]:
    """The result to read."""
    alone, ranks = result["kept"]["one process"], result["kept"]["ranks"]
    shares = ", ".join(f"{size / MIB:.0f}" for size in ranks)
    lines = [
        f"one bin of {result['tokens']} tokens in {result['documents']} documents, the longest of {result['longest']}",
        f"equal: loss to {result['loss_error']:.1e} (bar 1e-6), gradients to {result['gradient_error']:.1e} (bar 1e-5)",
        f"kept: one process {alone / MIB:.0f} MiB, ranks {shares} MiB: {max(ranks) / alone:.2f} of it",
    ]
    lines += [f"{name:<27} {min(seconds):6.2f} s" for name, seconds in result["seconds"].items()]
    return lines + [f"two ranks are faster than {name} by {value}" for name, value in result["faster_than"].items()]


def main() -> None:
    """Starts two ranks of this script and reports what they found."""
    if "RANK" in os.environ:
        worker(Path(sys.argv[1]), sys.argv[2] == "quick", int(sys.argv[3]))
        return
    arguments = parse(__doc__, repeats=5)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, str(out)]
        size = "quick" if arguments.quick else "full"
        path = os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, *command, size, str(arguments.repeats)],
            env={**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-3000:])
        result = json.loads(out.read_text())
    both = result["seconds"]["two ranks, one thread each"]
    result["faster_than"] = {name: ratios(s, both) for name, s in result["seconds"].items() if s is not both}
    result |= {"machine": machine(), "versions": versions("torch", "mmctx")}
    report(result, lines_of(result), arguments.json)


if __name__ == "__main__":
    main()
