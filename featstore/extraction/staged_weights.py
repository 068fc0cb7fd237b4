"""Weight files read from copies on a local disk: made once a node, whole or not at all, by their digest."""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from featstore import files
from featstore.backbones import BackboneSource
from featstore.backbones.digests import combine, reading_lock, remember, remembered_digest
from featstore.backbones.source import FileLoader
from featstore.errors import WeightsError
from featstore.staging import RESERVE

FOLDER = "weights"  # below the stage; in it a folder for each network, named by its digest
MEMORY = "digests.json"  # digests of copies, for as long as their size, time and inode stay
TURNS = 3  # times that a process waits for another one to copy, which may be killed at it
_CHUNK = 8 * 2**20

_log = logging.getLogger(__name__)


def staged(source: BackboneSource, stage: Path | None) -> BackboneSource:
    """The same backbone, whose weight files are read from copies below `stage`; they are made where there are none.

    Identity and origin stay. Of several processes of a machine one copies and the others wait for it; one that is
    killed leaves nothing that passes for a copy. Where nothing can be copied (a full disk) the log says so, and the
    original is read. Random weights and networks of a user's own function have no files.

    Raises:
        WeightsError: the bytes of the files are not those that the digest of the weights names.
    """
    loader = source.loader
    if stage is None or not isinstance(loader, FileLoader):
        return source
    digest = str(source.weights["digest"])
    home = stage.absolute() / FOLDER
    try:
        folder = _copied(loader.files, digest, home)
    except OSError as error:
        _log.warning("--stage %s: weights are read from %s (%s)", stage, source.origin, error.strerror or error)
        return source
    return replace(source, loader=replace(loader, files=tuple(folder / file.name for file in loader.files)))


def _copied(originals: Sequence[Path], digest: str, home: Path) -> Path:
    """The folder of whole copies.

    Raises:
        OSError: there is none, and none can be made.
        WeightsError: the originals have another digest.
    """
    home.parent.mkdir(parents=True, exist_ok=True)
    home.mkdir(mode=0o700, exist_ok=True)
    folder = home / digest[:32]
    for _ in range(TURNS):
        if _is_whole(folder, originals, digest):
            return folder
        with reading_lock(originals, smallest=0) as is_first:
            if is_first and not _is_whole(folder, originals, digest):
                _make(originals, digest, folder)
    if _is_whole(folder, originals, digest):
        return folder
    raise OSError(errno.EAGAIN, "other processes did not come to the end of copying them")


def _is_whole(folder: Path, originals: Sequence[Path], digest: str) -> bool:
    """Whether all copies are there and hold the bytes that they are named for; what holds others is removed."""
    if not folder.is_dir():
        return False
    try:
        if combine({file.name: _digest_of(folder / file.name) for file in originals}) == digest:
            return True
        _log.warning("%s was damaged; it is copied again", folder)
    except FileNotFoundError:
        pass
    gone = folder.with_name(f"{folder.name}.{files.own_name()}.partial")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(gone)
        shutil.rmtree(gone)
    return False


def _digest_of(copy: Path) -> str:
    return remembered_digest(copy, copy.parents[1] / MEMORY)


def _make(originals: Sequence[Path], digest: str, folder: Path) -> None:
    for left in folder.parent.glob("*.partial"):
        if files.is_dead(left.name):
            shutil.rmtree(left, ignore_errors=True)
    total = sum(file.stat().st_size for file in originals)
    space = os.statvfs(folder.parent)
    if total + RESERVE > space.f_bavail * space.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    partial = folder.with_name(f"{folder.name}.{files.own_name()}.partial")
    partial.mkdir()
    try:
        digests = {file.name: _copy(file, partial / file.name) for file in originals}
        found = combine(digests)
        if found != digest:
            raise WeightsError(
                f"{originals[0].parent}: the weights have the SHA-256 {found} as they are copied to --stage, and "
                f"{digest} is what they are known by; they were changed or are damaged: fetch them again"
            )
        files.sync_folder(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            return  # of another machine that shares this folder; it is checked before it is used
        files.sync_folder(folder.parent)
        for name, each in digests.items():
            _remember(folder / name, each)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy(source: Path, target: Path) -> str:
    """Copy a file; it is on the disk when this returns the SHA-256 of its bytes."""
    total = hashlib.sha256()
    with open(source, "rb") as held, open(target, "xb") as file:
        while piece := held.read(_CHUNK):
            total.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return total.hexdigest()


def _remember(copy: Path, digest: str) -> None:
    """Note the digest of a copy that has just been written, so that it is not read again for it."""
    facts = copy.stat()
    known = {"size": facts.st_size, "mtime_ns": facts.st_mtime_ns, "inode": facts.st_ino, "sha256": digest}
    remember(copy.parents[1] / MEMORY, str(copy.resolve()), known)
