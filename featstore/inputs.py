"""Where the bytes of a sample come from: a file below the root of its data set, or a member of an archive there."""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featstore.companions import companions
from featstore.errors import DecodeError
from featstore.packs import Pack, list_members, open_pack, split_member
from featstore.staging import Original, Stage

HASH_HEX = 32  # 128 bits of SHA-256: enough to tell contents apart
_CHUNK = 8 * 2**20
# Slides that keep their pixels in files beside them that are not followed, and a copy would leave behind.
_NOT_ALONE = (".vms", ".vmu", ".dcm")


class Inputs:
    """The files of one data set by their paths relative to `root`, as a manifest writes them.

    `cxr.zip!/train/a.jpg` is a member of an archive, read in place. A file that keeps its data in others (`companions`)
    is as large as all together, as new as the newest, and its hash covers them. With `stage`, a folder on a local disk,
    every file (of members: the archive) is copied there by the first read, its companions beside it, and read from
    there afterwards, also by later runs.

    Raises (every method):
        FileNotFoundError: no such file or member. OSError: it cannot be read.
        DecodeError: a member that cannot be used, or is damaged. ManifestError: an archive that cannot be used.
    """

    def __init__(self, root: Path, *, stage: Path | None = None):
        self.root = root
        self._stage = None if stage is None else Stage(stage, root)
        self._base = os.path.join(root, "")
        self._is_folder: dict[str, bool] = {}

    def __reduce__(self) -> tuple[Any, ...]:  # for worker processes
        return _restore, (self.root, None if self._stage is None else self._stage.folder)

    def _member(self, path: str) -> tuple[str, str] | None:
        if "!/" not in path:
            return None
        found = split_member(path)
        if found is not None and found[0] not in self._is_folder:  # a folder may be called `a!` too
            self._is_folder[found[0]] = os.path.isdir(f"{self._base}{found[0]}!")
        return None if found is None or self._is_folder[found[0]] else found

    def stat(self, path: str) -> tuple[int, int]:
        """(size in bytes, time of the last change in ns); a folder is no file; a member has its archive's time."""
        member = self._member(path)
        found = os.stat(self._base + (path if member is None else member[0]))
        if stat.S_ISDIR(found.st_mode):
            raise FileNotFoundError(f"{self.root / path} is a folder")
        if member is None:
            size, mtime = found.st_size, found.st_mtime_ns
            for more in companions(self._base, path).values():
                size, mtime = size + more.st_size, max(mtime, more.st_mtime_ns)
            return size, mtime
        index = open_pack(self.root / member[0], found).index
        return int(index.size[index.row(member[1])]), found.st_mtime_ns

    def read(self, path: str, *, first: int = -1) -> bytes:
        """The bytes, or only the first ones; of the file itself, without its companions."""
        member = self._member(path)
        if member is not None:
            return self._pack(member[0]).read(member[1], first)
        if self._stage is None:
            with open(self._base + path, "rb") as file:
                return file.read(first)
        original = self._originals(path)[0]
        if first >= 0:
            known = self._stage.is_checked(original)  # of others nobody knows what they start with
            with open(original.copy if known else self._base + path, "rb") as file:
                return file.read(first)
        return self._read_staged(self._stage, original)

    def hash(self, path: str) -> str:
        """SHA-256 of the bytes and those of its companions (see `hash_of`), shortened to `HASH_HEX` digits."""
        member = self._member(path)
        if member is not None:
            return hashlib.sha256(self._pack(member[0]).read(member[1])).hexdigest()[:HASH_HEX]
        return self._with_companions(path, self._digest_file(path, path))

    def hash_of(self, path: str, data: bytes) -> str:
        """What `hash` gives, of a file whose own bytes have been read already.

        Plain SHA-256 of `data` where there are no companions, else of its digest and those of its companions in order.
        """
        digest = hashlib.sha256(data)
        return digest.hexdigest()[:HASH_HEX] if self._member(path) else self._with_companions(path, digest)

    def size_of(self, path: str, data: bytes) -> int:
        """What `stat` gives as the size, of a file whose own bytes have been read already."""
        if self._member(path) is not None:
            return len(data)
        return len(data) + sum(more.st_size for more in companions(self._base, path).values())

    def local(self, path: str) -> Path:
        """The file itself, for readers that take no bytes."""
        if self._member(path) is not None:
            raise DecodeError("lies in an archive, and files of this kind are read from a file of their own; unpack it")
        return self.root / path if path.lower().endswith(_NOT_ALONE) else self._copied(path)

    def beside(self, path: str) -> Path | None:
        """Where the file lies, for formats that keep their data in a second file; None inside an archive."""
        if self._member(path) is not None:
            return None
        return self._copied(path) if companions(self._base, path) else self.root / path

    def _with_companions(self, path: str, digest: "hashlib._Hash") -> str:
        if found := companions(self._base, path):
            digest = hashlib.sha256(digest.digest())
            for each in found:
                digest.update(self._digest_file(path, each).digest())
        return digest.hexdigest()[:HASH_HEX]

    def _digest_file(self, path: str, each: str) -> "hashlib._Hash":
        """SHA-256 of `path` or of one of its companions."""
        if self._stage is not None:
            original = next((item for item in self._originals(path) if item.path == each), None)
            if original is None:
                raise FileNotFoundError(f"{self.root / each} is gone")
            if self._stage.find(original) is not None:
                total = _digest(original.copy)
                if self._stage.check(original, total.hexdigest()):
                    return total
            total = hashlib.sha256()
            self._stage.copy(original, self.root / each, _pieces(self.root / each, total))
            return total
        return _digest(self.root / each)

    @property
    def unstaged(self) -> int:
        """Number of files of which no copy could be made."""
        return 0 if self._stage is None else len(self._stage.refused)

    def staging_note(self) -> str | None:
        """What to tell about files that were read from where they are, though a copy was asked for."""
        if self._stage is None:
            return None
        notes = []
        if refused := self._stage.refused:
            why = ", ".join(sorted(set(refused.values())))
            notes.append(f"{len(refused)} files were not copied to {self._stage.folder} ({why})")
        if damaged := len(self._stage.damaged):
            notes.append(f"{damaged} copies in {self._stage.folder} were damaged and were dropped")
        return f"{' and '.join(notes)}; those were read from {self.root}" if notes else None

    def _originals(self, path: str) -> list[Original]:
        """What a copy of a file needs: itself first, then its companions."""
        assert self._stage is not None
        facts = {path: os.stat(self._base + path), **companions(self._base, path)}
        return self._stage.originals(path, facts)

    def _read_staged(self, stage: Stage, original: Original) -> bytes:
        if stage.find(original) is not None:
            known = stage.is_checked(original)
            with contextlib.suppress(FileNotFoundError):  # dropped by another one just now
                with open(original.copy, "rb") as file:
                    data = file.read()
                if known or stage.check(original, hashlib.sha256(data).hexdigest()):
                    return data
        with open(self.root / original.path, "rb") as file:
            data = file.read()
        stage.copy(original, self.root / original.path, (data,))
        return data

    def _copied(self, path: str) -> Path:
        """The copy of a file, made now if need be, or the file itself where there can be none."""
        if self._stage is None:
            return self.root / path
        originals = self._originals(path)
        whole = [self._is_copied(self._stage, original) for original in originals]
        return originals[0].copy if all(whole) else self.root / path

    def _is_copied(self, stage: Stage, original: Original) -> bool:
        if stage.find(original) is not None and stage.check(original):
            return True
        source = self.root / original.path
        if original.path not in stage.refused:
            stage.copy(original, source, _pieces(source, hashlib.sha256()))
        return stage.find(original) is not None and stage.check(original)

    def _pack(self, archive: str) -> Pack:
        return open_pack(self._copied(archive))


def _digest(path: Path) -> "hashlib._Hash":
    total = hashlib.sha256()
    for _ in _pieces(path, total):
        pass
    return total


def _pieces(path: Path, total: "hashlib._Hash") -> Iterator[bytes]:
    """The bytes of a file, each added to `total` on its way."""
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            total.update(piece)
            yield piece


def _restore(root: Path, stage: Path | None) -> Inputs:
    return Inputs(root, stage=stage)


__all__ = ["HASH_HEX", "Inputs", "list_members"]
