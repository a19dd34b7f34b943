"""Latents shared out over processes: what must be told to the others in a step.

Each process holds an equal part of the latents. Rows go to all of them, each encodes its own part, the values
that decide which latents are among the largest are gathered, and the parts of the reconstruction are added.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


class Shards:
    """One process that holds all latents."""

    rank: int = 0
    count: int = 1

    def rows(self, rows: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch inputs"]:
        """The first process's rows."""
        return rows

    def total(self, part: Tensor) -> Tensor:
        """Sum over the processes; all get the same numbers."""
        return part

    def joined(self, part: Tensor) -> Tensor:
        """The processes' tensors of one shape after another along their first dimension."""
        return part

    def part(self, latents: int) -> slice:
        """Which latents are this process's.

        Raises:
            ValueError: the latents do not divide by the processes.
        """
        if latents % self.count:
            raise ValueError(f"{latents} latents cannot be shared out equally over {self.count} processes")
        size = latents // self.count
        return slice(self.rank * size, (self.rank + 1) * size)


class GroupShards(Shards):
    """The processes of a group of torch.distributed."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    def rows(self, rows: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch inputs"]:
        """The first process's rows; the others' are only a buffer of their shape."""
        rows = rows.clone()
        dist.broadcast(rows, group_src=0, group=self.group)
        return rows

    def total(self, part: Tensor) -> Tensor:
        """Sum over the processes; all get the same numbers."""
        part = part.clone()
        dist.all_reduce(part, group=self.group)
        return part

    def joined(self, part: Tensor) -> Tensor:
        """The processes' tensors of one shape after another along their first dimension."""
        parts = [torch.empty_like(part) for _ in range(self.count)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts)
