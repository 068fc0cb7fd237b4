"""A network cut over the processes of a torch.distributed group: each keeps its share of every block.

FSDP2 gathers a block before it runs and lets it go behind it; what stands outside the blocks is whole in every process.
Rank 0 has a backbone as any other: it cuts each batch over the ranks and gathers their tokens. The other ranks call
`serve`, which ends with rank 0's `close`. All ranks gather blocks together, so an error in one of them ends all: it is
left in the group's store, the group is taken down, and every rank raises it.
"""

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from featstore.backbones.architecture import Architecture
from featstore.backbones.family import HubKey
from featstore.backbones.streaming import Piece
from featstore.backbones.tensors import Tensors
from featstore.backbones.tokens import Tokens
from featstore.errors import ConfigError, DeviceError

if TYPE_CHECKING:
    from featstore.backbones.network import NetworkBackbone

FAILURE = "featstore/failure"  # key in the group's store: what ended it
RUN, STOP = "run", "stop"
PATIENCE = timedelta(hours=24)  # of a rank that waits for the next batch


def join_group(device: str) -> None:
    """Join the group of the processes that torchrun started, unless that is done: nccl on GPUs, gloo on CPUs.

    Raises:
        ConfigError: torchrun did not start this process.
    """
    if dist.is_initialized():
        return
    if not dist.is_torchelastic_launched():
        raise ConfigError(
            "--memory shard cuts the network over several processes; start them by "
            "torchrun --nproc-per-node N -m featstore extract ..."
        )
    # Rank 0 decodes and measures while the others wait; torchrun ends them if it dies.
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)


def own_device(device: torch.device, asked: str) -> torch.device:
    """The device of this process: where `cuda` was asked for, the one of its number on this machine.

    Raises:
        ConfigError: there is no group of processes, or a single GPU was asked for.
    """
    if not dist.is_initialized():
        raise ConfigError("--memory shard needs a torch.distributed group; start the command by torchrun")
    if ":" in asked:
        raise ConfigError(f"--memory shard uses one device per process; ask for cuda instead of {asked}")
    if device.type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank(fallback_rank=0))
        torch.cuda.set_device(device)
    return device


def shard_blocks(
    network: nn.Module, blocks: nn.Module, layout: Sequence[Sequence[Piece]], tensors: Tensors, device: torch.device
) -> None:
    """Give every block of a network, empty so far, this rank's share of its weights.

    A matrix whose rows divide evenly is read in that share only, any other weight whole, one at a time.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    inner = {id(parameter) for parameter in blocks.parameters()}
    outer = {parameter for parameter in network.parameters() if id(parameter) not in inner}
    for block, pieces in zip(blocks.children(), layout):
        for piece in pieces:
            _put(block, piece.name, torch.empty(piece.shape, dtype=piece.dtype, device="meta"))
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        held = {(module, name): value for module in block.modules() for name, value in module._buffers.items()}
        block.to_empty(device=device)
        for (module, name), value in held.items():  # what is computed and no weight
            module._buffers[name] = value
        for piece in pieces:
            parameter: Any = block.get_parameter(piece.name)
            _read_share(tensors, piece, parameter.to_local())
    # The root has nothing to gather; it lends the blocks one stream and one pool of buffers.
    fully_shard(network, mesh=mesh, reshard_after_forward=False, ignored_params=outer)


def _put(block: nn.Module, name: str, values: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(block.get_submodule(owner), attribute, nn.Parameter(values, requires_grad=False))


def _read_share(tensors: Tensors, piece: Piece, share: Float[Tensor, "..."]) -> None:
    """Rows of a weight that belong to this rank, as FSDP2 cuts them: like `torch.chunk`."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if piece.key is None:
        share.zero_()
        return
    if not share.numel():
        return
    rows, key = piece.shape[0], piece.key
    stored = tensors.shapes[key.name] if tensors.shapes is not None else (rows * key.parts, *piece.shape[1:])
    if rows % world == 0 and len(piece.shape) > 1 and stored[0] == rows * key.parts:
        key = HubKey(key.name, key.part * world + rank, key.parts * world)
        share.copy_(tensors.read(key, tuple(share.shape), piece.dtype))
        return
    start = rank * math.ceil(rows / world)
    share.copy_(tensors.read(key, piece.shape, piece.dtype)[start : start + len(share)])


class ShardedBackbone:
    """One rank's part of a sharded network; a `Backbone` on rank 0."""

    memory = "shard"
    streams = False

    def __init__(self, backbone: "NetworkBackbone") -> None:
        self.backbone = backbone
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._open = True

    @property
    def architecture(self) -> Architecture:
        """Facts about the network."""
        return self.backbone.architecture

    @property
    def kernel(self) -> str | None:
        """The attention that runs."""
        return self.backbone.kernel

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Type in which it computes and of the tokens."""
        return self.backbone.dtype

    def __call__(self, pixels: Float[Tensor, "B 3 H W"], *, layers: tuple[int, ...] = ()) -> Tokens:
        """Tokens of a batch, computed by all ranks in equal parts; on rank 0 only.

        Raises:
            ConfigError: the size is no multiple of the patch size, a layer does not exist, another rank than 0 calls,
                or the backbone is closed.
            DeviceError: a rank failed; the group is gone then.
        """
        if self.rank != 0 or not self._open:
            state = f"rank {self.rank} runs serve()" if self.rank else "this backbone is closed"
            raise ConfigError(f"only rank 0 gives a sharded backbone images, until it closes it; {state}")
        self.architecture.check_size(*pixels.shape[2:])
        self.architecture.block_numbers(layers)
        try:
            self._send((RUN, tuple(pixels.shape), layers))
            return self._run(tuple(pixels.shape), layers, pixels)
        except Exception as error:
            self._fail(error)

    def serve(self) -> None:
        """Compute this rank's parts of rank 0's batches until it closes the backbone.

        Raises:
            ConfigError: called on rank 0.
            DeviceError: a rank failed, or rank 0 is gone.
        """
        if self.rank == 0:
            raise ConfigError("rank 0 gives the images; the other ranks serve()")
        while self._open:
            try:
                command, *arguments = self._send(None)
                if command == STOP:
                    self._open = False
                else:
                    shape, layers = arguments
                    self._run(shape, layers, None)
            except Exception as error:
                self._fail(error)

    def close(self) -> None:
        """Let the other ranks return from `serve`; the group stays."""
        if self._open and self.rank == 0:
            self._send((STOP,))
        self._open = False

    def _send(self, message: tuple[Any, ...] | None) -> tuple[Any, ...]:
        """Rank 0's message, on every rank."""
        box = [message]
        dist.broadcast_object_list(box, src=0, device=self.device)
        assert box[0] is not None
        return box[0]

    def _run(self, shape: tuple[int, ...], layers: tuple[int, ...], pixels: Tensor | None) -> Tokens:
        """One batch, in lockstep with the other ranks; what it returns is whole on rank 0."""
        share = math.ceil(shape[0] / self.world)
        mine = torch.empty((share, *shape[1:]), dtype=self.dtype, device=self.device)
        parts = None
        if pixels is not None:
            padded = torch.zeros((share * self.world, *shape[1:]), dtype=self.dtype, device=self.device)
            padded[: shape[0]] = pixels
            parts = list(padded.chunk(self.world))
        dist.scatter(mine, parts, src=0)
        return self._gather(self.backbone(mine, layers=layers), shape[0])

    def _gather(self, tokens: Tokens, count: int) -> Tokens:
        return Tokens(
            cls=self._join(tokens.cls, count),
            registers=self._join(tokens.registers, count),
            patches=self._join(tokens.patches, count),
            layers={number: self._gather(inner, count) for number, inner in tokens.layers.items()},
        )

    def _join(self, values: Tensor, count: int) -> Tensor:
        """The rows of all ranks on rank 0, without those of the padding; elsewhere this rank's own."""
        if not values.numel():  # no registers
            return values.new_empty((count, *values.shape[1:]))
        parts = [torch.empty_like(values) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(values.contiguous(), parts, dst=0)
        return torch.cat(parts)[:count] if parts is not None else values

    def _fail(self, error: Exception) -> NoReturn:
        """Take the group down, so that nobody waits for this rank, and say what was the first to go wrong.

        Raises:
            DeviceError: always.
        """
        self._open = False
        said = f"rank {self.rank} of {self.world}: {type(error).__name__}: {error}"
        try:
            store = dist.distributed_c10d._get_default_store()
            # The first to come is the cause; whoever waited for it only sees a connection end.
            said = store.compare_set(FAILURE, "", said).decode()
        except Exception as lost:  # the store went with the rank that kept it
            said += f" (the group's store is gone too: {type(lost).__name__})"
        if dist.is_initialized():
            dist.destroy_process_group()
        raise DeviceError(f"the sharded network failed on {said}") from error
