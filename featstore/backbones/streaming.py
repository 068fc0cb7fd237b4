"""A network larger than its device: each block's weights are there only while the block runs.

Two buffers take turns: while block k computes out of one, block k + 1 is read into the other by a thread. Behind the
last block comes the first, for the next batch. transformers' own forward runs unchanged: hooks put the weights in place
before a block and take them away behind it, so the tokens are those of the resident network, bit for bit.

On a GPU the blocks pass through pinned host memory: all of them stay there where it has room, else two at a time are
read again from their source, and copies to the device run on a stream of their own.

Reading hides behind computing when a batch is large enough: with F FLOP/s, W bytes/s and n bytes a number that is
F n / (2 W) tokens, 4,000 for bfloat16 on a card of 100 TFLOP/s behind a bus of 25 GB/s, and a few hundred on a CPU.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from featstore.backbones.devices import free_bytes, margin
from featstore.backbones.family import HubKey
from featstore.backbones.tensors import Tensors

ALIGNMENT = 512  # bytes: as torch's own allocations on a GPU, so that the same kernels are chosen


@dataclass(frozen=True, slots=True)
class Piece:
    """One weight of a block: its name below the block, its source (None: it is zero) and its place in a buffer."""

    name: str
    key: HubKey | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def bytes(self) -> int:
        """Of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, buffer: Shaped[Tensor, " N"]) -> Shaped[Tensor, "..."]:
        """The weight within a buffer of bytes."""
        return buffer[self.start : self.start + self.bytes].view(self.dtype).view(self.shape)


def lay_out(
    live: Mapping[str, tuple[tuple[int, ...], torch.dtype]], keys: Mapping[str, HubKey], blocks: str
) -> list[tuple[Piece, ...]]:
    """The weights of every block, one behind the other in a buffer.

    Args:
        live: shape and type of every weight of the network.
        keys: where they come from.
        blocks: name of the network's list of blocks.
    """
    if not blocks:
        return []
    found: dict[int, list[Piece]] = {}
    ends: dict[int, int] = {}
    for name, (shape, dtype) in live.items():
        if not name.startswith(f"{blocks}."):
            continue
        number, _, rest = name.removeprefix(f"{blocks}.").partition(".")
        start = ends.get(int(number), 0)
        piece = Piece(rest, keys.get(name), shape, dtype, start)
        found.setdefault(int(number), []).append(piece)
        ends[int(number)] = start + -(-piece.bytes // ALIGNMENT) * ALIGNMENT
    return [tuple(found[number]) for number in range(len(found))]


def length_of(pieces: Sequence[Piece]) -> int:
    """Bytes of a buffer for one block."""
    return max((-(-(piece.start + piece.bytes) // ALIGNMENT) * ALIGNMENT for piece in pieces), default=0)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


class Slot:
    """A buffer on the device; on a GPU `ready` and `free` say when it is filled and when its block has run."""

    def __init__(self, layout: Sequence[Sequence[Piece]], device: torch.device) -> None:
        self.buffer = torch.empty(max(length_of(pieces) for pieces in layout), dtype=torch.uint8, device=device)
        self.views = [{piece.name: piece.view(self.buffer) for piece in pieces} for pieces in layout]
        self.ready = _event() if device.type == "cuda" else None
        self.free = _event() if device.type == "cuda" else None
        if self.free is not None:  # the buffer may be memory that this stream's queued kernels still read
            self.free.record(torch.cuda.current_stream(device))


class _Feed(Protocol):
    """How a slot gets the weights of a block; called in the reading thread."""

    def load(self, block: int, slot: Slot) -> None:
        """Fill the slot, or start to."""

    def prepare(self, block: int) -> None:
        """What can be done ahead for a block that has no slot yet."""


def read_block(tensors: Tensors, pieces: Sequence[Piece], views: Mapping[str, Tensor]) -> None:
    """Read all weights of a block into their places on the CPU."""
    for piece in pieces:
        if piece.key is None:
            views[piece.name].zero_()
        else:
            tensors.read_into(piece.key, views[piece.name])


class _HostFeed:
    """The CPU: slots are filled from the source itself."""

    def __init__(self, tensors: Tensors, layout: Sequence[Sequence[Piece]]) -> None:
        self._tensors, self._layout = tensors, layout

    def load(self, block: int, slot: Slot) -> None:
        read_block(self._tensors, self._layout[block], slot.views[block])

    def prepare(self, block: int) -> None:
        """Nothing: both slots are taken."""


class _PinnedFeed:
    """A GPU: through pinned memory, which holds all blocks or two that take turns."""

    def __init__(self, tensors: Tensors, layout: Sequence[Sequence[Piece]], device: torch.device) -> None:
        self._tensors, self._layout, self._device = tensors, layout, device
        length = max(length_of(pieces) for pieces in layout)
        count = len(layout) if fits_host(len(layout) * length) else 2
        held = torch.empty((count, length), dtype=torch.uint8, pin_memory=True)
        self._stages = list(held)
        self._blocks: list[int | None] = [None] * count  # which block a stage holds
        self._copied = [_event() for _ in range(count)]
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def prepare(self, block: int) -> None:
        """Read a block into its stage, unless it is there, once the copy of the one before has left it."""
        index = block % len(self._stages)
        if self._blocks[index] == block:
            return
        self._copied[index].synchronize()
        self._blocks[index] = None  # should reading fail
        stage, pieces = self._stages[index], self._layout[block]
        read_block(self._tensors, pieces, {piece.name: piece.view(stage) for piece in pieces})
        self._blocks[index] = block

    def load(self, block: int, slot: Slot) -> None:
        """Start the copy to the device, behind the block that runs out of this slot."""
        self.prepare(block)
        index, length = block % len(self._stages), length_of(self._layout[block])
        assert slot.free is not None
        assert slot.ready is not None
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.free)
            slot.buffer[:length].copy_(self._stages[index][:length], non_blocking=True)
            slot.buffer.record_stream(self._stream)  # no reuse before the copy is done, should the backbone go
            self._copied[index].record(self._stream)
            slot.ready.record(self._stream)


def fits_host(needed: int) -> bool:
    """Whether pinned memory can hold so many bytes: torch rounds up to a power of two."""
    free = free_bytes(torch.device("cpu"))
    rounded = 1 << max(0, needed - 1).bit_length()
    return free is not None and rounded + margin(needed) <= free


class Streamer:
    """Gives the blocks of one network their weights in turn; its hooks belong to the blocks and die with them."""

    def __init__(self, blocks: nn.Module, layout: Sequence[Sequence[Piece]], tensors: Tensors, device: torch.device):
        self._layout = layout
        self._slots = (Slot(layout, device), Slot(layout, device))
        self._nothing = Slot(layout, torch.device("meta"))
        self._feed: _Feed = (
            _PinnedFeed(tensors, layout, device) if device.type == "cuda" else _HostFeed(tensors, layout)
        )
        self._current = 0  # the slot of the block that runs, or ran last
        self._coming: tuple[int, Future[None]] | None = None  # (block, the reading of it) in the other slot
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="featstore-blocks")
        for number, block in enumerate(blocks.children()):
            # They must not hold the network, or it would not go away with its last user.
            block.register_forward_pre_hook(partial(self._enter, number))
            block.register_forward_hook(partial(self._leave, number), always_call=True)
            _put(block, self._nothing.views[number])
        self._fetch(0)

    def _fetch(self, number: int) -> None:
        """Have a block read into the slot that does not run."""
        slot = self._slots[1 - self._current]
        # The thread holds the feed and the slot, never this object: it ends when the backbone is dropped.
        self._coming = number, self._reader.submit(self._feed.load, number, slot)
        self._reader.submit(self._feed.prepare, (number + 1) % len(self._layout))

    def _enter(self, number: int, block: nn.Module, inputs: Any) -> None:
        """Before a block: its weights in place, the next ones on their way."""
        if self._coming is None or self._coming[0] != number:
            self._fetch(number)  # behind what is being read into that slot
        assert self._coming is not None
        coming, self._coming = self._coming[1], None
        coming.result()
        self._current = 1 - self._current
        slot = self._slots[self._current]
        if slot.ready is not None:
            torch.cuda.current_stream(slot.buffer.device).wait_event(slot.ready)
        _put(block, slot.views[number])
        self._fetch((number + 1) % len(self._layout))

    def _leave(self, number: int, block: nn.Module, inputs: Any, output: Any) -> None:
        """Behind a block, also where it failed."""
        slot = self._slots[self._current]
        if slot.free is not None:
            slot.free.record(torch.cuda.current_stream(slot.buffer.device))
        _put(block, self._nothing.views[number])


def _put(block: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Weights, by their names below a block, in their places."""
    for name, value in values.items():
        owner, _, attribute = name.rpartition(".")
        module = block.get_submodule(owner)
        if attribute in module._parameters:
            module._parameters[attribute] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[attribute] = value
