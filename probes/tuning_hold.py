"""One command at a time in the folder of a run: a second one waits, then goes on from what the first one has left."""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from featstore import files
from featstore.extraction.stopping import Stop
from probes.tuning_ranks import Team

LOCK = "training.lock"
PAUSE = 0.5  # seconds between two looks
SAID_SECONDS = 300.0  # between two lines that say so

log = logging.getLogger(__name__)


@contextmanager
def alone(folder: Path, team: Team, stop: Stop | None = None) -> Iterator[None]:
    """Within it no other command works in `folder`, which is made; a call of all processes of a team.

    The system takes the lock from a process that dies. Where the file system has none, a line says so.

    Raises:
        StoreError: the folder cannot be written.
        Stopped: asked to end while it waited.
    """
    lock = _Lock(folder / LOCK) if team.writes else None
    said = -SAID_SECONDS
    try:
        while True:
            waits, asked = team.any([lock is not None and not lock.take(), stop is not None and stop.asked])
            if not waits:
                break
            if asked:
                raise team.stopped(stop)
            if lock is not None and time.monotonic() - said >= SAID_SECONDS:
                said = time.monotonic()
                log.info("another process%s trains in %s; waiting for its end", lock.owner(), folder)
            time.sleep(PAUSE)
        yield
    finally:
        if lock is not None:
            lock.release()


class _Lock:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def take(self) -> bool:
        """Whether this process holds it now."""
        if self._descriptor is not None:
            return True
        with files.writing(self.path):
            files.make_folder(self.path.parent)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it removes it at the end: then this is the lock of a file that nobody else will find.
            taken = os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except (BlockingIOError, FileNotFoundError):
            taken = False
        except OSError as error:
            log.warning(
                "%s: no locks on this file system (%s); never start the same command twice at once here",
                self.path.parent, error.strerror,
            )  # fmt: skip
            taken = True
        if not taken:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        with files.writing(self.path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
        return True

    def owner(self) -> str:
        """Who holds it, as far as is written there."""
        try:
            text = self.path.read_text()
        except OSError:
            return ""
        return f" ({text})" if text else ""

    def release(self) -> None:
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
