"""A search for hyperparameters: optuna chooses, each trial is an ordinary run, and one SQLite file remembers them all.

    runs/NAME/
      sweep.db          the study, as `optuna-dashboard` reads it
      trial-0007/       an ordinary run folder

Trials can be stopped and killed like any run: a sitting that finds one that nobody works on any more goes on with it from its newest
checkpoint. Several processes may work on one sweep.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mmctx.config import dump_config, load_config
from mmctx.errors import ConfigError
from mmctx.train.checkpoints.layout import list_checkpoints
from mmctx.train.config import RunConfig
from mmctx.train.sweep.config import SweepConfig
from mmctx.train.sweep.space import check_keys, distributions, settings
from mmctx.train.sweep.trial import CONFIG, Outcome, has_run, hold, is_held, lock_of, run_trial

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

_HOPELESS = 3  # runs that may fail before one succeeds
_FOLDER, _PROBLEM, _GOES_ON = "folder", "problem", "goes_on"  # what the study keeps of a trial besides its values


def sweep(config: SweepConfig, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Runs what is left of a sweep.

    Args:
        config: of the sweep.
        progress: called with ("trials", ended, all).

    Returns:
        `{"dir", "metric", "best", "trials"}`: each trial's number, folder, state, value, settings and problem, and the best of them.

    Raises:
        ConfigError: optuna is not installed, a range names no key of the run's config, the sweep was begun with other ranges, or all of
            its first runs failed.
        KeyboardInterrupt: a trial was stopped by a signal.
    """
    work = _Sweep(config, Path(config.dir) / config.name, _open(config))
    while True:
        if progress:
            progress("trials", len([t for t in work.trials() if t.state.is_finished()]), config.trials)
        with hold(
            work.folder / "sweep.lock"
        ):  # between asking for a trial and locking its folder it would look abandoned
            work.take_over()
            if len(work.trials()) >= config.trials and not work.waiting():
                return work.summary()
            trial = work.study.ask(distributions(config.ranges))
            name = trial.user_attrs.get(_FOLDER) or f"trial-{trial.number:04d}"
            trial.set_user_attr(_FOLDER, name)
            lock = hold(lock_of(work.folder / name))
        with lock:
            work.tell(trial, work.run(trial, work.folder / name, lock))
        work.delete_checkpoints()
        work.check_hope()


@dataclass(frozen=True)
class _Sweep:
    config: SweepConfig
    folder: Path
    study: Study

    def trials(self) -> list[FrozenTrial]:
        """All but those that another trial goes on with."""
        trials = self.study.get_trials(deepcopy=False)
        replaced = {trial.user_attrs.get(_GOES_ON) for trial in trials}
        return [trial for trial in trials if trial.number not in replaced]

    def waiting(self) -> bool:
        """Whether a trial of a dead process waits."""
        return any(trial.state.name == "WAITING" for trial in self.trials())

    def take_over(self) -> None:
        """Queues trials again whose processes have died; they go on in their folders."""
        from optuna.trial import TrialState, create_trial

        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            name = trial.user_attrs.get(_FOLDER)
            if name is not None and is_held(lock_of(self.folder / name)):
                continue
            self.study.tell(trial.number, state=TrialState.FAIL)
            self.study.add_trial(
                create_trial(
                    state=TrialState.WAITING,
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs={_GOES_ON: trial.number} | ({_FOLDER: name} if name else {}),
                    intermediate_values=trial.intermediate_values,
                )
            )

    def run(self, trial: Trial, folder: Path, lock: IO[str]) -> Outcome:
        """The trial's run, with the values that were chosen for it."""
        chosen = settings(self.config.ranges, trial.params)
        place = {"run.dir": str(self.folder), "run.name": folder.name}
        changes = [f"{key}={json.dumps(value)}" for key, value in (chosen | place).items()]
        try:
            run = load_config(RunConfig, self.config.config, [*self.config.overrides, *changes])
        except ConfigError as error:  # values that do not go together are a failed trial, not the end
            return Outcome(None, problem=str(error))
        dump_config(run, folder / CONFIG)

        def is_hopeless(step: int, value: float) -> bool:
            trial.report(value, step)
            return step < run.steps and trial.should_prune()

        before = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        reported = max(before, default=-1)
        return run_trial(folder, lock, self.config.launch, self.config.metric, is_hopeless, reported)

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        """Writes down how a trial ended."""
        from optuna.trial import TrialState

        if outcome.problem:
            trial.set_user_attr(_PROBLEM, outcome.problem)
        if outcome.pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
        elif outcome.value is None:
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            self.study.tell(trial, outcome.value)

    def delete_checkpoints(self) -> None:
        """Those of trials that ended and are not the best."""
        if self.config.keep_checkpoints == "all":
            return
        best = self._best()
        for trial in self.trials():
            if trial.state.is_finished() and trial != best:
                run = self.folder / trial.user_attrs[_FOLDER]
                (run / "latest").unlink(missing_ok=True)
                for checkpoint in list_checkpoints(run):
                    shutil.rmtree(checkpoint)

    def check_hope(self) -> None:
        """Stops where all runs fail. Settings that do not go together cost nothing, and count for nothing here."""
        ended = [t for t in self.trials() if t.state.is_finished() and has_run(self.folder / t.user_attrs[_FOLDER])]
        if len(ended) >= _HOPELESS and all(trial.state.name == "FAIL" for trial in ended):
            problem = ended[-1].user_attrs.get(_PROBLEM)
            raise ConfigError(f"the first {len(ended)} runs of {self.folder} all failed; the last:\n{problem}")

    def _best(self) -> FrozenTrial | None:
        done = [trial for trial in self.trials() if trial.state.name == "COMPLETE"]
        sign = 1 if self.config.direction == "minimize" else -1
        return min(done, key=lambda trial: sign * (trial.value or 0.0), default=None)

    def summary(self) -> dict[str, Any]:
        """What all trials found, in the order of their numbers; see `sweep`."""

        def describe(trial: FrozenTrial) -> dict[str, Any]:
            return {
                "number": trial.number,
                "folder": trial.user_attrs.get(_FOLDER),
                "state": trial.state.name.lower(),
                "value": trial.value if trial.state.name == "COMPLETE" else None,
                "settings": settings(self.config.ranges, trial.params),
                "problem": trial.user_attrs.get(_PROBLEM),
            }

        best, about = self._best(), {"dir": str(self.folder), "metric": self.config.metric}
        return about | {"best": best and describe(best), "trials": [describe(trial) for trial in self.trials()]}


def _open(config: SweepConfig) -> Study:
    try:
        import optuna
    except ImportError:
        raise ConfigError("mmctx sweep needs optuna: pip install 'mmctx[sweep]'") from None
    check_keys(config.ranges, load_config(RunConfig, config.config, config.overrides).model_dump(mode="json"))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = Path(config.dir) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{(folder / 'sweep.db').resolve()}"
    study = optuna.create_study(
        storage=storage, study_name=config.name, direction=config.direction, load_if_exists=True
    )
    started = len(study.get_trials(deepcopy=False))  # a later sitting goes on drawing, and does not repeat the first
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + started, constant_liar=True)
    study.pruner = _pruner(config)
    searched = config.model_dump(mode="json", include={"ranges", "metric"})
    before = study.user_attrs.get("searched", searched)
    if before != searched:
        raise ConfigError(
            f"{folder} was begun with {json.dumps(before)}, and is now asked for {json.dumps(searched)}; give it another name"
        )
    study.set_user_attr("searched", searched)
    return study


def _pruner(config: SweepConfig) -> Any:
    from optuna import pruners

    chosen = config.pruner
    makers: dict[str, Callable[[], Any]] = {
        "none": pruners.NopPruner,
        "median": lambda: pruners.MedianPruner(chosen.warmup_trials, chosen.warmup_steps),
        "hyperband": lambda: pruners.HyperbandPruner(min_resource=max(1, chosen.warmup_steps)),
    }
    return makers[chosen.kind]()
