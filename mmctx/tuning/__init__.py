"""Fine-tuning of a few added parameters over frozen weights: `config.py` says which, `apply.py` adds them, `peft_files.py` writes them."""

from mmctx.tuning.apply import apply_tuning, default_freezing, disk_name, merge, unmerge, without_tuning
from mmctx.tuning.config import AnyTuning, FullTuning

__all__ = [
    "AnyTuning",
    "FullTuning",
    "apply_tuning",
    "default_freezing",
    "disk_name",
    "merge",
    "unmerge",
    "without_tuning",
]
