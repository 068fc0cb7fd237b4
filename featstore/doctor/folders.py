"""Probes of a folder: first what commits need, then what else matters to a store."""

import contextlib
import errno
import functools
import mmap
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from featstore import files
from featstore.doctor import quotas
from featstore.doctor.findings import Probe, Result, asks

NAME_BYTES = 160  # what commits may need: an array group, or a file with its writer's name behind it
SHORTEST_NAME_BYTES = 128  # below this the names of writers do not fit
FEW_BYTES, FEW_FILES = 10**9, 10_000
SKEW_SECONDS = 60.0  # clocks that differ more make silent writers look alive, or living ones silent
SEEN_SECONDS, PATIENCE_SECONDS = 1.0, 10.0  # for another process to see a new file: good, and longest
REPLACED_BYTES, REPLACING_SECONDS = 65536, 0.15
NETWORK = ("nfs", "cifs", "smb", "9p", "ceph", "lustre", "gpfs", "beegfs", "afs", "gluster", "orangefs", "virtiofs")

PROBES: list[Probe] = []
_file = functools.partial(asks, PROBES)


@_file("write", "no file can be written here")
def _probe_write(folder: Path) -> Result:
    path = folder / "written"
    path.write_bytes(b"0123456789")
    if path.read_bytes() != b"0123456789":
        return "missing", "a file does not read back as it was written", "other bytes"
    return "ok", "files can be written and read back", ""


@_file("exclusive create", "files cannot be created exclusively, so writers could overwrite each other")
def _probe_exclusive(folder: Path) -> Result:
    path, flags = folder / "exclusive", os.O_CREAT | os.O_EXCL | os.O_WRONLY
    os.close(os.open(path, flags))
    try:
        os.close(os.open(path, flags))
    except FileExistsError:
        return "ok", "a file can be created only once (O_EXCL)", ""
    return "missing", "O_EXCL is ignored, so writers could overwrite each other", "created twice"


@_file("rename", "files or folders cannot be renamed, so nothing could appear whole")
def _probe_rename(folder: Path) -> Result:
    old, new = folder / "replaced", folder / "replacing"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    os.replace(new, old)
    (folder / "full").mkdir()
    (folder / "full" / "file").write_bytes(b"kept")
    os.rename(folder / "full", folder / "moved")
    if old.read_bytes() != b"new" or new.exists() or (folder / "moved" / "file").read_bytes() != b"kept":
        return "missing", "a renamed file or folder does not hold what it held", "other bytes"
    return "ok", "files replace each other and full folders move by rename", ""


@_file("hard links", "no hard links: commits need another way")
def _probe_links(folder: Path) -> Result:
    first, second, other = folder / "first", folder / "second", folder / "other"
    first.write_bytes(b"linked")
    other.write_bytes(b"other")
    os.link(first, second)
    with contextlib.suppress(FileExistsError):
        os.link(other, second)
        return "missing", "a link takes a name that is taken: commits need another way", "replaced"
    with open(first, "ab") as file:
        file.write(b" twice")
    if second.read_bytes() != b"linked twice":
        return "missing", "links are copies, which do not appear whole: commits need another way", "copied"
    count = first.stat().st_nlink
    if count != 2:
        return "degraded", "links work but are not counted, so a lost answer of a server can cost a block", str(count)
    return "ok", "a finished file takes its name at once, and only if it is free", ""


@_file("rename without replacing", "renameat2(RENAME_NOREPLACE) is absent; needed only without hard links", "degraded")
def _probe_rename_new(folder: Path) -> Result:
    first, second, taken = folder / "from", folder / "from2", folder / "to"
    first.write_bytes(b"first")
    second.write_bytes(b"second")
    done = files.rename_new(first, taken), files.rename_new(second, taken)
    if done != (True, False) or taken.read_bytes() != b"first" or second.read_bytes() != b"second":
        return "degraded", "renameat2(RENAME_NOREPLACE) replaces; needed only without hard links", "replaced"
    return "ok", "a file can be renamed only where nothing is replaced", ""


@_file("fsync of files", "files cannot be synced: commits survive kills, not power cuts", "degraded")
def _probe_sync(folder: Path) -> Result:
    with open(folder / "synced", "xb") as file:
        file.write(bytes(4096))
        file.flush()
        started = time.perf_counter()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - started
    return "ok", "commits survive power cuts", f"{1e3 * seconds:.2g} ms"


@_file("fsync of folders", "folders cannot be synced: commits survive kills, not power cuts", "degraded")
def _probe_sync_folder(folder: Path) -> Result:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return "ok", "new names survive power cuts", ""


@_file("long names", "names are too short here for those that writers make", "missing")
def _probe_names(folder: Path) -> Result:
    for length in (255, 200, NAME_BYTES, SHORTEST_NAME_BYTES):
        with contextlib.suppress(OSError):
            (folder / ("n" * length)).write_bytes(b"")
            if length < NAME_BYTES:
                return "degraded", f"names of {NAME_BYTES} bytes do not fit: ask for fewer layers at once", str(length)
            return "ok", f"names of {NAME_BYTES} bytes fit", f"{length} bytes"
    return "missing", "names are too short here for those that writers make", f"below {SHORTEST_NAME_BYTES} bytes"


@_file("mapped reading", "files cannot be mapped: copy sets to a local disk to read them fast", "degraded")
def _probe_map(folder: Path) -> Result:
    path = folder / "mapped"
    path.write_bytes(bytes(2 * mmap.PAGESIZE))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        before = view[mmap.PAGESIZE]
        with open(path, "r+b") as other:
            other.seek(mmap.PAGESIZE)
            other.write(b"\x07")
        after = view[mmap.PAGESIZE]
    if (before, after) != (0, 7):
        return "degraded", "a map does not show what is written: readers may see old bytes of a redone block", "stale"
    return "ok", "sets are read at memory speed", ""


@_file("read-ahead", "reading without waiting is not offered: cold reads are slower", "degraded")
def _probe_advice(folder: Path) -> Result:
    absent = [
        name
        for home, name in ((os, "preadv"), (os, "RWF_NOWAIT"), (mmap.mmap, "madvise"), (mmap, "MADV_WILLNEED"))
        if not hasattr(home, name)
    ]
    if absent:
        return "degraded", "this system gives no advice on reading: cold reads are slower", f"no {', '.join(absent)}"
    path = folder / "advised"
    path.write_bytes(bytes(mmap.PAGESIZE))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        view.madvise(mmap.MADV_WILLNEED)
        with contextlib.suppress(BlockingIOError):  # not in the cache: an answer, too
            os.preadv(file.fileno(), [bytearray(16)], 0, os.RWF_NOWAIT)
    return "ok", "cold reads are asked for ahead of time", ""


# A process of its own, since one process always sees its own writes.
_AWAIT = """
import os, sys, time
path, end = sys.argv[1], time.time() + float(sys.argv[2])
print("ready", flush=True)
while not os.path.exists(path) and time.time() < end:
    time.sleep(0.0005)
print(time.time() if os.path.exists(path) else "inf", flush=True)
"""
_WATCH = """
import os, sys, time
path, stop, size, end = sys.argv[1], sys.argv[2], int(sys.argv[3]), time.time() + float(sys.argv[4])
print("ready", flush=True)
torn = seen = 0
while not os.path.exists(stop) and time.time() < end:
    seen += 1
    try:
        with open(path, "rb") as file:
            data = file.read()
        torn += len(data) != size or len(set(data)) != 1
    except OSError:
        torn += 1
print(torn, seen, flush=True)
"""


@contextlib.contextmanager
def _watcher(script: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-I", "-S", "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            process.kill()


def _answer(process: "subprocess.Popen[str]") -> str:
    try:
        answer = process.communicate(timeout=2 * PATIENCE_SECONDS)[0]
    except subprocess.TimeoutExpired as error:
        raise OSError(errno.ETIMEDOUT, "a reading process does not come back") from error
    if not answer:
        raise OSError(errno.ECHILD, "no second process could be run")
    return str(answer)


@_file("visibility", "whether other processes see new files could not be told", "degraded")
def _probe_visibility(folder: Path) -> Result:
    source, target = folder / "unseen", folder / "seen"
    source.write_bytes(b"here")
    with _watcher(_AWAIT, target, PATIENCE_SECONDS) as process:
        os.rename(source, target)
        renamed = time.time()
        delay = max(0.0, float(_answer(process)) - renamed)
    value = f"{1e3 * delay:.2g} ms"
    if delay > SEEN_SECONDS:
        return "degraded", "other processes see new files late: blocks are computed twice, none is lost", value
    return "ok", "other processes of this machine see a new file at once; other machines may see it later", value


@_file("whole replacement", "whether readers ever see half a file could not be told", "degraded")
def _probe_replacement(folder: Path) -> Result:
    path, spare, stop = folder / "whole", folder / "next", folder / "stop"
    path.write_bytes(b"a" * REPLACED_BYTES)
    with _watcher(_WATCH, path, stop, REPLACED_BYTES, PATIENCE_SECONDS) as process:
        end = time.monotonic() + REPLACING_SECONDS
        while time.monotonic() < end:
            for letter in (b"a", b"b"):
                spare.write_bytes(letter * REPLACED_BYTES)
                os.replace(spare, path)
        stop.write_bytes(b"")
        torn, seen = map(int, _answer(process).split())
    value = f"{torn} of {seen} reads"
    if torn:
        return "degraded", "a reader can meet a file that is just replaced: it fails and must be repeated", value
    return "ok", "a reader sees the old file or the new one", value


@_file("file locks", "no file can be locked: sets cannot be archived here; nothing else needs that", "degraded")
def _probe_locks(folder: Path) -> Result:
    import fcntl

    path = folder / "locked"
    path.write_bytes(b"")
    with open(path, "r+b") as first, open(path, "r+b") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "ok", "sets can be archived; nothing else needs file locks", ""
    return "degraded", "locks are granted twice: archive a set in one process only", "granted twice"


@_file("space", "free space cannot be told", "degraded")
def _probe_space(folder: Path) -> Result:
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    few = free < FEW_BYTES
    return "degraded" if few else "ok", "little is left" if few else "there is room", f"{free / 1e9:.1f} GB"


@_file("inodes", "how many files fit cannot be told", "degraded")
def _probe_inodes(folder: Path) -> Result:
    facts = os.statvfs(folder)
    if not facts.f_files:
        return "ok", "files are not counted here", "uncounted"
    few = facts.f_favail < FEW_FILES
    meaning = "few files fit: use larger blocks, or archive sets" if few else "there is room for files"
    return "degraded" if few else "ok", meaning, f"{facts.f_favail} of {facts.f_files} free"


@_file("quota", "quotas cannot be told", "degraded")
def _probe_quota(folder: Path) -> Result:
    kind, _ = file_system(folder)
    found = quotas.find_quotas(folder, kind, mounted_device(folder))
    if found is None:
        return "ok", "nobody here can be asked (quota, lfs): writing may fail before the disk is full", "unknown"
    if not found:
        return "ok", "no quota is set for this user", "none"
    sizes = [item.bytes for item in found if item.bytes is not None]
    counts = [item.files for item in found if item.files is not None]
    left = ([f"{min(sizes) / 1e9:.1f} GB"] if sizes else []) + ([f"{min(counts)} files"] if counts else [])
    few = min(sizes, default=FEW_BYTES) < FEW_BYTES or min(counts, default=FEW_FILES) < FEW_FILES
    meaning = f"little is left of the quota ({found[0].source})" if few else f"there is room ({found[0].source})"
    return "degraded" if few else "ok", meaning, ", ".join(left)


@_file("clock", "times of files cannot be told", "degraded")
def _probe_clock(folder: Path) -> Result:
    before = time.time()
    (folder / "dated").write_bytes(b"")
    after = time.time()
    dated = (folder / "dated").stat().st_mtime
    skew = dated - min(max(dated, before), after)
    if abs(skew) > SKEW_SECONDS:
        return (
            "degraded",
            "the clock of the files is another one: silent writers are noticed early or late",
            f"{skew:+.0f} s",
        )
    return "ok", "files are dated by the same clock", f"{skew:+.2g} s"


@_file("letter case", "whether names differ by case could not be told", "degraded")
def _probe_case(folder: Path) -> Result:
    (folder / "case").write_bytes(b"")
    if (folder / "CASE").exists():
        return "degraded", "names that differ only in case are one: name data sets and sets apart", "ignored"
    return "ok", "names that differ in case are two", ""


@_file("kind", "what kind of file system this is cannot be told", "degraded")
def _probe_kind(folder: Path) -> Result:
    kind, options = file_system(folder)
    if kind in ("tmpfs", "ramfs"):
        return "degraded", "it is memory: everything is gone when the machine stops", kind
    if kind == "overlay":
        return "degraded", "it is a container's own layer: it may go with the container", kind
    if kind.startswith(("fuse", *NETWORK)):
        return "ok", "other machines may write here; what they write can be seen some seconds late", kind
    return "ok", "a disk of this machine", f"{kind} {options}".strip()


def file_system(folder: Path, table: str | None = None) -> tuple[str, str]:
    """(type, options of the mount) of the file system that holds a folder, from the text of /proc/self/mountinfo.

    Raises:
        OSError: there is no such table, as on other systems than Linux.
    """
    kind, options, _ = _mount(folder, table)
    return kind, options


def mounted_device(folder: Path, table: str | None = None) -> str:
    """The device, or server and path, of the file system that holds a folder.

    Raises:
        OSError: there is no such table.
    """
    return _mount(folder, table)[2]


def _mount(folder: Path, table: str | None) -> tuple[str, str, str]:
    text = Path("/proc/self/mountinfo").read_text() if table is None else table
    place, best, found = folder.resolve(), -1, ("unknown", "", "")
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), left.split()[4])
        # Of two mounts on one point the later one is seen.
        if place.is_relative_to(point) and len(Path(point).parts) >= best:
            best, found = len(Path(point).parts), (right.split()[0], left.split()[5], right.split()[1])
    return found
