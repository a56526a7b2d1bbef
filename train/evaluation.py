"""Evaluation inside training: every few steps, on every rank's share of the held-out data, with the numbers of one rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmctx import eval as evaluation
from mmctx.datasets.assemble import RunData, build_data
from mmctx.eval.results import add_results
from mmctx.model import MmctxModel
from mmctx.train.checkpoints.load import without_pretrained
from mmctx.train.checkpoints.state import TrainerState
from mmctx.train.config import RunConfig
from mmctx.train.distribution import is_sharded
from mmctx.train.stages import Stage
from mmctx.train.sums import Sums
from mmctx.tuning import apply_tuning


class LoopEvaluation:
    """Runs `eval.loop_suites` every `eval.every` steps. It draws no random numbers and leaves the run as it was.

    Args:
        config: of the run.
        run_dir: gets eval.json.
        accelerator: of the run.
        sums: of this rank.
    """

    def __init__(self, config: RunConfig, run_dir: Path, accelerator: Accelerator, sums: Sums) -> None:
        self._config, self._run_dir, self._accelerator, self._sums = config.eval, run_dir, accelerator, sums
        self._suites = evaluation.known_suites(config.eval.loop_suites)
        self._stage, self._data = -1, None

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after `step` steps."""
        return self._config.every is not None and step % self._config.every == 0

    def __call__(
        self, stage: Stage, model: MmctxModel, average: Mapping[str, Tensor], state: TrainerState
    ) -> dict[str, Any]:
        """Evaluates, on all ranks, and returns a line of metrics.jsonl: `eval/SUITE/NAME` of each suite's headline.

        Args:
            stage: of the run, whose context the held-out documents are cut to.
            model: as it is trained.
            average: of the weights, if the run keeps one.
            state: where the run stands.
        """
        chosen = average if self._config.weights == "ema" else {}
        context = evaluation.EvalContext(
            self._whole(stage.config, model, chosen),
            self._held_out(stage),
            stage.config.objectives,
            self._config,
            self._accelerator.device,
            stage.config.train.precision == "bf16",
            ranks=evaluation.Ranks(self._accelerator.process_index, self._accelerator.num_processes, self._sums.gather),
        )
        results = evaluation.evaluate(context, self._suites)
        if self._accelerator.is_main_process:
            about = {"step": state.step, "tokens": state.tokens, "weights": self._config.weights}
            add_results(self._run_dir, about | {"train_seconds": round(state.train_seconds, 1)} | results)
        lines = evaluation.headlines(results)
        return {"step": state.step} | {
            f"eval/{suite}/{name}": value for suite, numbers in lines.items() for name, value in numbers.items()
        }

    def _held_out(self, stage: Stage) -> RunData:
        """Read once a stage; indexed by one rank."""
        if self._data is None or self._stage != stage.number:
            config = stage.config
            with self._accelerator.main_process_first():
                data = build_data(config.data, config.eval.sources, config.model, config.objectives, config.train.seed)
            self._stage, self._data = stage.number, data
        return self._data

    def _whole(self, config: RunConfig, model: MmctxModel, average: Mapping[str, Tensor]) -> MmctxModel:
        """The model itself, or a copy: of parts that lie on several ranks, whose forward pass all ranks would have to make equally often,
        and of averaged weights. While a copy is evaluated, each rank holds all of the weights once more.
        """
        if not average and not is_sharded(model):
            return model
        with torch.random.fork_rng(devices=[]):  # fresh weights are drawn on the host, and written over
            copy = MmctxModel(without_pretrained(config.model), config.objectives, model.vocab_size)
            apply_tuning(copy, config.train.tune, config.steps)
        weights = {**model.state_dict(), **average}
        copy.load_state_dict({name: _whole_tensor(tensor) for name, tensor in weights.items()})
        return copy.to(self._accelerator.device)


def _whole_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
