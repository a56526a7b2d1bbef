"""Which ranks read different bins, and which share one."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from mmctx.errors import ConfigError
from mmctx.pack import PackedBatch
from mmctx.parallel.shard import shard_batch


@dataclass(frozen=True, slots=True)
class Mesh:
    """One process's place in the mesh of `data_size` x `sequence_size` ranks.

    Ranks that follow each other share a bin: they are those with the fastest links. All ranks hold all parameters.

    Attributes:
        data_rank, data_size: which of the global batch's bins this process reads.
        sequence_rank, sequence_size: which part of each bin it computes.
        group: the ranks that share its bins; None where there is one.
    """

    data_rank: int = 0
    data_size: int = 1
    sequence_rank: int = 0
    sequence_size: int = 1
    group: dist.ProcessGroup | None = None

    def shard(self, batch: PackedBatch) -> PackedBatch:
        """This rank's part of a batch that all ranks of the group read; the batch itself where nobody shares it. On the host."""
        if self.group is None:
            return batch
        return shard_batch(batch, self.sequence_rank, self.sequence_size, self.group)

    def once(self, numbers: list[int]) -> list[int]:
        """What this rank adds to a sum over all ranks of something that its whole group counted: zeros on all ranks of a group but one."""
        return numbers if self.sequence_rank == 0 else [0] * len(numbers)

    @property
    def dropout_key(self) -> tuple[int, ...]:
        """What dropout's seed has besides the bin: ranks that share one must not drop alike, and alone nothing changes."""
        return (self.sequence_rank,) if self.sequence_size > 1 else ()


def build_mesh(device_type: str, rank: int, world_size: int, sequence_size: int) -> Mesh:
    """The mesh of all processes; with several to a bin, each must call this.

    Args:
        device_type: "cpu" or "cuda".
        rank: of this process.
        world_size: number of processes.
        sequence_size: processes that share a bin.

    Raises:
        ConfigError: `sequence_size` does not divide `world_size`.
    """
    if world_size % sequence_size:
        raise ConfigError(
            f"train.sequence_parallel={sequence_size} needs a number of processes that is a multiple of it, found {world_size}; start "
            f"{-(-world_size // sequence_size) * sequence_size} (torchrun --nproc-per-node), or set train.sequence_parallel=1"
        )
    data_size = world_size // sequence_size
    if sequence_size == 1:
        return Mesh(data_rank=rank, data_size=data_size)
    ranks = init_device_mesh(device_type, (data_size, sequence_size), mesh_dim_names=("data", "sequence"))
    return Mesh(
        data_rank=rank // sequence_size,
        data_size=data_size,
        sequence_rank=rank % sequence_size,
        sequence_size=sequence_size,
        group=ranks.get_group("sequence"),
    )
