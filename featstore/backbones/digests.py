"""SHA-256 of weight files, read as seldom as can be: 27 GB take minutes on a shared disk, and every process asks.

In this order: what the hub's cache calls the file, what `hf download --local-dir` wrote down beside it, a sidecar
`FILE.sha256`, what is remembered of an unchanged file; only then are the bytes read, by one process of a store.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from featstore.errors import WeightsError
from featstore.files import canonical_json, write_atomic

HEX = re.compile(r"[0-9a-f]{64}")
SIDECAR_LINE = re.compile(r"([0-9a-fA-F]{64})(?: [ *](.+))?")  # as sha256sum writes it, or the digest alone
BSD_LINE = re.compile(r"SHA256 \((.+)\) = ([0-9a-fA-F]{64})")  # as BSD, macOS and `sha256sum --tag` write it
LARGEST_SIDECAR = 2**20
METADATA = Path(".cache") / "huggingface" / "download"  # of huggingface_hub, inside a folder that it downloaded into
DEEPEST = 4  # folders of a repository above a weight file
PATIENCE_SECONDS = 1800.0  # after which a process that stands still does not hold up the others
BIG_BYTES = 2**30  # below this, several processes of a machine may read at once

_log = logging.getLogger(__name__)


def digest_files(files: Sequence[Path], cache: Path | None = None) -> str:
    """SHA-256 of one file's bytes; of several shards, the SHA-256 over their sorted names and digests.

    Raises:
        WeightsError: a sidecar that cannot be believed.
    """
    return combine({file.name: file_digest(file, cache) for file in files})


def combine(digests: dict[str, str]) -> str:
    """One digest of a network's files, given those of each by name."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_digest(file: Path, cache: Path | None = None) -> str:
    """SHA-256 of one file, by the shortest way that can be trusted.

    Raises:
        WeightsError: a sidecar that cannot be believed.
    """
    stated = blob_digest(file) or downloaded_digest(file)
    if stated is not None:
        return stated
    beside = file.with_name(f"{file.name}.sha256")
    if not beside.is_file():
        return remembered_digest(file, cache)
    said = read_sidecar(beside, file.name)
    status = file.stat()
    # The time of change counts too: a file copied over this one may bring an older time of writing along.
    if beside.stat().st_mtime_ns >= max(status.st_mtime_ns, status.st_ctime_ns):
        return said
    # The file came after its sidecar: by a copy, or from somebody with other weights.
    found = remembered_digest(file, cache)
    if found != said:
        raise WeightsError(
            f"{file} has the SHA-256 {found}, and {beside.name} beside it says {said}; fetch the file again, or remove "
            f"{beside.name} if other weights stand here on purpose"
        )
    return found


def blob_digest(path: Path) -> str | None:
    """The SHA-256 that the hub's cache gives a file as its name, None for any other file.

    A snapshot's files are links into `blobs`, where a large file is named by the SHA-256 of its bytes.
    """
    if not path.is_symlink():
        return None
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and HEX.fullmatch(blob.name) else None


def downloaded_digest(path: Path) -> str | None:
    """The SHA-256 that `hf download --local-dir` noted of a large file; None without a note that still holds.

    The note has three lines: commit, etag (of a large file its SHA-256) and the time of writing. It holds as long as
    the file is not younger. One that cannot be read is ignored, as the hub's own client ignores it.
    """
    path = path.absolute()
    for folder in path.parents[:DEEPEST]:
        note = folder / METADATA / f"{path.relative_to(folder)}.metadata"
        try:
            _, etag, written = note.read_text(encoding="utf-8").split()
            if HEX.fullmatch(etag) and path.stat().st_mtime <= float(written):
                return etag
        except (OSError, ValueError):
            continue
    return None


def read_sidecar(path: Path, name: str) -> str:
    """The SHA-256 of the file `name` out of a sidecar as `sha256sum` writes it, or BSD's, of one line or several.

    Raises:
        WeightsError: it is no such text, or says nothing, or two things, of this file.
    """
    advice = f"write it by `sha256sum {name} > {path.name}`, or remove it"
    if path.stat().st_size > LARGEST_SIDECAR:
        raise WeightsError(f"{path} must hold lines of `sha256sum`, it has {path.stat().st_size} bytes; {advice}")
    lines = [line for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines() if line.strip()]
    named = [_digest_and_name(line.strip()) for line in lines]
    if not lines or ("", None) in named:
        raise WeightsError(f"{path} must hold lines of `sha256sum`, a digest and a file name; {advice}")
    said = {digest for digest, whose in named if (whose or name).rpartition("/")[2] == name}
    if len(said) != 1 or (len(named) > 1 and any(whose is None for _, whose in named)):
        others = ", ".join(sorted({whose for _, whose in named if whose})[:3])
        raise WeightsError(
            f"{path} must give one digest of {name}; it gives {len(said)}{f', and names {others}' if others else ''}; "
            f"{advice}"
        )
    return said.pop()


def _digest_and_name(line: str) -> tuple[str, str | None]:
    """(digest, name if one is given) of a line; ("", None) for any other line."""
    if match := BSD_LINE.fullmatch(line):
        return match[2].lower(), match[1]
    match = SIDECAR_LINE.fullmatch(line)
    return (match[1].lower(), match[2]) if match else ("", None)


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_digest(file: Path, cache: Path | None) -> str:
    """SHA-256 of a file, remembered in `cache` for as long as its size, time and inode stay.

    Of several processes with one cache, one reads the bytes and the others wait for it.
    """
    known = _known(_entries(cache), file)
    if known is not None:
        return known
    if cache is None:
        return sha256(file)
    with _alone(cache.with_name(f"{cache.name}.lock"), f"the SHA-256 of {file}"):
        entries = _entries(cache)  # of a process that was quicker
        known = _known(entries, file)
        if known is not None:
            return known
        before = _state(file)
        found = sha256(file)
        if _state(file) == before:
            remember(cache, str(file.resolve()), {**before, "sha256": found})
    return found


def remember(cache: Path, key: str, facts: dict[str, Any]) -> None:
    """Add an entry to a cache; one that cannot be written only costs time."""
    with contextlib.suppress(OSError):  # a read-only store: the digest is right, it will be computed again
        write_atomic(cache, canonical_json({**_entries(cache), key: facts}))


def recall(cache: Path | None, key: str) -> dict[str, Any] | None:
    """An entry of a cache."""
    entry = _entries(cache).get(key)
    return entry if isinstance(entry, dict) else None


def _entries(cache: Path | None) -> dict[str, Any]:
    if cache is None:
        return {}
    try:
        entries = json.loads(cache.read_bytes())
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _state(file: Path) -> dict[str, int]:
    status = file.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _known(entries: dict[str, Any], file: Path) -> str | None:
    entry = entries.get(str(file.resolve()))
    if isinstance(entry, dict) and entry == {**_state(file), "sha256": entry.get("sha256")}:
        return str(entry["sha256"])
    return None


# Locks: they save work and never guard data, so one that cannot be had is done without.


def _open_lock(path: Path) -> int | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return None


def _take(descriptor: int, kind: int, patience: float) -> bool:
    """Take a lock, however long it needs up to `patience` seconds; False if it cannot be had."""
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        except OSError:  # a file system without locks
            return False


@contextlib.contextmanager
def _alone(path: Path, what: str) -> Iterator[None]:
    """One process at a time inside the block, unless one stands still in it."""
    descriptor = _open_lock(path)
    if descriptor is None:
        yield
        return
    try:
        if not _take(descriptor, fcntl.LOCK_EX, 0.0):
            _log.info("waiting for another process that computes %s", what)
            _take(descriptor, fcntl.LOCK_EX, PATIENCE_SECONDS)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def reading_lock(files: Sequence[Path], *, smallest: int = BIG_BYTES) -> Iterator[bool]:
    """Hold while big files are read for the first time; gives whether this process is the machine's first reader.

    Eight processes that start together would pull the same 27 GB eight times over a network disk. The first one reads;
    the others wait until it is done and then read all at once, from memory. Files below `smallest` bytes in all, and
    machines where no lock can be had, are read without waiting.
    """
    places = sorted(str(file.resolve()) for file in files)
    descriptor = None
    if sum(Path(place).stat().st_size for place in places) >= smallest:
        name = hashlib.sha256("\n".join(places).encode()).hexdigest()[:16]
        descriptor = _open_lock(Path(tempfile.gettempdir()) / f"featstore-{os.getuid()}-{name}.lock")
    if descriptor is None:
        yield True
        return
    try:
        first = _take(descriptor, fcntl.LOCK_EX, 0.0)
        if not first:
            _log.info("waiting for another process that reads %s", places[0])
            # Shared, so that all who waited go on together; who comes now need not wait for them either.
            _take(descriptor, fcntl.LOCK_SH, PATIENCE_SECONDS)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        yield first
    finally:
        os.close(descriptor)
