"""Who is at which piece of a set: hints that save work and permit nothing (a block is whose commit comes first).

`claims/<piece>.<slot>` beside the data appears once, by exclusive creation, and its time is renewed as long as its
owner lives. Slot 0 is the first rank at a piece, slot 1 the one that takes it over or helps. A claim is gone when its
piece is committed or its owner gave it up; what killed processes left is swept when the set is next complete.
"""

import contextlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Collection

from featstore import files
from featstore.errors import CorruptError, StoreError
from featstore.extraction.division import Claim
from featstore.objects import Place, as_object
from featstore.store.commits import STALE_SECONDS

CLAIMS = "claims"  # in the folder of a set
BEAT = 15.0  # seconds between two signs of life
SLOTS = 100  # at one piece, over all its time: beyond that nobody claims it any more, and it is done without


class Claims:
    """The claims in a folder of their own, as one process makes and sees them; a context that gives its own ones up.

    A process whose claims cannot be written (a full disk, a bucket out of reach) works on without: they are hints.
    """

    def __init__(self, folder: Place, *, patience: float):
        self.folder = folder
        self.owner = files.own_name()
        self.patience = patience
        self._beat = min(BEAT, patience / 4)
        self._mine: dict[int, Place | None] = {}  # None: being done, though no claim could be written
        self._free: dict[int, int] = {}  # piece -> the slot behind those seen
        self._offset: float | None = None  # of the clock that dates files
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="claims", daemon=True)

    def __enter__(self) -> "Claims":
        with contextlib.suppress(OSError, StoreError):
            self._measure()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for piece in list(self._mine):
            self.release(piece)
        self._remove_folder()

    def now(self) -> float:
        """Seconds by the clock that dates files."""
        return time.time() + (self._offset or 0.0)

    @property
    def mine(self) -> frozenset[int]:
        """Pieces that this process has claimed."""
        with self._lock:
            return frozenset(self._mine)

    def take(self, piece: int) -> bool:
        """Claim a piece behind those seen at the last look at it; False where somebody else has done so since."""
        if piece in self._mine:
            return True
        slot = self._free.get(piece, 0)
        path = self.folder / f"{piece:08d}.{slot}"
        try:
            with files.writing(self.folder):
                if slot < SLOTS and not self._create(path):
                    return False
                held = path if slot < SLOTS else None
        except (OSError, StoreError):
            held = None
        with self._lock:
            self._mine[piece] = held
        return True

    def release(self, piece: int) -> None:
        """Give a piece up: it is committed, or will not be by this process."""
        with self._lock:
            path = self._mine.pop(piece, None)
        if path is not None:
            with contextlib.suppress(OSError, StoreError):
                path.unlink(missing_ok=True)

    def is_free(self, piece: int) -> bool:
        """Whether nobody else who is alive is at a piece."""
        now = self.now()
        held = [claim for path in self._paths(f"{piece:08d}.*") if (claim := self._read(path)) is not None]
        return all(claim.owner == self.owner or claim.is_over(now, self.patience) for claim in held)

    def survey(self) -> dict[int, list[Claim]]:
        """All claims by piece."""
        found: dict[int, list[Claim]] = defaultdict(list)
        self._free = {}
        for path in self._paths("*.*"):
            if (claim := self._read(path)) is not None:
                found[int(path.stem)].append(claim)
        return dict(found)

    def sweep(self, pieces: Collection[int] | None = None) -> None:
        """Remove the claims of pieces that are committed, whoever left them; of all where everything is."""
        for path in self._paths("*.*"):
            if (pieces is None or int(path.stem) in pieces) and int(path.stem) not in self._mine:
                with contextlib.suppress(OSError, StoreError):
                    path.unlink(missing_ok=True)

    def sweep_dead(self, older_than: float) -> None:
        """Remove the claims of processes of this machine that have ended, and those silent for `older_than` seconds."""
        now = self.now()
        for path in self._paths("*.*"):
            claim = self._read(path)
            if claim is not None and (files.is_dead(claim.owner) or now - claim.seen > older_than):
                with contextlib.suppress(OSError, StoreError):
                    path.unlink(missing_ok=True)
        self._remove_folder()

    def _remove_folder(self) -> None:
        if as_object(self.folder) is None:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # only when empty

    def _paths(self, pattern: str) -> list[Place]:
        try:
            found = [path for path in self.folder.glob(pattern) if path.stem.isdigit() and path.suffix[1:].isdigit()]
        except (OSError, StoreError):
            return []
        for path in found:
            piece = int(path.stem)
            self._free[piece] = max(self._free.get(piece, 0), int(path.suffix[1:]) + 1)
        return found

    def _read(self, path: Place) -> Claim | None:
        """A claim; None where it just went."""
        try:
            data = path.read_bytes()  # before its time is asked for: opening a file refreshes what NFS remembers of it
            seen = path.stat().st_mtime
            said = files.unseal(data, path)
            owner, since = str(said["owner"]), float(said["since"])
        except (CorruptError, KeyError, ValueError):  # being written just now, or by a disk that is full
            owner, since = path.name, seen
        except (OSError, StoreError):
            return None
        return Claim(owner, since, seen, dead=owner != self.owner and files.is_halted(owner))

    def _create(self, path: Place) -> bool:
        data = files.sealed({"owner": self.owner, "since": self.now()})
        bucket = as_object(path)
        if bucket is not None:
            return bucket.put_new(data)
        files.make_folder(path.parent)
        try:
            with open(str(path), "xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        return True

    def _measure(self) -> None:
        """See how far the clock that dates files is from this machine's."""
        probe = self.folder / f"clock-{self.owner}"
        if (bucket := as_object(probe)) is not None:
            bucket.put(b"")
        else:
            files.make_folder(self.folder)
            open(str(probe), "xb").close()
        before = time.time()
        self._offset = probe.stat().st_mtime - before
        probe.unlink(missing_ok=True)

    def _live(self) -> None:
        while not self._over.wait(self._beat):
            with self._lock:
                held = [path for path in self._mine.values() if path is not None]
            for path in held:
                with contextlib.suppress(OSError, StoreError):
                    self._renew(path)

    def _renew(self, path: Place) -> None:
        bucket = as_object(path)
        if bucket is None:
            os.utime(str(path))
        else:
            data, tag = bucket.read_tagged()
            bucket.put_over(data, tag)  # not where it was removed meanwhile


def sweep_claims(folder: Place) -> None:
    """Remove what killed processes left of claims on a set: as `sweep_attempts` does with their files."""
    Claims(folder / CLAIMS, patience=STALE_SECONDS).sweep_dead(STALE_SECONDS)
