"""Batches to a device and rows back: on streams of their own where the device has any, so that it never waits."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from featstore.backbones.compiling import compilation_of
from featstore.backbones.tokens import Backbone
from featstore.records import processor_name

SLOTS = 3  # one batch being copied, one being computed, one that the host fills


@dataclass(slots=True)
class _Slot:
    """A batch's place in pinned memory of the host and on the device, and when each is free again."""

    host: Tensor
    device: Tensor
    copied: Any = None  # CUDA events, None before the first use
    used: Any = None


@dataclass(frozen=True, slots=True)
class Landing:
    """Rows on their way to the host; `kept` are those on the device, which must live as long as they are copied."""

    rows: dict[str, Tensor]
    kept: dict[str, Tensor]
    event: Any = None

    def wait(self) -> dict[str, Tensor]:
        """The rows, once they are there."""
        if self.event is not None:
            self.event.synchronize()
        return self.rows


class Transfers:
    """Uploads and downloads of one run; on a CPU they cost nothing.

    A call of `upload` is followed by one of `download` in the same thread, which queues work on the current stream in
    between. Nothing here waits for the device, but for a slot that is still in use.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._is_cuda = self.device.type == "cuda"
        self._rings: dict[tuple[Any, ...], Any] = {}
        self._current: _Slot | None = None
        self._streams: dict[str, Any] = defaultdict(lambda: torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]

    def upload(
        self, pixels: UInt8[np.ndarray, "B C H W"] | Float32[np.ndarray, "B C H W"], size: int
    ) -> UInt8[Tensor, "N C H W"] | Float32[Tensor, "N C H W"]:
        """`size` images on the device, those behind `pixels` zeros."""
        images = torch.from_numpy(pixels)
        if not self._is_cuda:
            if len(images) < size:
                images = torch.cat([images, images.new_zeros((size - len(images), *images.shape[1:]))])
            return images
        slot = self._next_slot((size, *images.shape[1:]), images.dtype)
        if slot.copied is not None:
            slot.copied.synchronize()
        slot.host[: len(images)].copy_(images)
        slot.host[len(images) :].zero_()
        stream = self._streams["upload"]
        with torch.cuda.stream(stream):
            if slot.used is not None:
                stream.wait_event(slot.used)
            slot.device.copy_(slot.host, non_blocking=True)
            slot.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            slot.copied.record(stream)
        torch.cuda.current_stream(self.device).wait_event(slot.copied)
        self._current = slot
        return slot.device

    def download(self, rows: dict[str, Tensor]) -> Landing:
        """Start copying rows to the host."""
        if not self._is_cuda:
            return Landing(rows, {})
        computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        computed.record(torch.cuda.current_stream(self.device))
        if self._current is not None:
            self._current.used, self._current = computed, None
        stream = self._streams["download"]
        with torch.cuda.stream(stream):
            stream.wait_event(computed)
            # Pinned memory comes from torch's cache of it: as many buffers as rows are on their way.
            hosts = {name: _pinned(tuple(values.shape), values.dtype) for name, values in rows.items()}
            for name, values in rows.items():
                hosts[name].copy_(values, non_blocking=True)
            landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            landed.record(stream)
        return Landing(hosts, rows, landed)

    def _next_slot(self, shape: tuple[int, ...], dtype: torch.dtype) -> _Slot:
        key = (shape, dtype)
        if key not in self._rings:  # grey and coloured batches may take turns
            slots = [_Slot(_pinned(shape, dtype), torch.empty(shape, dtype=dtype, device=self.device))]
            slots += [_Slot(_pinned(shape, dtype), torch.empty_like(slots[0].device)) for _ in range(SLOTS - 1)]
            # Memory that this stream gave back may still be read by its queued kernels: uploads wait for those.
            allocated = torch.cuda.Event()  # type: ignore[no-untyped-call]
            allocated.record(torch.cuda.current_stream(self.device))
            for slot in slots:
                slot.used = allocated
            self._rings[key] = cycle(slots)
        found: _Slot = next(self._rings[key])
        return found


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def facts_of(backbone: Backbone) -> dict[str, Any]:
    """How a backbone ran, for the run's record: device, kernel, memory, compilation, and what float32 meant."""
    device = backbone.device
    return {
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "kernel": getattr(backbone, "kernel", None),
        "memory": str(getattr(backbone, "memory", "resident")),
        "compile": compilation_of(backbone).ran,
        # Convolutions never use TF32 in a `NetworkBackbone`; products do where the process was told so.
        "tf32": device.type == "cuda" and torch.get_float32_matmul_precision() != "highest",
        "threads": torch.get_num_threads(),
    }
