"""Files that are whole or absent: atomic replace, first-wins publication, canonical JSON and digests.

File systems and buckets differ here and in `store/decisions.py`, nowhere else. In a bucket every put is whole and kept
once it is answered, so nothing is synced, and what a link does under a name that is taken, a put on condition does.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import logging
import mmap
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from featstore.errors import CorruptError, FeatstoreError, StoreError
from featstore.objects import ObjectReader, Place, as_object

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
_log = logging.getLogger(__name__)

# What file systems without hard links answer.
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
MODE = "mode.json"  # in the root of a store that needs another way
# What file systems answer that cannot sync files or folders.
NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
# Errors of a shared file system that pass by themselves (NFS stale handle, interrupted call, timeout, flaky disk).
TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ECONNRESET}


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`, or of the bytes themselves."""
    return hashlib.sha256(value if isinstance(value, bytes) else canonical_json(value)).hexdigest()


def sealed(value: dict[str, Any]) -> bytes:
    """Pretty JSON of `value` with a `digest` over everything else, so that a flipped bit is found."""
    body = {**value, "digest": digest(value)}
    return json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def unseal(data: bytes, path: Place) -> dict[str, Any]:
    """Parse what `sealed` wrote.

    Raises:
        CorruptError: the text is no JSON object or its digest differs.
    """
    try:
        value = json.loads(data)
        stated = value.pop("digest")
        computed = digest(value)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CorruptError(
            f"{path}: not a sealed JSON file ({type(error).__name__}); restore it from a copy"
        ) from error
    if computed != stated:
        raise CorruptError(f"{path}: content does not match its digest; restore it from a copy")
    return dict(value)


def read_parquet(data: bytes, columns: list[str] | None = None) -> "pa.Table":
    """The table in the bytes of a parquet file, page checksums verified.

    Not by `pq.read_table`, and by one thread: threads of pyarrow 26 that read from a buffer can abort the process when
    it ends.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(
        columns=columns, use_threads=False
    )


def parquet_rows(data: bytes) -> int:
    """Number of rows in the bytes of a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return int(pq.read_metadata(pa.BufferReader(data)).num_rows)


def retry(call: Callable[[], T], *, tries: int = 4, pause: float = 0.2) -> T:
    """Repeat a call that met a transient I/O error, three times by default, then let the error pass."""
    for attempt in range(tries):
        try:
            return call()
        except OSError as error:
            if error.errno not in TRANSIENT or attempt == tries - 1:
                raise
            time.sleep(pause * 2**attempt)
    raise AssertionError("unreachable: the last try returns or raises")


@contextlib.contextmanager
def writing(place: Place) -> Iterator[None]:
    """Turn what the system says about a failed write into a StoreError that names the place.

    Raises:
        StoreError: disk full, read-only, no permission, or an I/O error that stayed.
    """
    try:
        yield
    except FeatstoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"{place}: cannot write ({error.strerror or error}); free space, fix access or name another --store, then "
            "run the same command again; what is committed stays"
        ) from error


def sync_folder(folder: Place) -> None:
    """Make names created in `folder` survive a power cut."""
    if as_object(folder):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor, folder)
    finally:
        os.close(descriptor)


def sync(descriptor: int, place: Place) -> None:
    """Make what was written to the open file or folder `place` survive a power cut.

    Raises:
        StoreError: the file system cannot do that, and `featstore doctor` has not noted it in the store.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
        if _settled(place).get("fsync", True):
            raise StoreError(
                f"{place}: this file system cannot sync ({error.strerror}), so a power cut could lose what is "
                "committed; `featstore doctor STORE` settles that commits survive kills only, or put the store on "
                "another disk"
            ) from error


def make_folder(folder: Place) -> None:
    """Create a folder and its parents so that they survive a power cut; not in a bucket, nor if it exists."""
    if as_object(folder):
        return
    for last_try in (False, False, False, True):
        if folder.is_dir():
            return
        make_folder(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)
        except FileNotFoundError:  # an empty parent can be swept in between
            if last_try:
                raise


@functools.cache
def _processes() -> str:
    """Names the set of processes that this one can see: one boot of one machine, one container; '' where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    return hashlib.sha256(f"{boot} {space}".encode()).hexdigest()[:12]


def own_name() -> str:
    """A name that no other writer uses and that tells whether its writer is still alive (see `is_dead`)."""
    return f"{_processes() or 'unknown'}-{os.getpid()}-{uuid.uuid4().hex}"


def is_dead(name: str) -> bool:
    """Whether `own_name` in this file name belongs to a process of this machine that has ended; False if in doubt."""
    return _state(name) in ("Z", "X")  # ended, its parent may not have noticed


def is_halted(name: str) -> bool:
    """Whether that process has ended or stands still (SIGSTOP, a debugger); False if in doubt."""
    return _state(name) in ("Z", "X", "T", "t")


def _state(name: str) -> str:
    """The system's letter for the state of the process in `own_name`; empty where that cannot be known."""
    found = re.search(r"([0-9a-f]{12})-(\d+)-[0-9a-f]{32}", name)
    if not found or found[1] != _processes():
        return ""
    try:
        return Path(f"/proc/{found[2]}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:  # it ended, or it is another user's and hidden from this one
        try:
            os.kill(int(found[2]), 0)  # sends nothing
        except ProcessLookupError:
            return "X"
        except OSError:
            return ""
        return ""
    except OSError:
        return ""


def _write_beside(path: Place, data: bytes) -> Place:
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{own_name()}.partial")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            sync(file.fileno(), path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def write_atomic(path: Place, data: bytes) -> None:
    """Write a file or replace it whole; a reader sees the old bytes or the new ones.

    Raises:
        StoreError: it cannot be written.
    """
    with writing(path):
        if (held := as_object(path)) is not None:
            held.put(data)
            return
        temporary = _write_beside(path, data)
        try:
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def link_kept(source: Place, final: Place) -> bool:
    """Give a finished file a second name unless that name is taken; the first name stays.

    Returns:
        True if this call published the file, False if another one was first.

    Raises:
        StoreError: the file system has no hard links, so first-wins cannot be guaranteed.
        FileNotFoundError: `source` is gone.
    """
    if (held := as_object(final)) is not None:
        return not held.is_file() and held.put_new(read_large(source))
    try:
        os.link(source, final)
        published = True
    except FileExistsError:
        published = False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        published = _publish_copy(source, final, error)
    sync_folder(final.parent)
    return published


def version(path: Place) -> str:
    """What tells whether an object is still the same one; '' for local files and where there is none."""
    held = as_object(path)
    try:
        return "" if held is None else held.stat().e_tag or ""
    except FileNotFoundError:
        return ""


def replace_kept(source: Place, final: Place, seen: str) -> None:
    """Put a finished file in the place of another one; the first name stays.

    The name that is moved stands beside `source`: a process that stands still here until somebody has taken that
    folder away finds nothing to move. In a bucket only the object whose `version` was `seen` is replaced.
    """
    if (held := as_object(final)) is not None:
        data = read_large(source)
        if not (held.put_over(data, seen) if seen else held.put_new(data)):
            _log.info("%s was changed by another process meanwhile", final)
        return
    spare = source.with_name(f"{source.name}.{uuid.uuid4().hex}")
    try:
        os.link(source, spare)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        _copy_synced(source, spare)
    os.replace(spare, final)
    sync_folder(final.parent)


def read_large(path: Place) -> memoryview:
    """The bytes of a shard: a local file mapped, an object in memory."""
    held = as_object(path)
    if held is None:
        with open(path, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    facts = held.stat()
    data = bytearray(facts.st_size)
    position = 0
    for piece in held.pieces(facts):
        data[position : position + len(piece)] = piece
        position += len(piece)
    return memoryview(data)


def upload(source: Path, final: Place) -> None:
    """Copy a finished local file to a place in the store where nothing else stands."""
    if (held := as_object(final)) is not None:
        held.put(read_large(source))
    else:
        write_atomic(final, source.read_bytes())


def open_binary(path: Place) -> io.BufferedReader | ObjectReader:
    """A file for reading; ranges of an object are fetched as they are read."""
    held = as_object(path)
    return open(path, "rb") if held is None else held.open()


def modified(folder: Place) -> dict[Place, float]:
    """Every file below a folder and when it was last changed; the folder too, where it is one on a disk."""
    held = as_object(folder)
    if held is not None:
        return {cast(Any, path): facts.st_mtime for path, facts in held.walk()}
    return {path: path.stat().st_mtime for path in [folder, *folder.rglob("*")]}


def remove_tree(folder: Place, first: str = "") -> None:
    """Remove a folder and all in it, in a bucket the object `first` before the others.

    Raises:
        OSError: something cannot be removed.
    """
    held = as_object(folder)
    if held is None:
        shutil.rmtree(folder)
        return
    if first:
        (held / first).unlink()
    held.remove_below()


def user_cache() -> Path:
    """The user's cache folder of this package, on this machine whatever the store is."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("featstore"))


def commit_mode(place: Place) -> str | None:
    """How files are published in the store that holds `place`, as `featstore doctor` settled it; None if it did not.

    `rename`: a copy is renamed where no file is replaced. `single`: a copy is renamed, and one writer holds the store.
    `link`: as without a note, which then only says that nothing can be synced.
    """
    mode = _settled(place).get("mode")
    return None if mode is None else str(mode)


def _settled(place: Place) -> dict[str, Any]:
    """The mode.json of the store that holds `place`; empty where there is none."""
    for folder in [place, *place.parents]:
        path = folder / MODE
        if path.is_file():
            return unseal(path.read_bytes(), path)
        if (folder / "store.json").is_file():  # its root: what lies above belongs to others
            break
    return {}


def _publish_copy(source: Path, final: Path, error: OSError) -> bool:
    """`link_kept` where there are no hard links."""
    mode = commit_mode(final.parent)
    if mode not in ("rename", "single"):
        raise StoreError(
            f"{final.parent}: no hard links can be made here ({error.strerror}), which commits need; run `featstore "
            "doctor STORE`, which finds another safe way or says that there is none, or put the store on a local disk"
        ) from error
    if final.exists():
        return False
    # Beside `source`, for the reason that `replace_kept` gives, and where it is swept away with it.
    copy = source.with_name(f"{source.name}.{uuid.uuid4().hex}.partial")
    try:
        _copy_synced(source, copy)
        if mode == "rename":
            return rename_new(copy, final)
        os.rename(copy, final)
        return True
    finally:
        copy.unlink(missing_ok=True)


def _copy_synced(source: Path, target: Path) -> None:
    with open(source, "rb") as held, open(target, "xb") as file:
        shutil.copyfileobj(held, file, 2**20)
        file.flush()
        sync(file.fileno(), target)


def rename_new(source: Path, final: Path) -> bool:
    """Rename unless the new name is taken; False if it is (Linux's renameat2 with RENAME_NOREPLACE).

    Raises:
        OSError: EINVAL or ENOSYS where the file system or the system cannot do it.
    """
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(final))
    here, no_replace = -100, 1  # AT_FDCWD, RENAME_NOREPLACE
    if call(here, os.fsencode(source), here, os.fsencode(final), no_replace) == 0:
        return True
    number = ctypes.get_errno()
    if number == errno.EEXIST:
        return False
    raise OSError(number, os.strerror(number), str(final))


def create_exclusive(path: Place, data: bytes) -> bool:
    """Write a file that appears whole and only if nobody wrote it before; True if this call won.

    Raises:
        StoreError: it cannot be written.
    """
    if (held := as_object(path)) is not None:
        with writing(path):
            return held.put_new(data)
    if path.exists():
        return False
    with writing(path):
        temporary = _write_beside(path, data)
        try:
            # NFS repeats a request whose answer was lost: "exists" can be our own link, which the count of names tells.
            return link_kept(temporary, path) or temporary.stat().st_nlink > 1
        finally:
            temporary.unlink(missing_ok=True)
