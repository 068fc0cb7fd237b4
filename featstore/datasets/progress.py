"""Progress of adapters that must open files: whoever registers may watch, an adapter only says how far it is."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Watcher = Callable[[str, int, int], None]  # what is done, how many of how many
_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def told(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Go through `items` and tell the watcher after each."""
    watcher = _WATCHER.get()
    for number, item in enumerate(items, 1):
        yield item
        if watcher is not None:
            watcher(what, number, total)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Be told of the progress of adapters that run inside."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)
