"""Threads that each take whole blocks of rows.

A parallel region inside every small operation costs a scheduler tick per operation on a busy machine (measured: 8 ms
where the work takes 0.3 ms). So every torch operation runs in one thread here, and several blocks run side by side.
Results come back in block order, so that sums do not depend on the number of threads.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Out = TypeVar("Out")


class Workers:
    """A thread pool that holds at most as many results as it has threads."""

    def __init__(self, pool: ThreadPoolExecutor, count: int) -> None:
        self.pool, self.count = pool, count

    def map(self, work: Callable[[Any], Out], items: list[Any]) -> Iterator[Out]:
        """`work` on every item, results in order; a single item, or one thread, needs no hand-over."""
        if self.count == 1 or len(items) == 1:
            yield from map(work, items)
            return
        for first in range(0, len(items), self.count):
            yield from self.pool.map(work, items[first : first + self.count])

    def share(self, work: Callable[[slice], object], num_items: int) -> None:
        """`work` on one run of items per thread, where a hand-over per item would cost more than the item."""
        size = -(-num_items // self.count)
        for _ in self.map_blocks(work, num_items, size):
            pass

    def map_blocks(self, work: Callable[[slice], Out], num_rows: int, size: int) -> Iterator[Out]:
        """`work` on consecutive slices of `size` rows, results in order."""
        return self.map(work, [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)])


@contextmanager
def worker_threads() -> Iterator[Workers]:
    """As many workers as torch has threads; torch itself is held to one thread per operation meanwhile."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Numbers below 1e-38 take a product a hundred times longer, and weigh nothing in a mean over rows.
        with ThreadPoolExecutor(count, initializer=torch.set_flush_denormal, initargs=(True,)) as pool:
            yield Workers(pool, count)
    finally:
        torch.set_num_threads(count)
