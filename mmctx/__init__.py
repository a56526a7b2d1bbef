"""mmctx: multimodal long-context training.

The names below are what a notebook needs. They load when first used, so that `import mmctx` stays instant.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmctx.api import (
        build_dataset,
        build_model,
        evaluate,
        export,
        load_config,
        load_model,
        recall_curve,
        report,
        train,
    )

__version__ = "0.1.0"
__all__ = [
    "build_dataset",
    "build_model",
    "evaluate",
    "export",
    "load_config",
    "load_model",
    "recall_curve",
    "report",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mmctx' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module("mmctx.api"), name)


class _Package(ModuleType):
    """This package, with `train` always the function of that name.

    Importing anything below `mmctx.train` makes Python bind the name to the subpackage, which cannot be called. It is
    imported by its full path: `from mmctx.train.loop import ...`, not `import mmctx.train.loop as loop`.
    """

    @property
    def train(self) -> Any:
        return __getattr__("train")

    @train.setter
    def train(self, subpackage: ModuleType) -> None:
        """Where Python would bind the subpackage."""


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
