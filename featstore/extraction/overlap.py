"""Two stages at once: what one thread makes another one takes, a few items behind, and they end together."""

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Stopped(Exception):
    """The other side has gone."""


class _Channel(Generic[Item]):
    """A queue of at most `size` items that either side can close."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._finished = self._stopped = False

    def put(self, item: Item) -> None:
        """Add an item, when there is room.

        Raises:
            _Stopped: nobody takes it any more.
        """
        with self._changed:
            while len(self._items) >= self._size and not self._stopped:
                self._changed.wait()
            if self._stopped:
                raise _Stopped
            self._items.append(item)
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Item]:
        while True:
            with self._changed:
                while not self._items and not self._finished and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    raise _Stopped
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
            del item  # or it lives on while the next one is waited for

    def finish(self) -> None:
        """No more items will come."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Let go of everything at once."""
        with self._changed:
            self._stopped = True
            self._items.clear()
            self._changed.notify_all()


def overlapped(
    items: Iterable[Item], consume: Callable[[Iterator[Item]], Result], *, ahead: int, name: str = "write"
) -> Result:
    """`consume(items)`, in a thread of its own, while this thread makes the items; at most `ahead` wait in between.

    Items are made in the calling thread, where Ctrl-C arrives. What either side raises ends the other and is raised
    here, after the thread has ended: `consume` sees an exception in its iteration, so that it can clean up.
    """
    channel: _Channel[Item] = _Channel(ahead)
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(consume(iter(channel)))
        except _Stopped:
            pass  # the reason is the caller's
        except BaseException as error:  # also a Ctrl-C that a callback raises: it belongs to the caller
            errors.append(error)
        finally:
            channel.stop()

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name=name)
    thread.start()
    try:
        for item in items:
            channel.put(item)
            del item
        channel.finish()
        thread.join()
    except _Stopped:
        pass  # the thread ended first
    finally:
        channel.stop()
        thread.join()
    if errors:
        raise errors[0]
    return results[0]
