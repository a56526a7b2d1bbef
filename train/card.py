"""The model card: `README.md` in a checkpoint, written from what the run left behind.

Format: the metadata that the Hugging Face hub reads between two lines of dashes, then sections after Mitchell et al. 2019 ("Model Cards for
Model Reporting"). What only people can say stands in `run.card`; without it, the card says that nobody has said it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from mmctx.config import build_config
from mmctx.eval import headlines
from mmctx.eval.results import read_results
from mmctx.train.checkpoints.files import read_json
from mmctx.train.checkpoints.manifest import CARD
from mmctx.train.checkpoints.state import TrainerState, read_state
from mmctx.train.config import RunConfig
from mmctx.train.stages import trained_stage

_UNSAID = "Not stated by whoever trained it."


def write_card(checkpoint: Path, run_dir: Path) -> Path:
    """Writes or renews the card of a checkpoint; what was evaluated at its step is in it.

    Args:
        checkpoint: its folder.
        run_dir: the run's folder, with manifest.json and eval.json.

    Returns:
        The path of the card.
    """
    description, state = read_json(checkpoint / "config.json"), read_state(checkpoint)
    config = build_config(RunConfig, description["run"], str(checkpoint / "config.json"))
    config = trained_stage(config, state.step).config
    made_by = read_json(run_dir / "manifest.json") if (run_dir / "manifest.json").exists() else {}
    found = [entry for entry in read_results(run_dir) if entry["step"] == state.step]
    results = headlines(found[-1]) if found else {}
    parts = [
        _metadata(config, results),
        f"# {config.run.name}",
        config.run.card.summary or _summary(config),
        _use(config),
        _architecture(config, _num_parameters(checkpoint), description["vocab_size"]),
        _data(config, state),
        _training(config, state, made_by),
        _results(results, config, checkpoint.name),
        _limits(config, state, results),
    ]
    path = checkpoint / CARD
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _metadata(config: RunConfig, results: Mapping[str, Mapping[str, float]]) -> str:
    card, model = config.run.card, config.model
    media = [kind for kind in ("image", "audio") if getattr(model, kind) is not None]
    tree: dict[str, Any] = {
        "library_name": "transformers",
        "license": card.license or "unknown",
        "pipeline_tag": {(): "text-generation", ("image",): "image-text-to-text"}.get(tuple(media), "any-to-any"),
        "tags": ["mmctx", "long-context", *media],
    }
    if card.languages:
        tree["language"] = list(card.languages)
    if results:
        entries = [
            {
                "task": {"type": suite},
                "dataset": {"type": "mmctx", "name": "held-out data of the run"},
                "metrics": [{"type": name, "value": value} for name, value in numbers.items()],
            }
            for suite, numbers in results.items()
            if numbers
        ]
        tree["model-index"] = [{"name": config.run.name, "results": entries}]
    return "---\n" + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True) + "---"


def _summary(config: RunConfig) -> str:
    inputs = [
        "text",
        *({"image": "pictures", "audio": "sound"}[k] for k in ("image", "audio") if getattr(config.model, k)),
    ]
    reads = " and ".join([", ".join(inputs[:-1]), inputs[-1]] if len(inputs) > 1 else inputs)
    kinds = ", ".join(sorted({objective.kind.replace("_", " ") for objective in config.objectives.values()}))
    return f"A transformer that reads {reads} in documents of up to {config.data.context_length:,} tokens, trained with mmctx for: {kinds}."


def _use(config: RunConfig) -> str:
    code = (
        "```python\nimport mmctx.hf  # registers the model with Transformers\n"
        "from transformers import AutoModelForCausalLM, AutoProcessor\n\n"
        'folder = "path/to/this/folder"\nmodel = AutoModelForCausalLM.from_pretrained(folder)\n'
        "processor = AutoProcessor.from_pretrained(folder)\n```"
    )
    return f"## Intended use\n\n{config.run.card.intended_use or _UNSAID}\n\n{code}"


def _architecture(config: RunConfig, num_parameters: int, vocab_size: int) -> str:
    trunk = config.model.transformer
    windows = "all of the document" if trunk.windows == (None,) else ", ".join(str(w or "all") for w in trunk.windows)
    rows = {
        "parameters": f"{num_parameters:,}",
        "transformer": f"{trunk.depth} layers of width {trunk.width}, {trunk.num_heads} heads ({trunk.kv_heads} for keys)",
        "each layer sees": windows,
        "vocabulary": f"{vocab_size:,}",
    }
    if (image := config.model.image) is not None:
        rows["pictures"] = f"{image.name} ({image.kind})"
    if (audio := config.model.audio) is not None:
        rows["sound"] = f"log-mel frames, {audio.depth} layers of width {audio.width}"
    return "## Model\n\n" + _table(("", ""), list(rows.items()))


def _data(config: RunConfig, state: TrainerState) -> str:
    rows = [
        (name, source.shards, ", ".join(source.objectives), config.run.card.data_licenses.get(name, "not stated"))
        for name, source in config.data.sources.items()
    ]
    read = ", ".join(f"{count:,} of {kind}" for kind, count in state.tokens_by_modality.items())
    skips = sum(state.skips.values()) + sum(state.left_out.values())
    text = f"It read {state.samples:,} samples, {state.tokens:,} tokens ({read}); {skips:,} samples could not be used."
    return "## Training data\n\n" + _table(("source", "shards", "objectives", "licence"), rows) + f"\n\n{text}"


def _training(config: RunConfig, state: TrainerState, made_by: Mapping[str, Any]) -> str:
    train = config.train
    versions = ", ".join(f"{name} {version}" for name, version in made_by.get("versions", {}).items())
    device = made_by.get("device")
    rows = {
        "steps": f"{state.step:,}",
        "optimizer": f"{train.optimizer.kind}, learning rate {train.optimizer.lr:g}",
        "precision": train.precision,
        "time": f"{state.train_seconds / 3600:.2f} h"
        + (f" on {made_by.get('processes', 1)} x {device}" if device else ""),
        "software": versions or "unknown",
        "seed": str(train.seed),
    }
    return (
        "## Training\n\n"
        + _table(("", ""), list(rows.items()))
        + "\n\nThe whole configuration is in `config.json`, under `run`."
    )


def _results(results: Mapping[str, Mapping[str, float]], config: RunConfig, name: str) -> str:
    if not results:
        return f"## Results\n\nNothing was evaluated at this step. `mmctx eval {config.run.dir}/{config.run.name}/{name}` does."
    rows = [(suite, metric, f"{value:.4g}") for suite, numbers in results.items() for metric, value in numbers.items()]
    sources = ", ".join(f"{key} ({source.shards})" for key, source in config.eval.sources.items())
    return f"## Results\n\nOn held-out data: {sources}.\n\n" + _table(("suite", "metric", "value"), rows)


def _limits(config: RunConfig, state: TrainerState, results: Mapping[str, Any]) -> str:
    known = [
        f"It was trained on documents of up to {config.data.context_length:,} tokens; longer ones were no part of the training.",
        *([] if results else ["It has not been evaluated at this step."]),
        "Neither bias nor safety was measured.",
    ]
    return "## Known limits\n\n" + "\n".join(f"- {line}" for line in [*config.run.card.limits, *known])


def _num_parameters(checkpoint: Path) -> int:
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
