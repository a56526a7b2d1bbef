"""What a folder's weights do not cover when Transformers loads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmctx.hf.build import build_encoders, build_native


class FreshMixin:
    """Fresh weights and constants where a folder has none."""

    def init_weights(self) -> None:
        """Nothing is left to do: whoever builds the model draws its weights."""

    def _init_weights(self, module: nn.Module) -> None:
        """See `init_weights`, and `_initialize_missing_keys` for what a folder lacks."""

    def _move_missing_keys_from_meta_to_device(self, missing_keys: Any, *args: Any, **kwargs: Any) -> None:
        self.__dict__["_missing"] = set(missing_keys)
        parent: Any = super()
        parent._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)

    def _initialize_missing_keys(self: Any, *args: Any, **kwargs: Any) -> None:
        """Models are built without memory before a folder's weights are read, so what no folder holds is computed here: constants of the
        encoders, and fresh weights for parameters that it lacks."""
        parent: Any = super()
        missing = self.__dict__.pop("_missing", set())
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            fresh = build_native(self.config) if missing else None
            encoders = fresh.encoders if fresh is not None else build_encoders(self.config)
        found = {f"encoders.{name}": value for name, value in encoders.named_buffers()}
        found |= (
            {name: value for name, value in fresh.named_parameters() if name in missing} if fresh is not None else {}
        )
        constants = {name for name, _ in self.named_non_persistent_buffers()}
        with torch.no_grad():
            for name in constants | missing:
                place = self.get_parameter_or_buffer(name)
                place.copy_(found[name].to(place.dtype))
        for tensor in (*self.parameters(), *self.buffers()):
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        parent._initialize_missing_keys(*args, **kwargs)
