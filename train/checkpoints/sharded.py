"""Checkpoints of parameters that lie in parts on several ranks (FSDP2): torch.distributed.checkpoint, in files of safetensors.

Each rank writes the part of the optimizer's state that it holds, and reads the part that it will hold, whatever number of ranks wrote it.
Weights are gathered tensor by tensor into one `model.safetensors` on the first rank, so that all who read checkpoints find the same files.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmctx.errors import CheckpointError
from mmctx.train.checkpoints.snapshot import Snapshot
from mmctx.train.checkpoints.write import Contents, write_checkpoint


class Shards:
    """All ranks of a run, for threads that save together beside the training loop. Each must make one, at the same time."""

    def __init__(self) -> None:
        from torch.distributed.device_mesh import DeviceMesh

        # A group of its own: what the threads say to each other must not mix with the steps' collectives. gloo, because it is about files.
        self.group: Any = dist.new_group(backend="gloo")
        self.mesh = DeviceMesh.from_group(self.group, "cpu")
        self.is_first = dist.get_rank() == 0

    def gather(self, weights: Mapping[str, Tensor], snapshot: Snapshot) -> dict[str, Tensor]:
        """Host copies of whole tensors, on the first rank; the others help and keep nothing."""
        found = {}
        for name, tensor in weights.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.is_first:
                found[name] = snapshot.copy(name, whole)
        return found

    def parts(self, tensors: Mapping[str, Tensor], snapshot: Snapshot) -> dict[str, Tensor]:
        """Host copies of this rank's parts."""
        return {name: self._part(name, tensor, snapshot) for name, tensor in tensors.items()}

    def _part(self, name: str, tensor: Tensor, snapshot: Snapshot) -> Tensor:
        if not isinstance(tensor, DTensor):
            return snapshot.copy(name, tensor)
        local = snapshot.copy(name, tensor.to_local())
        return DTensor.from_local(
            local, self.mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    def write(self, run_dir: Path, contents: Contents) -> Path | None:
        """Writes the checkpoint with all other ranks; its folder on the first rank.

        Raises:
            CheckpointError: it could not be written, on whichever rank.
        """
        if not self.is_first:
            try:
                _save(contents.optimizer, Path(self._hear()), self.group)
            except OSError as error:
                raise CheckpointError(
                    f"step {contents.state.step}: a checkpoint could not be written ({error})"
                ) from error
            self._hear()
            return None
        others_listen = True

        def write_optimizer(tensors: Mapping[str, Tensor], folder: Path) -> None:
            nonlocal others_listen
            self._tell(str(folder))
            others_listen = False  # they find out by themselves what goes wrong now
            _save(tensors, folder, self.group)
            others_listen = True

        try:
            final = write_checkpoint(run_dir, contents, write_optimizer)
        except Exception as error:
            if others_listen:
                self._tell(None, str(error))
            raise
        self._tell(str(final))
        return final

    def _tell(self, path: str | None, error: str = "") -> None:
        dist.broadcast_object_list([path, error], src=0, group=self.group)

    def _hear(self) -> str:
        heard: list[str | None] = [None, None]
        dist.broadcast_object_list(heard, src=0, group=self.group)
        path, error = heard
        if path is None:
            raise CheckpointError(str(error))
        return path


def is_sharded(model: nn.Module, folder: Path) -> bool:
    """Whether tensors must be put together or taken apart: by this model's ranks, or by those that wrote the folder."""
    return any(isinstance(p, DTensor) for p in model.parameters()) or len(list(folder.glob("*.safetensors"))) > 1


def read_for_ranks(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The optimizer's tensors: of those that lie in parts as a parameter does, this rank's part. Every rank calls it.

    Raises:
        CheckpointError: a file is damaged.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    parameters = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    for place, stored in reader.read_metadata().state_dict_metadata.items():
        parameter = parameters.get(place.rpartition("/")[0])
        if isinstance(parameter, DTensor) and parameter.shape == stored.size:  # type: ignore[union-attr]
            found[place] = torch.empty_like(parameter, dtype=stored.properties.dtype)  # type: ignore[union-attr]
        else:
            found[place] = torch.empty(stored.size, dtype=stored.properties.dtype)  # type: ignore[union-attr]
    alone = not any(isinstance(tensor, DTensor) for tensor in found.values())
    with warnings.catch_warnings(action="ignore"):  # that it is alone, if it is
        try:
            load(found, storage_reader=reader, no_dist=alone)
        except CheckpointException as error:
            raise CheckpointError(f"{folder}: cannot be read ({_first(error)})") from None
    return {place: tensor.detach() for place, tensor in found.items()}


def _save(tensors: Mapping[str, Tensor], folder: Path, group: Any) -> None:
    """Raises what went wrong on the first rank on which it did, on all of them."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(
            dict(tensors),
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
            process_group=group,
        )
    except CheckpointException as error:  # no Exception, for torch
        cause = _first(error)
        raise (cause if isinstance(cause, OSError) else OSError(str(cause))) from None


def _first(error: Any) -> BaseException:
    return next(iter(error.failures.values()))[0]
