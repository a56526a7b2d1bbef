"""The handful of names that a notebook needs: load a config, build a model, build a dataset, train, evaluate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from mmctx import config as config_module
from mmctx import eval as evaluation
from mmctx.api_store import encoder_of, open_encoder, recall_from
from mmctx.datasets.assemble import RunData, build_data
from mmctx.datasets.planning.plan import Plan
from mmctx.errors import ConfigError, DataError, MmctxError
from mmctx.eval.report.run import is_run, read_run
from mmctx.eval.results import add_results
from mmctx.model import MmctxModel
from mmctx.pack import PackedBatch
from mmctx.pretrained.export import export as export_model
from mmctx.train.audit import audit
from mmctx.train.build import build_model as _build_model
from mmctx.train.card import write_card
from mmctx.train.checkpoints.layout import list_checkpoints, resolve_checkpoint
from mmctx.train.checkpoints.load import load_model, load_run_config, read_model
from mmctx.train.checkpoints.manifest import verify
from mmctx.train.checkpoints.state import read_state
from mmctx.train.config import RunConfig
from mmctx.train.loop import TrainResult, train
from mmctx.train.optim.ema import load_ema
from mmctx.train.stages import trained_stage


def load_config(path: str | Path, *overrides: str) -> RunConfig:
    """Reads a run's YAML, with overrides such as `"train.steps=100"`. See `mmctx.config.load_config`."""
    return config_module.load_config(RunConfig, path, overrides)


def build_dataset(config: RunConfig, *, held_out: bool = False) -> RunData:
    """The run's data (or its held-out data): `build_dataset(config).dataset[bin]` is a packed batch."""
    sources = config.eval.sources if held_out else config.data.sources
    return build_data(config.data, sources, config.model, config.objectives, config.train.seed)


def build_model(config: RunConfig, data: RunData) -> MmctxModel:
    """The model with fresh weights, sized for the data's tokenizer."""
    return _build_model(config, len(data.tokenizer))


def evaluate(
    checkpoint: str | Path,
    *,
    suites: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Runs suites on a checkpoint or run folder, and writes what they find into `eval.json` and `report.html` of the run folder.

    The tokenizer is the checkpoint's own, whatever `data.tokenizer` names. What suites that do not run now found earlier
    at the same step stays in the report.

    Args:
        checkpoint: a `checkpoint-N` folder, or a run folder for its newest one.
        suites: names from `mmctx.eval.SUITES`; the config's by default.
        overrides: changes of the run's configuration, such as `eval.max_new_tokens=40`.
        progress: called with (suite, done, total).

    Returns:
        The checkpoint's entry in `eval.json`, see `mmctx.eval.results`.

    Raises:
        ConfigError: the run has no held-out sources, or a suite is unknown.
    """
    from mmctx.eval.report.page import write_report  # needs the `eval` extra, training does not

    folder = resolve_checkpoint(Path(checkpoint))
    context, config = _context(folder, overrides, progress)
    suites = evaluation.known_suites(suites or config.eval.suites)
    found = evaluation.evaluate(context, suites)
    run_dir, state = folder.parent, read_state(folder)
    if found.get("recall") and load_run_config(folder).schedule:
        found["recall"]["stages"] = recall_curve(run_dir, until=state.step, overrides=overrides, progress=progress)
    about = {"step": state.step, "tokens": state.tokens, "weights": config.eval.weights}
    results = add_results(run_dir, about | {"train_seconds": round(state.train_seconds, 1)} | found)
    write_report(run_dir, results, config, context.data, batch=_first_batch(_with_tokenizer(config, folder)))
    write_card(folder, run_dir)
    return results


def export_trunk(checkpoint: str | Path, out: str | Path, to: str) -> dict[str, Any]:
    """Writes a checkpoint's trunk and tokenizer as a folder that Transformers loads by itself. See `mmctx.pretrained.export`.

    Args:
        checkpoint: a `checkpoint-N` folder, or a run folder for its newest one.
        out: the folder.
        to: `llama`, `mistral`, `qwen2`, `qwen3`, `gpt2` or `bert`.

    Raises:
        ConfigError: such a model cannot say what the trunk has; each field is named.
    """
    model, tokenizer, config = load_model(Path(checkpoint))
    return export_model(model, tokenizer, Path(out), to, context_length=config.data.context_length)


def export_encoders(
    checkpoint: str | Path,
    out: str | Path,
    to: Literal["onnx", "torch-export"] = "onnx",
    *,
    clip_seconds: float = 10.0,
    picture_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint's encoders and similarity embeddings as graphs, checked against the model. See `mmctx.export.encoders`.

    Args:
        checkpoint: a `checkpoint-N` folder, or a run folder for its newest one.
        out: the folder.
        to: `onnx`, or `torch-export` for `.pt2` files.
        clip_seconds: length of the clips that sound graphs take.
        picture_size: height and width of the pictures, where the encoder lets them keep their shape.
    """
    from mmctx.export.encoders import export_encoders as write  # torch.export is slow to import

    model, tokenizer, _ = load_model(Path(checkpoint))
    return write(model, tokenizer, out, to, clip_seconds=clip_seconds, picture_size=picture_size)


def report(*runs: str | Path, out: str | Path | None = None) -> Path:
    """Writes one self-contained page about a run, or about several side by side, from what their folders hold.

    Nothing is evaluated: the page shows curves, what `evaluate` found before, and examples with their media where the held-out shards are
    still at hand.

    Args:
        runs: run folders.
        out: the page; by default `report.html` in the folder of the one run, or beside the first of several.

    Returns:
        Its path.

    Raises:
        DataError: a folder holds no run.
    """
    from mmctx.datasets.view.render import write_page
    from mmctx.eval.report.page import BatchToDraw, render_page

    folders = _named([Path(run) for run in runs])
    first = next(iter(folders.values()))
    path = Path(out) if out is not None else (first if len(folders) == 1 else first.resolve().parent) / "report.html"
    found = [read_run(folder, name if len(folders) > 1 else None) for name, folder in folders.items()]
    configs = {run.name: _data_config(folder) for run, folder in zip(found, folders.values(), strict=True)}
    held_out = {
        name: _or_none(lambda c=config: build_dataset(c, held_out=True)) for name, config in configs.items() if config
    }
    batch, config = None, configs[found[0].name]
    if len(found) == 1 and config and (packed := _first_batch(config)):
        batch = BatchToDraw(packed, config.data.bin_tokens)
    write_page(path, render_page(found, held_out, batch))
    return path


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Run folders by the name that a page calls them: the folder's, with as many folders above it as it takes to tell them apart."""
    if not folders:
        raise DataError("there is no run to report on: name a run folder, such as runs/demo")
    for folder in folders:
        if not is_run(folder):
            raise DataError(f"{folder}: not a run folder: it holds no metrics.jsonl, eval.json or config.yaml")
    whole = list(dict.fromkeys(folder.resolve() for folder in folders))
    for depth in range(1, max(len(folder.parts) for folder in whole) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in whole]
        if len(set(names)) == len(whole):
            break
    return dict(zip(names, whole, strict=True))


def _data_config(folder: Path) -> RunConfig | None:
    """A run's configuration with the tokenizer of its newest checkpoint; None where this version of mmctx cannot build it."""
    try:
        config = config_module.load_config(RunConfig, folder / "config.yaml")
    except ConfigError:
        return None
    checkpoints = list_checkpoints(folder)
    return _with_tokenizer(config, checkpoints[-1]) if checkpoints else config


def _or_none(build: Callable[[], RunData]) -> RunData | None:
    """Data that may have gone: of another machine, or deleted since."""
    try:
        return build()
    except MmctxError:
        return None


def _context(
    folder: Path, overrides: Sequence[str], progress: Callable[[str, int, int], None] | None
) -> tuple[evaluation.EvalContext, RunConfig]:
    """A checkpoint's model and held-out data, and the configuration of its stage."""
    model, _, config = read_model(folder)
    config = _overridden(config, overrides)
    if not config.eval.sources:
        raise ConfigError(
            "eval.sources is empty: name held-out shards to evaluate on, for example eval.sources.held_out.shards=..."
        )
    if config.eval.weights == "ema":
        load_ema(model, folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = build_dataset(_with_tokenizer(config, folder), held_out=True)
    bf16 = config.train.precision == "bf16"
    return evaluation.EvalContext(
        model.to(device), data, config.objectives, config.eval, device, bf16, progress
    ), config


def recall_curve(
    run_dir: str | Path,
    *,
    until: int | None = None,
    overrides: Sequence[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Recall after each stage of a run: the checkpoints of their ends, with the positions and windows of their stage, on all held-out
    documents.

    Args:
        run_dir: the run's folder.
        until: the last step that counts.
        overrides: changes of the run's configuration.
        progress: called with (suite, done, total).

    Returns:
        `{"step", "label", "lengths": {length: score}, "heat": {kind: {length: {depths: score}}}}` of each checkpoint, in order; see
        `mmctx.eval.suites.recall.score`.
    """
    curve = []
    for folder in list_checkpoints(Path(run_dir)):
        step = read_state(folder).step
        stage = trained_stage(load_run_config(folder), step)
        if step != stage.stop or (until is not None and step > until):
            continue  # saved on the way
        verify(folder, optimizer=False)
        context, config = _context(folder, overrides, progress)
        found = evaluation.evaluate(context, ["recall"])["recall"]
        scores = {length: by_kind["all"] for length, by_kind in found.get("lengths", {}).items()}
        curve.append(
            {
                "step": step,
                "label": f"after stage {stage.number + 1}: {config.data.context_length:,} tokens",
                "lengths": scores,
                "heat": found.get("heat", {}),
            }
        )
    return curve


def _with_tokenizer(config: RunConfig, folder: Path) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(folder)})})


def _overridden(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    if not overrides:
        return config
    tree = config.model_dump(mode="json")
    for override in overrides:
        config_module.apply_override(tree, override)
    return config_module.build_config(RunConfig, tree, where="overrides")


def _first_batch(config: RunConfig) -> PackedBatch | None:
    """A training batch to draw; None where the training shards are not at hand, as on another machine."""
    data = _or_none(lambda: build_dataset(config))
    if data is None:
        return None
    return data.dataset[Plan(config.data, data.tables, config.train.seed).step(0)[0]]


__all__ = [
    "TrainResult",
    "audit",
    "build_dataset",
    "build_model",
    "encoder_of",
    "evaluate",
    "export_encoders",
    "export_trunk",
    "load_config",
    "load_model",
    "open_encoder",
    "recall_curve",
    "recall_from",
    "report",
    "train",
]
