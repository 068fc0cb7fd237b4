"""The processes that train one network together, as torchrun starts them; one alone is a team too.

Which images belong to a step is decided without them: a process takes its share of a batch that is the same for every
number of processes, and gradients are summed over rows before they are divided by the count of all.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float32, Int64, Shaped
from torch import Tensor, nn

from featstore.backbones.trainable import Trainable
from featstore.errors import ConfigError, Stopped
from featstore.extraction.distributed import find_ranks
from featstore.extraction.stopping import AGAIN, Stop

SHARD_ABOVE = 1_000_000_000  # parameters: DINOv2-g and larger
PATIENCE = timedelta(hours=2)  # of a rank that waits for another one that writes a checkpoint


class Team:
    """This process among those that train together; all of them make the same calls in the same order.

    `device` is this process's own.
    """

    def __init__(self, device: str = "cpu") -> None:
        ranks = find_ranks()
        self.rank, self.world = ranks.rank, ranks.world
        self.device = ranks.own_device(device)
        self._made = False
        if self.world > 1 and not dist.is_initialized():
            if self.device.startswith("cuda"):
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.startswith("cuda") else "gloo", timeout=PATIENCE)
            self._made = True

    def close(self) -> None:
        """Leave the group that was joined here."""
        if self._made:
            dist.destroy_process_group()
            self._made = False

    @property
    def writes(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def share(self, count: int) -> tuple[Int64[np.ndarray, " m"], Bool[np.ndarray, " m"]]:
        """(this process's positions of 0..count-1, which of them count).

        Every process has as many; those that do not count repeat the first position, so that no process waits.
        """
        size = -(-count // self.world)
        places = np.arange(size) * self.world + self.rank
        return np.where(places < count, places, 0), places < count

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64."""
        if self.world == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Of each flag whether any process has set it."""
        if self.world == 1:
            return list(flags)
        return [value > 0 for value in self.sum([float(flag) for flag in flags])]

    def join(self, mine: Float32[Tensor, "m L"], count: int) -> Float32[Tensor, "N L"]:
        """Rows of all processes in the order of their positions (see `share`), on every process."""
        if self.world == 1:
            return mine[:count]
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)[:count]

    def objects(self, mine: Any) -> list[Any]:
        """What every process gives, by rank."""
        if self.world == 1:
            return [mine]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine)
        return found

    def equalise(self, values: Sequence[Shaped[Tensor, "..."]]) -> None:
        """Give all processes the first one's values, such as running statistics."""
        if self.world > 1:
            for value in values:
                dist.broadcast(value, src=0)

    def stopped(self, stop: Stop | None) -> Stopped:
        """What all processes raise when one of them was asked to end; all have the exit status that says who asked.

        Otherwise one whose clock is slower than that of another one would end as if all were done.
        """
        reason = stop.reason if stop is not None and stop.reason else "stopped on another process"
        code = 0 if stop is None else stop.code
        return Stopped(f"{reason}; {AGAIN}", max(self.objects(code)))

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()

    def wrap(self, model: nn.Module, trainable: Trainable, *, shard: bool) -> nn.Module:
        """The module to call in training: the model itself, or one that sums gradients over all processes.

        With `shard` weights, gradients and optimiser state are cut over the processes (FSDP2), block by block.

        Raises:
            ConfigError: `shard` without other processes.
        """
        if shard:
            if self.world == 1:
                raise ConfigError("sharding cuts a network over several processes; start them by torchrun")
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(torch.device(self.device).type, (self.world,))
            for block in trainable.blocks:
                fully_shard(block, mesh=mesh)
            # Also the root, which would stay gathered after a pass without gradients, and then miss new weights.
            fully_shard(model, mesh=mesh, reshard_after_forward=True)
            return model
        if self.world == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        devices = [torch.device(self.device)] if self.device.startswith("cuda") else None
        return DistributedDataParallel(model, device_ids=devices)


def should_shard(asked: bool | None, trainable: Trainable, world: int) -> bool:
    """Whether a network is cut over the processes: as asked for, else from `SHARD_ABOVE` parameters on."""
    if asked is not None:
        return asked
    return world > 1 and sum(value.numel() for value in trainable.network.parameters()) >= SHARD_ABOVE


def whole(value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """A tensor that may be cut over processes, whole on this one; a call of all of them."""
    if hasattr(value, "full_tensor"):
        found: Tensor = value.full_tensor()
        return found
    return value


def put(target: Shaped[Tensor, "..."], value: Shaped[Tensor, "..."]) -> None:
    """Copy a whole tensor into one that may be cut over processes; a call of all of them."""
    with torch.no_grad():
        target.copy_(like(target, value))


def like(target: Shaped[Tensor, "..."], value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """A whole tensor in the place and type of another one, and cut as that is."""
    moved = value.to(device=target.device, dtype=target.dtype)
    if not hasattr(target, "full_tensor"):
        return moved
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    return distribute_tensor(moved, target.device_mesh, target.placements)
