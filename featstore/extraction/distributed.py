"""Which of several processes this one is, and which device is its own; shared by extraction and training.

Extraction needs no process group: ranks own blocks by index and meet in the store alone. What trains or shards a
network joins one with `featstore.backbones.sharding.join_group`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from featstore.configs import RunConfig
from featstore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Ranks:
    """Process `rank` of `world`; `local_rank` of `local_world` on its machine. `launcher` says who numbered them."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    launcher: str = ""

    def __post_init__(self) -> None:
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise ConfigError(
                f"ranks are numbered from 0 below the number of processes; got rank {self.rank} of {self.world}"
            )

    @property
    def speaks(self) -> bool:
        """Whether this process prints for all: the first one that torchrun started; alone, or by --rank, every one."""
        return self.launcher != "torchrun" or self.rank == 0

    @property
    def name(self) -> str:
        """`rank 2 of 8`, or nothing where there is one process."""
        return f"rank {self.rank} of {self.world}" if self.world > 1 else ""

    def own_device(self, device: str) -> str:
        """The device of this process: of several that torchrun started on one machine each has the GPU of its number.

        Raises:
            ConfigError: one GPU is named for several processes of a machine.
        """
        if self.launcher != "torchrun" or self.local_world == 1 or not device.startswith("cuda"):
            return device
        if ":" in device:
            raise ConfigError(
                f"--device {device}: torchrun started {self.local_world} processes here, each of which takes the GPU "
                "of its own number; use --device cuda, or auto"
            )
        return f"cuda:{self.local_rank}"

    @property
    def cores(self) -> int:
        """Processor cores for this process: what it may use, shared among those of its machine."""
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, usable // self.local_world)


def find_ranks(rank: int | None = None, world: int | None = None, environ: Mapping[str, str] | None = None) -> Ranks:
    """Ranks as asked for (--rank, --world: jobs of a Slurm array), else as torchrun set them, else a single process.

    Raises:
        ConfigError: one of `rank` and `world` without the other, numbers that do not fit, or both ways at once.
    """
    environ = os.environ if environ is None else environ
    launched = "TORCHELASTIC_RUN_ID" in environ
    if (rank is None) != (world is None):
        raise ConfigError(
            f"--rank and --world belong together: --rank 0 --world 8; got --rank {rank} --world {world}"
            if rank is not None
            else f"--world {world} needs --rank, the number of this process, from 0 to {int(world or 1) - 1}"
        )
    if rank is not None and world is not None:
        if launched and int(environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("--rank and --world are for processes that start by themselves; leave them to torchrun")
        return Ranks(rank, world, launcher="asked")
    if not launched:
        return Ranks()
    found = [int(environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    return Ranks(found[0], found[1], found[2], found[3], launcher="torchrun")


def ranks_of(run: RunConfig) -> Ranks:
    """The processes that divide the work of a run; where they share one network (--memory shard) one does all of it."""
    return Ranks() if run.memory == "shard" else find_ranks(run.rank, run.world)
