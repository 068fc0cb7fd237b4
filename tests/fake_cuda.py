"""CUDA's streams and events for machines without: they write down what is asked of them, and copies happen at once."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

NAMES = ("Stream", "Event", "current_stream", "stream", "device")


class FakeCuda:
    """Streams are `main` and `side0`, `side1`, ... in the order in which they are made; events have numbers from 1.

    `log` holds `<stream> records <event>`, `<stream> waits for <event>` and `host waits for <event>`. A wait for an
    event that nothing recorded returns at once on a device, so that it protects nothing: `unguarded` counts them.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.count = self.sides = self.unguarded = 0
        self.lock = threading.Lock()
        cuda = self

        class Stream:
            def __init__(self, where: Any = None, name: str = "") -> None:
                self.name = name or f"side{cuda.sides}"
                cuda.sides += not name

            def wait_event(self, event: Any) -> None:
                cuda.unguarded += not event.recorded
                cuda.log.append(f"{self.name} waits for {event.number}")

        class Event:
            def __init__(self) -> None:
                with cuda.lock:
                    cuda.count += 1
                    self.number = cuda.count
                self.recorded = False

            def record(self, stream: Any) -> None:
                self.recorded = True
                cuda.log.append(f"{stream.name} records {self.number}")

            def synchronize(self) -> None:
                cuda.log.append(f"host waits for {self.number}")

        self.Stream, self.Event = Stream, Event
        self.main = Stream(name="main")

    def current_stream(self, where: Any) -> Any:
        return self.main

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put them in the place of torch's."""
        for name in NAMES:
            patch.setattr(torch.cuda, name, getattr(self, name))
