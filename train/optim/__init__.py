"""How weights change: optimizers, settings of single modules, the learning rate's course, averaged weights, steps that are not taken."""

from mmctx.train.optim.learning_rate import learning_rate
from mmctx.train.optim.optimizer import build_optimizer

__all__ = ["build_optimizer", "learning_rate"]
