"""`featstore doctor`: what the place of a store can do, and the way of publishing files that is safe there.

Commits need one thing: a name that is taken together with its whole content, and never twice. Hard links give it, else
renameat2 with RENAME_NOREPLACE, and on object stores a conditional put. Where there is none of these, one writer at a
time is safe if files can be created exclusively and renamed. What is found is measured, not guessed from the kind of
file system.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from featstore import files, records
from featstore.doctor import buckets, folders
from featstore.doctor.findings import Finding, Probe, State
from featstore.errors import StoreError
from featstore.objects import ObjectPath, Place, connection

Mode = Literal["link", "rename", "single", "conditional"]
# Without these there is no safe way to write: of folders, of buckets.
NEEDED = ("write", "exclusive create", "rename", "long names", "put", "listing", "delete")
STRICTNESS = {"link": 0, "conditional": 0, "rename": 1, "single": 2}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings and what they add up to; `mode` is None where no store can be written, and `why` says why."""

    place: str
    findings: list[Finding]
    mode: Mode | None
    fsync: bool
    why: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def probes_of(root: Place) -> list[Probe]:
    """What is asked of this kind of place."""
    return folders.PROBES if isinstance(root, Path) else buckets.PROBES


def diagnose(root: Place, *, advance: Callable[[int], None] = lambda _: None) -> Diagnosis:
    """Probe the place of a store; everything written for it is removed again. `advance(1)` follows each probe.

    Raises:
        StoreError: the path is a file.
    """
    if isinstance(root, Path) and root.exists() and not root.is_dir():
        raise StoreError(f"{root}: a store is a folder, this is a file; pass another STORE")
    scratch: Any = _scratch_folder(root) if isinstance(root, Path) else _scratch_prefix(root)
    findings: list[Finding] = []
    try:
        with scratch as place:
            for probe in probes_of(root):
                findings.append(probe(place))
                advance(1)
    except OSError as error:
        findings.append(Finding("write", "missing", "nothing can be created here", error.strerror or str(error)))
    state = {item.name: item.state for item in findings}
    missing = [item for item in findings if item.name in NEEDED and item.state == "missing"]
    if missing:
        why = f"no store can be written here: {missing[0].name}: {missing[0].meaning} ({missing[0].value})"
        return Diagnosis(str(root), findings, None, False, why)
    mode, why = _choose(state)
    fsync = all(state.get(name, "ok") == "ok" for name in ("fsync of files", "fsync of folders"))
    return Diagnosis(str(root), findings, mode, fsync, why)


def _choose(state: dict[str, State]) -> tuple[Mode, str]:
    if state.get("conditional put") == state.get("conditional replacement") == "ok":
        return "conditional", "objects are put only where there is none; any number of writers"
    if state.get("hard links", "missing") != "missing":
        return "link", "files are published by hard links; any number of writers"
    if state.get("rename without replacing") == "ok":
        return "rename", "copies are renamed where nothing is replaced; any number of writers"
    return "single", "a name cannot be taken exclusively with its content, so one writer at a time holds a lock"


def settle(root: Place, diagnosis: Diagnosis) -> str:
    """Make the store work in the mode that was found, by a `mode.json` where one is needed; says what was done.

    Raises:
        StoreError: no mode is safe there, or it cannot be written down.
        CorruptError: the present mode.json is damaged.
    """
    if diagnosis.mode is None:
        raise StoreError(f"{root}: {diagnosis.why}; put the store on a local disk, on NFS or in an S3 bucket")
    path = root / files.MODE
    held = files.unseal(path.read_bytes(), path) if path.is_file() else None
    mode, kept = str(diagnosis.mode), ""
    if held is not None and STRICTNESS.get(held["mode"], 3) > STRICTNESS[mode] and any(root.glob("sets/*/*/spec.json")):
        # A writer of the old mode may be at work, and it is not safe beside one of a laxer mode.
        kept = (
            f"mode {held['mode']} stays though {mode} works here too, since sets exist; to change it, remove {path} "
            "when nothing writes here and run doctor again"
        )
        mode = held["mode"]
    # Links or conditional puts, and syncing, are what a store counts on where nothing is written down.
    plain = STRICTNESS[mode] == 0 and diagnosis.fsync
    wanted = None if plain else {"mode": mode, "fsync": diagnosis.fsync}
    if wanted == (None if held is None else {"mode": held["mode"], "fsync": held.get("fsync", True)}):
        return kept or "nothing to write down"
    if wanted is None:
        path.unlink()
        return f"{path} removed: this place does not need it"
    _write(path, files.sealed({**wanted, "probed": records.utc_now()}))
    return f"{path} written" + (f"; {kept}" if kept else "")


def _write(path: Place, data: bytes) -> None:
    """Put a small file in place where links and fsync may be absent."""
    if not isinstance(path, Path):
        path.put(data)
        return
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        spare = path.with_name(f"{path.name}.{files.own_name()}.partial")
        try:
            with open(spare, "xb") as file:
                file.write(data)
                file.flush()
                with contextlib.suppress(OSError):  # whether this works is what the file says
                    os.fsync(file.fileno())
            os.replace(spare, path)
        finally:
            spare.unlink(missing_ok=True)


@contextlib.contextmanager
def _scratch_folder(root: Path) -> Iterator[Path]:
    """A folder for the probes in `root`; it goes whatever happens, and so do parents that were made for it."""
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    folder = root / f".doctor-{files.own_name()}"
    try:
        folder.mkdir(parents=True)
        for left in root.glob(".doctor-*"):  # by a doctor that was killed
            if files.is_dead(left.name):
                shutil.rmtree(left, ignore_errors=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            for empty in made:
                empty.rmdir()


@contextlib.contextmanager
def _scratch_prefix(root: ObjectPath) -> Iterator[ObjectPath]:
    prefix = root / f".doctor-{files.own_name()}"
    held = connection(root.bucket)
    before, held.conditional = held.conditional, True  # the conditions are what is asked about
    try:
        yield prefix
    finally:
        held.conditional = before
        with contextlib.suppress(OSError):
            prefix.remove_below()
