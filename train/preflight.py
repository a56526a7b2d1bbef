"""What would only fail after hours of training is looked at before the first step."""

from __future__ import annotations

from importlib.util import find_spec

from mmctx.datasets.shards.index import expand_shards
from mmctx.errors import ConfigError
from mmctx.eval import SUITES, known_suites
from mmctx.eval.packages import require
from mmctx.train.config import RunConfig
from mmctx.train.trackers import EXTRAS


def check_run(config: RunConfig) -> None:
    """Looks for what logging and the evaluation at the end will need.

    Raises:
        ConfigError: an unknown suite, one that lacks its settings, or a package that is not installed.
        DataError: held-out shards, or files of a suite, that do not exist.
    """
    for name in config.train.trackers:
        if find_spec(name) is None:
            extra = EXTRAS[name]
            raise ConfigError(f"train.trackers: {name} is not installed: pip install 'mmctx[{extra}]'")
    if not config.eval.sources:
        return
    suites: list[str] = []
    for key in ("suites", "loop_suites") if config.eval.every else ("suites",):
        try:
            suites += known_suites(getattr(config.eval, key))
        except ConfigError as error:
            raise ConfigError(f"eval.{key}: {error}") from None
    for source in config.eval.sources.values():
        expand_shards(source.shards, config.data.remote_cache)
    require("jinja2")  # of the report
    for name in dict.fromkeys(suites):
        SUITES[name].check(config.eval)
