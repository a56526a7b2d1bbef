"""mmctx: multimodal long-context training.

The names below are what a notebook needs. They load when first used, so that `import mmctx` stays instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmctx.api import build_dataset, build_model, evaluate, load_config, load_model, train

__version__ = "0.1.0"
__all__ = ["build_dataset", "build_model", "evaluate", "load_config", "load_model", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mmctx' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module("mmctx.api"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
