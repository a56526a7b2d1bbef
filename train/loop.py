"""Opens a run and trains it: read it from `train` downwards; the steps themselves are in `sitting.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from mmctx.attention.resolve import Resolution
from mmctx.determinism import deterministic_algorithms
from mmctx.parallel.mesh import build_mesh
from mmctx.train.attention import settled_attention
from mmctx.train.build import build_model
from mmctx.train.checkpoints.load import load_optimizer, load_run_config, load_weights, without_origin
from mmctx.train.checkpoints.resume import checkpoint_to_resume
from mmctx.train.checkpoints.same_run import check_same_run
from mmctx.train.checkpoints.state import read_state
from mmctx.train.config import RunConfig
from mmctx.train.course import build_course
from mmctx.train.distribution import distribute, handlers
from mmctx.train.optim.ema import read_ema
from mmctx.train.optim.modules import freeze, named_in
from mmctx.train.optim.optimizer import build_optimizer
from mmctx.train.preflight import check_run
from mmctx.train.records import announce_indexing
from mmctx.train.result import TrainResult
from mmctx.train.sitting import Sitting
from mmctx.train.stages import stage_of
from mmctx.train.tuning import modules_of, never_trained


def train(config: RunConfig) -> TrainResult:
    """Trains a run to its last step, from its newest checkpoint if it has one.

    Works alone and under `accelerate launch` or `torchrun`. Evaluates on held-out data every
    `eval.every` steps, if that is set; what runs at the end is `mmctx.evaluate`, called by `mmctx train`.

    Raises:
        MmctxError: whatever a user can mend, with the file or key, both values and the remedy.
    """
    check_run(config)
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    with deterministic_algorithms(config.train.deterministic):  # before anything runs on a GPU
        return _train(config)


def _train(config: RunConfig) -> TrainResult:
    with sitting(config) as opened:
        return opened.run()


@contextmanager
def sitting(config: RunConfig) -> Iterator[Sitting]:
    """A run, ready to go on; what it holds open is closed in the end."""
    accelerator = Accelerator(
        mixed_precision="bf16" if config.train.precision == "bf16" else "no",
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=handlers(config.train.distribution),
    )
    try:
        with settled_attention(config, accelerator) as attention:
            opened = _sit_down(config, accelerator, attention)
            try:
                yield opened
            except Exception:
                opened.saver.settle()  # what was saved before is still written; a second Ctrl-C does not wait for it
                raise
            finally:
                opened.close()
    finally:
        # A notebook may train again with another precision; accelerate keeps its state for the whole process.
        accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


def _sit_down(config: RunConfig, accelerator: Accelerator, attention: Resolution) -> Sitting:
    """Data, model and optimizer, as the newest checkpoint left them."""
    size = config.train.sequence_parallel
    mesh = build_mesh(accelerator.device.type, accelerator.process_index, accelerator.num_processes, size)
    run_dir = Path(config.run.dir) / config.run.name
    checkpoint = checkpoint_to_resume(run_dir, accelerator)
    state = read_state(checkpoint) if checkpoint else None
    with accelerator.main_process_first():  # the others find the indexes that the first one wrote
        progress = announce_indexing(enabled=accelerator.is_main_process)
        course = build_course(config, state.step if state else 0, mesh.data_size, progress)
    model = build_model(without_origin(config) if checkpoint else config, len(next(iter(course.values())).tokenizer))
    if checkpoint and state:
        check_same_run(load_run_config(checkpoint), config, checkpoint, state.step)
        load_weights(model, checkpoint)
    stages = config.stages
    freeze(model, modules_of(model, stage_of(stages, state.step if state else 0)))  # DDP looks at it once
    never = never_trained(model, stages)
    wrapped = distribute(model, config.train.distribution, accelerator)
    optimizer = build_optimizer(model, config.train.optimizer, named_in(stage.config.train for stage in stages), never)
    if checkpoint:
        load_optimizer(model, optimizer, checkpoint)
    average = read_ema(checkpoint / "trainer") if checkpoint and config.train.ema else None
    return Sitting(config, accelerator, mesh, attention, run_dir, course, model, wrapped, optimizer, state, average)
