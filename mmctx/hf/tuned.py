"""Checkpoints of tuned runs, opened by Transformers as a whole: LoRA and AdaLoRA folded into the weights, prefixes and bottlenecks put
where they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter
from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from mmctx.errors import CheckpointError, ConfigError
from mmctx.hf.config import MmctxConfig
from mmctx.model import MmctxModel
from mmctx.tuning import AnyTuning, FullTuning, apply_tuning, disk_name, merge, without_tuning
from mmctx.tuning.apply import added_modules

ADDED = [r"\.lora_[ABE]\.", r"\.ranknum\.", r"\.prefix\.weight$", r"\.bottleneck\."]
"""Names of what tunings add, which Transformers leaves to `TunedMixin`."""
_WEIGHTS = "model.safetensors"
_PLACES = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
"""Arguments of `from_pretrained` that say where files are."""


class TunedMixin:
    """Opens and saves what a tuning added."""

    config: MmctxConfig
    native: MmctxModel

    def put_tuning(self, name: Any, options: Mapping[str, Any]) -> None:
        """Puts what the run of a checkpoint added onto its base, whose weights are loaded.

        Args:
            name: folder or repository, as `from_pretrained` takes it.
            options: of `from_pretrained`.

        Raises:
            CheckpointError: `model.safetensors` lacks it.
            ConfigError: the base was loaded onto several devices, or quantized; or peft is needed and not installed.
        """
        tree = (self.config.run or {}).get("train", {}).get("tune")
        tuning: Any = TypeAdapter(AnyTuning).validate_python(tree) if tree else FullTuning()
        if tuning.kind == "full":
            return
        native, devices = self.native, {str(tensor.device) for tensor in self.native.parameters()}
        if len(devices) > 1 or "meta" in devices or getattr(self, "hf_quantizer", None) is not None:
            raise ConfigError(
                f"{name}: was tuned by train.tune.kind={tuning.kind}, which is put onto plain weights on one device; load it without "
                "device_map and quantization, or fold LoRA or AdaLoRA into the weights first: mmctx merge CHECKPOINT OUT"
            )
        # AdaLoRA's budget follows steps, of which there are none any more
        steps = tuning.start + tuning.settle + 2 if tuning.kind == "adalora" else 1
        apply_tuning(native, tuning, steps)
        folded, places = tuning.kind in ("lora", "adalora"), {key: options[key] for key in _PLACES if key in options}
        _load_added(native, name, places, None if folded else native.embedding.weight)
        if folded:
            merge(native)
            self.config.run = without_tuning(self.config.run or {})
        self.__dict__["_of_native"] |= {"tuning": native.tuning, "prefix": native.prefix}
        native.eval()

    def save_pretrained(self, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
        """See `PreTrainedModel.save_pretrained`; layers behind which a bottleneck stands keep the names that they have in checkpoints."""
        if self.native.tuning is not None:
            held = self.native.state_dict() if state_dict is None else state_dict
            state_dict = {disk_name(name): tensor for name, tensor in held.items()}
        save: Any = super().save_pretrained  # type: ignore[reportAttributeAccessIssue]
        save(save_directory, *args, state_dict=state_dict, **kwargs)


def _load_added(native: MmctxModel, name: Any, places: dict[str, Any], like: Tensor | None) -> None:
    """Reads what was added, as it is on the disk, or of the dtype of `like`."""
    added = tuple(f"{path}." for path in added_modules(native))
    wanted = {key: p for key, p in native.named_parameters() if key.startswith(added) or ".ranknum." in key}
    device = next(native.parameters()).device
    path = cached_file(name, _WEIGHTS, **places)
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        if lacking := sorted(set(wanted) - set(file.keys())):
            raise CheckpointError(f"{path}: lacks {lacking[0]}, which train.tune added")
        for key, parameter in wanted.items():
            parameter.data = file.get_tensor(key).to(device, None if like is None else like.dtype)


__all__ = ["ADDED", "TunedMixin"]
