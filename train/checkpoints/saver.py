"""From a step to a checkpoint without stalling the step: tensors are copied at once, a thread writes them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmctx.errors import MmctxError
from mmctx.hf_files import describe_model, side_files
from mmctx.model import MmctxModel
from mmctx.tokenizer import TextTokenizer
from mmctx.train.card import write_card
from mmctx.train.checkpoints.layout import delete, final_path
from mmctx.train.checkpoints.load import without_pretrained
from mmctx.train.checkpoints.optimizer_state import named_state
from mmctx.train.checkpoints.retention import check_metric, superfluous
from mmctx.train.checkpoints.sharded import Shards
from mmctx.train.checkpoints.snapshot import Copied, Snapshot
from mmctx.train.checkpoints.state import TrainerState
from mmctx.train.checkpoints.write import Contents, write_checkpoint
from mmctx.train.checkpoints.writer import Writer
from mmctx.train.config import RunConfig
from mmctx.train.stages import trained_stage
from mmctx.tuning import disk_name
from mmctx.tuning.peft_files import ADAPTER_CONFIG, adapter_tensors, describe_adapter, saved_modules


class Saver:
    """Saves a run's checkpoints and deletes those that need not stay.

    Args:
        run_dir: the run's folder.
        config: of the run.
        shards: the ranks that hold parts of the parameters; None where each holds them whole.
        idle: another rank writes what this one holds as well.
        say: told of each checkpoint that is whole on the disk, from the thread.
    """

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        shards: Shards | None = None,
        idle: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.run_dir, self.config, self.shards, self.idle, self.say = run_dir, config, shards, idle, say
        self._writer = Writer()
        self._weights, self._optimizer, self._average = Snapshot(), Snapshot(), Snapshot()
        self._copied = Copied()
        self._side_files: tuple[TextTokenizer, dict[str, bytes]] | None = None
        self._ends = {stage.stop for stage in config.stages} if config.schedule else set()

    def save(
        self,
        model: MmctxModel,
        tokenizer: TextTokenizer,
        optimizer: torch.optim.Optimizer,
        state: TrainerState,
        metrics: Mapping[str, Any] | None = None,
        average: Mapping[str, Tensor] | None = None,
        lanes: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copies everything and returns; the next step may change it. Waits for the checkpoint before this one, if that is still written.

        Does nothing once something could not be written: see `failed`. All ranks call it.

        Args:
            model, tokenizer, optimizer, state: of the run.
            metrics: the line of this step.
            average: averaged weights, where the run keeps them.
            lanes: memories of streams, of all ranks, on the host; nothing may change them.

        Raises:
            CheckpointError: `train.keep` names a metric that there is not.
        """
        check_metric(self.config.train.keep, metrics or {})
        self._writer.join()
        if self.idle or self.failed:
            return
        weights, optimizer_state, averaged = self._copy(
            model.state_dict(), named_state(model, optimizer), average or {}
        )
        tuned = model.tuning is not None
        contents = Contents(
            state=deepcopy(state),
            description=self._describe(model, tokenizer, state.step),
            weights={disk_name(name): tensor for name, tensor in weights.items()},
            adapter=adapter_tensors(model, weights, saved_modules(model)) if tuned and weights else {},
            optimizer=optimizer_state,
            average=averaged,
            lanes=lanes or {},
            texts=self._files(tokenizer) | (self._adapter_files(model) if tuned else {}),
            metrics=metrics or {},
        )
        self._writer.submit(lambda: self._write(contents))

    @property
    def failed(self) -> bool:
        """Whether something could not be written: `finish` says what."""
        return self._writer.failed

    def finish(self) -> None:
        """Waits until everything is on the disk.

        Raises:
            CheckpointError: something could not be written.
        """
        self._writer.wait()

    def settle(self) -> None:
        """Waits for what is being written, whatever becomes of it."""
        self._writer.join()

    def _copy(
        self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], average: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """All on the host."""
        if self.shards is None:
            copies = self._weights.take(weights), self._optimizer.take(state), self._average.take(average)
        else:
            gather, parts = self.shards.gather, self.shards.parts(state, self._optimizer)
            copies = gather(weights, self._weights), parts, gather(average, self._average)
        self._copied.mark()
        return copies

    def _write(self, contents: Contents) -> None:
        """In the thread."""
        self._copied.wait()
        write = write_checkpoint if self.shards is None else self.shards.write
        path = write(self.run_dir, contents)
        if path is None:  # the first rank says and deletes
            return
        try:
            write_card(path, self.run_dir)
        except (OSError, MmctxError) as error:  # the checkpoint itself is whole
            self.say(f"{path}: no model card could be written: {error}")
        self.say(f"saved {path}")
        for old in superfluous(self.run_dir, self.config.train.keep, contents.state.step, self._ends):
            delete(old)

    def _adapter_files(self, model: MmctxModel) -> dict[str, bytes]:
        train = self.config.train
        described = describe_adapter(model, self.config.steps, saved_modules(model), train.init)
        return {ADAPTER_CONFIG: described}

    def _describe(self, model: MmctxModel, tokenizer: TextTokenizer, step: int) -> dict[str, Any]:
        """`config.json`: the model in the stage that it was last trained in, for Transformers, and the whole run, for us."""
        stage = trained_stage(self.config, step).config
        about = describe_model(without_pretrained(stage.model), stage.objectives, tokenizer, model.vocab_size)
        return about | {
            "max_position_embeddings": stage.data.context_length,
            "run": self.config.model_dump(mode="json"),
        }

    def _files(self, tokenizer: TextTokenizer) -> dict[str, bytes]:
        """The tokenizer's and those that Transformers wants, made once and outside of the thread, while nobody else uses the tokenizer."""
        if self._side_files is None or self._side_files[0] is not tokenizer:
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save(Path(folder))
                files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
            self._side_files = tokenizer, files | side_files(without_pretrained(self.config.model), tokenizer)
        return self._side_files[1]


def save_checkpoint(
    run_dir: Path,
    config: RunConfig,
    model: MmctxModel,
    tokenizer: TextTokenizer,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
) -> Path:
    """Writes one checkpoint and waits for it; returns its folder."""
    saver = Saver(run_dir, config)
    saver.save(model, tokenizer, optimizer, state)
    saver.finish()
    return final_path(run_dir, state.step)
