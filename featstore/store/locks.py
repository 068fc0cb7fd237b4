"""One writer at a time, for stores in mode `single`: where no name can be taken exclusively together with its content.

A writer announces itself under a name of its own, looks for other announcements and only then reads and writes the
lock. Of two that announce themselves at least one sees the other, so neither a race for a free lock nor one for a dead
writer's lock has two winners, even where files cannot be created exclusively.
"""

import contextlib
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featstore import files, records
from featstore.errors import CorruptError, StoreError
from featstore.objects import Place
from featstore.store import commits

LOCK = "writer.lock"  # in the root of the store; announcements are LOCK.<own name>
RENEW_SECONDS = 20.0  # between two signs of life; far below commits.STALE_SECONDS
UNREADABLE_SECONDS = 60.0  # after which a lock without content was left by a writer that died writing it
TRIES = 8

# Locks of this process by store, so that a command inside a command does not wait for itself.
_held: dict[str, "WriterLock"] = {}


@dataclass(slots=True)
class WriterLock:
    """The right to write to a store; of a store that needs no such right where `path` is None."""

    path: Place | None
    facts: dict[str, Any] = field(default_factory=dict)
    renewed: float = field(default_factory=time.monotonic)

    def renew(self) -> None:
        """Give a sign of life, at most every 20 seconds; call it at least once in a batch.

        Raises:
            StoreError: the lock is gone: this process stood still so long that another one took it.
        """
        if self.path is None or time.monotonic() - self.renewed < RENEW_SECONDS:
            return
        with files.writing(self.path):
            if not self.is_ours():
                raise StoreError(
                    f"{self.path}: another writer took this store over while this process stood still; nothing more is "
                    "written here; run the same command again when the other one is done"
                )
            if isinstance(self.path, Path):
                os.utime(self.path)  # the file system's clock, by which announcements are dated too
            else:
                self.path.put(files.sealed(self.facts))
        self.renewed = time.monotonic()

    def renewing(self, advance: Callable[..., None]) -> Callable[..., None]:
        """A progress callback that also gives a sign of life, for work that commits nothing."""

        def renewed(*done: int) -> None:
            self.renew()
            advance(*done)

        return renewed

    def is_ours(self) -> bool:
        """Whether the lock on disk is still the one that this process wrote."""
        assert self.path is not None
        holder = _read(self.path)
        return holder is not None and holder.get("name") == self.facts["name"]


@contextlib.contextmanager
def writer_lock(root: Place) -> Iterator[WriterLock]:
    """Hold the store for writing as long as the block runs; nothing happens in other modes than `single`.

    The lock of a dead process, or of one that has been silent for an hour, is taken over, together with everything
    that it has not committed. A process that holds the lock already gets it again.

    Raises:
        StoreError: another writer holds it.
    """
    if files.commit_mode(root) != "single":
        yield WriterLock(None)
        return
    mine = held_lock(root)
    if mine is not None:
        yield mine
        return
    with files.writing(root):
        lock = _acquire(root)
    _held[str(root)] = lock
    try:
        yield lock
    finally:
        _held.pop(str(root), None)
        with contextlib.suppress(OSError):  # a lost lock is no reason to hide what ended the block
            if lock.path is not None and lock.is_ours():
                lock.path.unlink(missing_ok=True)


def held_lock(root: Place) -> WriterLock | None:
    """The lock by which this process holds a store; None where it holds none."""
    mine = _held.get(str(root))
    # Not a parent's, whose memory this process copied.
    return mine if mine is not None and mine.facts["pid"] == os.getpid() else None


def _acquire(root: Place) -> WriterLock:
    for _ in range(TRIES):
        name = files.own_name()
        facts = {"name": name, "host": socket.gethostname(), "pid": os.getpid(), "time": records.utc_now()}
        claim = root / f"{LOCK}.{name}"
        _create(claim, facts)
        try:
            others = [path for path in root.glob(f"{LOCK}.*") if path != claim]
            over = [path for path in others if _is_over(path, path.name, claim, commits.STALE_SECONDS)]
            if len(over) == len(others):
                return _take(root / LOCK, claim, facts, over)
        finally:
            claim.unlink(missing_ok=True)
        time.sleep(random.uniform(0.01, 0.2))
    raise StoreError(
        f"{root}: other writers are starting here at the same time, and this store takes one (`featstore doctor` says "
        f"why); start them one after the other; if there are none, remove {LOCK}.* there"
    )


def _take(path: Place, claim: Place, facts: dict[str, Any], over: list[Place]) -> WriterLock:
    """Write the lock, now that nobody else is about to; `over` are announcements of writers that died meanwhile."""
    holder = _read(path)
    if holder is not None:
        name, patience = str(holder.get("name")), commits.STALE_SECONDS
        if not holder:  # its writer died, or is just now, between two calls; announcements stay until the lock is whole
            patience = 0.0 if any(files.is_dead(other.name) for other in over) else UNREADABLE_SECONDS
        if not _is_over(path, name, claim, patience):
            raise _refusal(path, holder)
        if isinstance(path, Path):
            # Whatever the former holder could still publish starts from these files: without them it harms nothing
            # when it wakes up. (What it sends to a bucket stands on its own machine.)
            for spec in path.parent.glob("sets/*/*/spec.json"):
                commits.sweep_attempts(spec.parent, older_than=-float("inf"))
        path.unlink(missing_ok=True)
    if not _create(path, facts):
        raise _refusal(path, _read(path) or {})
    for other in over:
        other.unlink(missing_ok=True)
    return WriterLock(path, facts)


def _refusal(path: Place, holder: dict[str, Any]) -> StoreError:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown machine')}"
    return StoreError(
        f"{path.parent}: {who} has been writing here since {holder.get('time', 'just now')}, and this store takes one "
        f"writer at a time (`featstore doctor` says why); wait until it is done; if it is gone for good, remove {path} "
        "(a lock that is silent for an hour is taken over without that)"
    )


def _is_over(path: Place, name: str, claim: Place, patience: float) -> bool:
    """Whether the writer of this file is dead, or silent for `patience` seconds by the clock that dates files."""
    if files.is_dead(name):
        return True
    try:
        return claim.stat().st_mtime - path.stat().st_mtime >= patience
    except FileNotFoundError:
        return not path.exists()


def _read(path: Place) -> dict[str, Any] | None:
    """What a lock says; None where there is none, empty while it is being written."""
    try:
        return files.unseal(path.read_bytes(), path)
    except FileNotFoundError:
        return None
    except CorruptError:
        return {}


def _create(path: Place, facts: dict[str, Any]) -> bool:
    """Write the lock or an announcement unless the name is taken."""
    data = files.sealed(facts)
    if not isinstance(path, Path):
        path.put(data)  # buckets of this mode cannot refuse; the announcements have settled who writes
        return True
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True
