"""The leak audit on a run's own model and data: what `mmctx audit` and `train.audit` do. See `mmctx.audit` for the audit itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mmctx.audit import AuditReport, audit_batch, other_modes, own_mode
from mmctx.config import apply_override, build_config, load_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.datasets.fetch import PackedDataset
from mmctx.datasets.planning.plan import Bin, Plan
from mmctx.errors import ConfigError, LeakError, SampleError
from mmctx.model import MmctxModel
from mmctx.pack import Document, pack_documents
from mmctx.train.build import build_model
from mmctx.train.checkpoints.layout import resolve_checkpoint
from mmctx.train.checkpoints.load import read_model
from mmctx.train.config import RunConfig
from mmctx.train.course import plan_at
from mmctx.train.stages import stage_of

TOKENS = {"cpu": 1536}
"""Tokens that are audited of a bin by default, by kind of device: on a CPU bf16 is slow. Elsewhere the whole bin."""
_TRIAL_STEPS = 64

Progress = Callable[[str, int, int], None]


def audit(
    where: str | Path,
    overrides: Sequence[str] = (),
    *,
    step: int | None = None,
    tokens: int | None = None,
    progress: Progress | None = None,
) -> AuditReport:
    """Audits a run's model on its data, in every mode that can run here.

    Args:
        where: the run's YAML file (fresh weights), or a run or checkpoint folder (its weights).
        overrides: changes of the configuration, such as `model.transformer.windows=[64]`.
        step: whose batch to take, counted from 1, and whose stage, if the run has a schedule; by default the fullest of the first steps
            that reads every source. Of a checkpoint, a step of its last stage, counted as if the run were that stage alone.
        tokens: of the batch, at least two samples; 0 for all of it; by default 1,536 on a CPU and all of it elsewhere.
        progress: called with (mode, passes done, passes in all).

    Raises:
        ConfigError: `step` is less than 1.
        DataError: the batch has fewer than two documents.
    """
    if step is not None and step < 1:
        raise ConfigError(f"--step counts from 1, as in metrics.jsonl, found {step}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config, data, plan = open_run(Path(where), overrides, step or 1)
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    documents = choose_documents(data, plan, step, tokens, device)
    batch = pack_documents(documents, data.tokenizer.placeholder_ids)
    model = model.to(device)
    own = own_mode(model, config.train.precision, device)
    others, notes = other_modes(own, model, device)
    seed = config.train.seed
    report = audit_batch(model, batch, documents, modes=[own, *others], seed=seed, progress=progress)
    report.notes += notes
    return report


def audit_before_training(
    config: RunConfig, model: MmctxModel, data: RunData, plan: Plan, step: int, device: torch.device
) -> AuditReport:
    """Audits the model as it will be trained, on the bins of its next step; every rank does the same and finds the same.

    Raises:
        LeakError: a document leaked into another, or a check saw nothing.
    """
    documents = choose_documents(data, plan, step + 1, None, device)
    batch = pack_documents(documents, data.tokenizer.placeholder_ids)
    modes = [own_mode(model, config.train.precision, device)]
    report = audit_batch(model, batch, documents, modes=modes, seed=config.train.seed)
    if not report.ok:
        found = [*report.leaks, *report.blind]
        shown = "\n".join(f"  {line}" for line in found[:8])
        raise LeakError(
            f"train.audit: documents are not kept apart ({len(report.leaks)} leaks, {len(report.blind)} blind checks):\n{shown}\n"
            "Run `mmctx audit` for the whole table; train.audit=false trains nevertheless."
        )
    return report


def open_run(where: Path, overrides: Sequence[str], step: int) -> tuple[MmctxModel, RunConfig, RunData, Plan]:
    """Model, configuration, data and plan of a checkpoint, or of a run that is to be, in the stage that `step` (from 1) belongs to."""
    if not where.is_dir():
        config = load_config(RunConfig, where, overrides)
        data, plan = plan_at(config, step - 1, str(where))
        stage = stage_of(config.stages, step - 1).config
        model = build_model(config, len(data.tokenizer))
        model.trunk.set_context(stage.model.transformer)
        return model, stage, data, plan
    if planned := [override for override in overrides if override.startswith(("model.", "objectives."))]:
        raise ConfigError(
            f"{where} holds the weights of one model: {planned[0]!r} would be another; give the YAML file"
        )
    folder = resolve_checkpoint(where)
    model, _, config = read_model(folder)
    tree = config.model_dump(mode="json")
    for override in [*overrides, f"data.tokenizer={json.dumps(str(folder))}"]:
        apply_override(tree, override)
    config = build_config(RunConfig, tree, where=str(where))
    data = build_data(config.data, config.data.sources, config.model, config.objectives, config.train.seed)
    return model, config, data, Plan(config.data, data.tables, config.train.seed)


def choose_documents(
    data: RunData, plan: Plan, step: int | None, tokens: int | None, device: torch.device
) -> list[Document]:
    """Documents of a planned bin, cut down to about so many tokens; of further bins, too, while there are fewer than two."""
    if tokens is None:
        tokens = TOKENS.get(device.type, 0)
    samples: list[tuple[int, list[Document]]] = []
    for bin in _bins(plan, step):
        samples += _samples(data.dataset, bin)
        if sum(len(documents) for _, documents in samples) >= 2:
            break
    # A piece of a stream is read as a document by itself; what lanes carry, the audit tries by itself.
    return [replace(document, start=None) for _, documents in cut(samples, tokens) for document in documents]


def _bins(plan: Plan, step: int | None) -> list[Bin]:
    """The bins of one step, or of the first ones; those that read most sources and samples first."""
    steps = [step - 1] if step is not None else [plan.start.step + n for n in range(_TRIAL_STEPS)]
    bins = [bin for number in steps for bin in plan.step(number)]
    return sorted(bins, key=lambda bin: (-len({sample[0] for sample in bin.samples}), -len(bin.samples)))


def _samples(dataset: PackedDataset, bin: Bin) -> list[tuple[int, list[Document]]]:
    """Source number and documents of each sample of a bin; samples that cannot be used are left out, as in training."""
    found = []
    for sample in bin.samples:
        try:
            found.append((sample[0], dataset.documents(*sample, bin.step)))
        except SampleError:
            continue
    return found


def cut(samples: Sequence[tuple[int, list[Document]]], tokens: int) -> list[tuple[int, list[Document]]]:
    """As many samples as fit into so many tokens, at least two; all of them for 0 tokens.

    First the longest that leaves room for others, then the shortest of each source, then the rest in order.
    """
    if tokens == 0:
        return list(samples)
    sizes = [sum(len(d.input_ids) for d in documents) for _, documents in samples]
    by_size = sorted(range(len(samples)), key=sizes.__getitem__)
    longest = [number for number in reversed(by_size) if sizes[number] <= tokens // 2][:1]
    sources = {samples[number][0]: number for number in reversed(by_size)}  # the shortest of each stays
    kept: list[int] = []
    room = tokens
    for number in dict.fromkeys([*longest, *sources.values(), *by_size[:2], *range(len(samples))]):
        if sizes[number] <= room or len(kept) < 2:
            kept.append(number)
            room -= sizes[number]
    return [samples[number] for number in sorted(kept)]
