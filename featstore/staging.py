"""Copies of input files on a local disk: made once, whole or not at all, shared by processes and later runs."""

import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from featstore import files
from featstore.companions import Facts
from featstore.errors import ConfigError

RESERVE = 64 * 2**20  # bytes left free: logs and sockets of others live on that disk too
SEAL = ".sha256"  # of the name of a copy: the file beside it that holds the digest of its bytes
_CHUNK = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Original:
    """A file of the data set as it is now, and where its copy belongs."""

    path: str
    size: int
    mtime_ns: int
    copy: Path


class Stage:
    """A folder of copies named by (root, path, size, time) of what they are copies of.

    A copy appears under its name by a rename once it is whole and on the disk, after the SHA-256 of its bytes. Of
    several threads or processes that want one, the first makes it, the others read the original meanwhile. A copy is
    compared with its digest before this object gives it out for the first time; one that differs is dropped.

    Raises:
        ConfigError: the folder lies in `root`, or cannot be made.
    """

    def __init__(self, folder: Path, root: Path):
        self.folder = folder.absolute()
        self.refused: dict[str, str] = {}  # path -> why there is no copy
        self.damaged: set[str] = set()  # paths whose copy was dropped
        self._root = root.resolve()
        self._checked: dict[str, tuple[int, int]] = {}  # copy -> inode and time as they were then
        self._locks: dict[Path, threading.Lock] = {}
        if self.folder.resolve().is_relative_to(self._root):
            raise ConfigError(f"--stage {folder} lies in the data set's folder {root}; name a folder outside of it")
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)  # images of patients are nobody else's business
        except OSError as error:
            raise ConfigError(f"--stage {folder}: cannot be made ({error.strerror}); name another folder") from error

    def originals(self, path: str, facts: Facts) -> list[Original]:
        """What is to be copied of `path`: `facts` has it first, then its companions; copies lie beside it."""
        key = [value for name, found in facts.items() for value in (name, found.st_size, found.st_mtime_ns)]
        name = files.digest([str(self._root), *key])[:32]
        if len(facts) == 1:  # readers of slides go by the suffix
            return [self._original(path, facts[path], self.folder / name[:2] / (name + Path(path).suffix))]
        here, folder = os.path.dirname(path), self.folder / name[:2] / name
        return [  # companions refer to each other by name
            self._original(each, found, folder / each.removeprefix(here).lstrip("/")) for each, found in facts.items()
        ]

    @staticmethod
    def _original(path: str, facts: os.stat_result, copy: Path) -> Original:
        return Original(path, facts.st_size, facts.st_mtime_ns, copy)

    def find(self, original: Original) -> Path | None:
        """The copy of a file as it is now, if there is one; its bytes may still need `check`."""
        return original.copy if _is_whole(original) else None

    def is_checked(self, original: Original) -> bool:
        """Whether the copy is the one that was compared, or made, before."""
        held = self._checked.get(str(original.copy))
        return held is not None and held == _version(original.copy)

    def check(self, original: Original, digest: str | None = None) -> bool:
        """Whether the copy holds what was written; `digest` of its bytes where they have just been read.

        A copy that does not is dropped.
        """
        if digest is not None or self.is_checked(original):
            return digest is None or self._compare(original, digest)
        with self._locks.setdefault(original.copy, threading.Lock()):  # threads that want one archive read it once
            return self.is_checked(original) or self._compare(original, None)

    def _compare(self, original: Original, digest: str | None) -> bool:
        version = _version(original.copy)
        if version is None:  # dropped by another one just now
            return False
        if digest is None and self._checked.get(str(original.copy)) == version:  # and made again, which notes it first
            return True
        try:
            same = (digest or _digest_of(original.copy)) == _seal_of(original.copy).read_text("ascii", "replace")
        except FileNotFoundError:
            return False
        except OSError:
            same = False
        if same:
            self._checked[str(original.copy)] = version
            return True
        self.damaged.add(original.path)
        original.copy.unlink(missing_ok=True)
        return False

    def copy(self, original: Original, source: Path, pieces: Iterable[bytes]) -> None:
        """Write the pieces of a file to its copy, if nobody else is at it and there is space; takes all in any case."""
        partial = original.copy.with_name(f"{original.copy.name}.partial")
        target = self._begin(original, partial)
        total = hashlib.sha256()
        try:
            for piece in pieces:
                if target is not None and not self._write(original.path, target, piece):
                    os.unlink(partial)
                    os.close(target)
                    target = None
                if target is not None:
                    total.update(piece)
            if target is not None:
                self._publish(original, source, target, partial, total.hexdigest())
        finally:
            if target is not None:
                os.close(target)

    def _begin(self, original: Original, partial: Path) -> int | None:
        """A locked empty file to write to; None where no copy is to be made."""
        if original.path in self.refused:
            return None
        target = None
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            target = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if _locked(target, partial):
                if _is_whole(original):  # finished by another one just now
                    os.unlink(partial)
                    os.close(target)
                    return None
                space = os.statvfs(self.folder)
                if original.size + RESERVE > space.f_bavail * space.f_frsize:
                    os.unlink(partial)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.ftruncate(target, 0)  # what a killed process left
                return target
        except OSError as error:
            self.refused[original.path] = error.strerror or str(error)
        if target is not None:
            os.close(target)
        return None

    def _write(self, path: str, target: int, data: bytes) -> bool:
        view = memoryview(data)
        try:
            while len(view):
                view = view[os.write(target, view) :]
        except OSError as error:
            self.refused[path] = error.strerror or str(error)
            return False
        return True

    def _publish(self, original: Original, source: Path, target: int, partial: Path, digest: str) -> None:
        now = os.stat(source)
        same = (now.st_size, now.st_mtime_ns) == (original.size, original.mtime_ns)
        try:
            written = os.fstat(target)
            if same and written.st_size == original.size:
                os.fsync(target)  # else a crash may leave a name of the right size and no bytes
                _seal_of(original.copy).write_text(digest)
                self._checked[str(original.copy)] = (written.st_ino, written.st_mtime_ns)
                os.rename(partial, original.copy)
            else:
                os.unlink(partial)
        except OSError as error:
            self.refused[original.path] = error.strerror or str(error)


def _seal_of(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}{SEAL}")


def _digest_of(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            total.update(piece)
    return total.hexdigest()


def _version(copy: Path) -> tuple[int, int] | None:
    """(inode, time) of a copy."""
    try:
        found = os.stat(copy)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _locked(target: int, partial: Path) -> bool:
    """Whether this descriptor now owns the file of that name; the system takes the lock from a process that dies."""
    try:
        fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(target), os.stat(partial))
    except (BlockingIOError, FileNotFoundError):  # another one is at it, or has just finished
        return False


def _is_whole(original: Original) -> bool:
    """A copy of this size is there, and so is its digest (not in folders of before there were any)."""
    try:
        return os.stat(original.copy).st_size == original.size and _seal_of(original.copy).is_file()
    except OSError:
        return False
