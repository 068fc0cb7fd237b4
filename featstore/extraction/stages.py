"""How fast each stage of a pass is, and which one the others wait for."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

DECODE, DEVICE, WRITE = "decode", "device", "write"


@dataclass(slots=True)
class Stage:
    """Time spent and images done by one stage, over all its `workers`; `waits` names what it waited for, in seconds."""

    name: str
    workers: int = 1
    seconds: float = 0.0
    images: int = 0
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    @contextmanager
    def busy(self, images: int) -> Iterator[None]:
        """The time in here was spent on so many images."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(time.perf_counter() - started, images)

    def add(self, seconds: float, images: int) -> None:
        """Count work that was timed elsewhere."""
        with self._lock:
            self.seconds += seconds
            self.images += images

    @property
    def rate(self) -> float | None:
        """Images a second that this stage alone would reach with all its workers; None before the first."""
        return None if not self.images or not self.seconds else self.images * self.workers / self.seconds


class Stages:
    """The three stages of a pass."""

    def __init__(self) -> None:
        self.decode, self.device, self.write = Stage(DECODE), Stage(DEVICE), Stage(WRITE)
        self.starved = 0.0  # seconds in which the device waited for images
        self.blocked = 0.0  # seconds in which it waited for its rows to be written

    @property
    def limiting(self) -> str | None:
        """The stage that the others wait for: by what the device waited for most of the time; None before a batch."""
        if not self.device.images:
            return None
        waits = {DEVICE: self.device.seconds, DECODE: self.starved, WRITE: self.blocked}
        return max(waits, key=lambda name: waits[name])

    def facts(self) -> dict[str, Any]:
        """Rates, seconds and the limiting stage, for records."""
        found: dict[str, Any] = {
            stage.name: {
                "images_per_second": None if stage.rate is None else round(stage.rate, 2),
                "seconds": round(stage.seconds, 3),
                "workers": stage.workers,
            }
            for stage in (self.decode, self.device, self.write)
        }
        found["waited_for_images"] = round(self.starved, 3)
        found["waited_for_writing"] = round(self.blocked, 3)
        found["limiting"] = self.limiting
        return found

    def line(self) -> str:
        """`decode 210/s, device 95/s, write 1200/s (device limits)`, of the stages that ran."""
        rates = [
            f"{stage.name} {stage.rate:.3g}/s"
            for stage in (self.decode, self.device, self.write)
            if stage.rate is not None
        ]
        limit = self.limiting
        return ", ".join(rates) + (f" ({limit} limits)" if rates and limit else "")
