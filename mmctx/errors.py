"""The errors that mmctx raises on purpose. Each message names the file or key, both values and the remedy."""


class MmctxError(Exception):
    """Base of every error a user can meet; the command line prints its message without a traceback and exits with 2."""


class ConfigError(MmctxError):
    """A configuration that cannot be used."""


class DataError(MmctxError):
    """A shard, an index or a sample that cannot be used."""


class SampleError(DataError):
    """One sample cannot be used; at training time it is skipped, with a line in ``skips.jsonl``.

    Attributes:
        reason: a short fixed word that skips are counted by, such as ``undecodable_image``.
        detail: what exactly was found.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self):  # two arguments: the default would break pickling between loader workers
        return (type(self), (self.reason, self.detail))


class SkipBudgetError(DataError):
    """More samples were skipped than the run allows."""


class CheckpointError(MmctxError):
    """A checkpoint that is incomplete, damaged or belongs to another configuration."""


class GuardError(MmctxError):
    """More steps had to be left out, for losses or gradients that were not finite or too large, than the run allows."""


class LeakError(MmctxError):
    """An audit found documents that see each other, or could not have found any."""


class BackendError(MmctxError):
    """An attention backend that cannot run here or cannot do what was asked."""
