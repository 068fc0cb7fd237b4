"""What killed runs, removals and older versions left behind: found first, removed on request.

Nothing here may cost a commit, whatever runs beside it and wherever this process dies or freezes. Files of an attempt
go by the attempt's own rules (`commits.sweep_attempts`). A shard that no marker names goes through the commit
protocol: this process decides the block for itself, and moves the shard into its attempt's folder. Whoever wants to
commit the block takes that folder away first, so a move that wakes up late has no place to go to. Sets and manifests
are renamed out of sight, looked at again, and put back if somebody began to use them.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from featstore import files
from featstore.errors import ConfigError, CorruptError, FeatstoreError, StoreError
from featstore.store import commits, decisions, ledger
from featstore.store.catalog import Entry, Store
from featstore.store.layout import SCHEMA, read_spec, set_name
from featstore.store.locks import writer_lock
from featstore.store.shards import shard_key
from featstore.store.verify import set_folders

EMPTY_SECONDS = 86400.0  # a set without a commit may wait this long for its first
AGE = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}

Kind = Literal["attempt", "partial", "removed", "orphan", "manifest", "set", "cache"]


@dataclass(frozen=True, slots=True)
class Doomed:
    """A place that can go: why, and after how many seconds of silence its writer counts as dead."""

    place: Path
    num_bytes: int
    why: str
    kind: Kind
    older_than: float


def parse_age(text: str) -> float:
    """Seconds from `90s`, `10min`, `1h` or `2d`.

    Raises:
        ConfigError: anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h|d)", text)
    if not found:
        raise ConfigError(f"--older-than is a number with s, min, h or d (90s, 10min, 1h, 2d), got {text!r}")
    return float(found[1]) * AGE[found[2]]


def plan_gc(
    store: Store, *, older_than: float = commits.STALE_SECONDS, manifests: bool = False, stale: bool = False
) -> list[Doomed]:
    """What `collect` would remove, in the order in which it should.

    Always: attempts and partial files of dead writers, removals that were stopped, shards that no marker names, cache
    entries of files that are gone. `manifests`: those that are not current and that no set and no record names.
    `stale`: sets without a commit for a day, and those of an older schema that another set replaces.

    Raises:
        StoreError: the store is no folder, or a record is damaged, so that what it needs cannot be told.
    """
    if not isinstance(store.path, Path):
        raise StoreError(
            f"{store.path}: gc works on folders; in a bucket, set a lifecycle rule for `attempts/` instead"
        )
    found = [*_removed(store, older_than), *_partials(store, older_than)]
    for folder in set_folders(store):
        found += _attempts(folder, older_than)
        found += _orphans(folder, older_than)
    if stale:
        found += _stale_sets(store)
    if manifests:
        found += _unused_manifests(store, older_than)
    return [*found, *_cache(store)]


def collect(store: Store, item: Doomed) -> bool:
    """Remove one place if that is still right; True if it is gone.

    Raises:
        StoreError: it cannot be removed.
    """
    with files.writing(item.place), writer_lock(store.path):
        if item.kind == "attempt":
            commits.sweep_attempts(item.place.parent.parent, older_than=item.older_than)
        elif item.kind == "orphan":
            _withdraw(item.place)
        elif item.kind in ("set", "manifest"):
            _put_away(store, item)
        elif item.kind == "cache":
            files.write_atomic(item.place, files.canonical_json(_living(item.place)))
            return True
        elif _silent(item.place, item.older_than):
            if item.place.name.startswith(".unused-"):
                _settle(store, item.place)
            elif item.place.is_dir():
                shutil.rmtree(item.place, ignore_errors=True)
            else:
                item.place.unlink(missing_ok=True)
        return not item.place.exists()


def _size(place: Path) -> int:
    """Bytes of a file, or of all files of a folder; 0 for what goes meanwhile."""
    total = 0
    for path in [place, *place.rglob("*")] if place.is_dir() else [place]:
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _silent(place: Path, older_than: float) -> bool:
    """Whether its writer is a process of this machine that ended, or nothing in it changed for so long.

    The inode's time counts too: it tells of a rename, and nobody sets it back.
    """
    if files.is_dead(place.name):
        return True
    latest = 0.0
    for path in [place, *place.rglob("*")]:
        try:
            facts = path.lstat()
        except FileNotFoundError:
            return False  # somebody is at it
        latest = max(latest, facts.st_mtime, facts.st_ctime)
    return time.time() - latest >= older_than


def _removed(store: Store, older_than: float) -> Iterator[Doomed]:
    """Sets and manifests that were put away and not emptied, moves to this store that were stopped."""
    for pattern in ("sets/*/.removing-*", "sets/*/.unused-*", "datasets/*/.unused-*", "sets/*/.arriving-*"):
        for path in sorted(store.path.glob(pattern)):
            if _silent(path, older_than):
                arriving = path.name.startswith(".arriving-")
                why = "a move to this store that was stopped" if arriving else "a removal that was stopped"
                yield Doomed(path, _size(path), why, "removed", older_than)


def _partials(store: Store, older_than: float) -> Iterator[Doomed]:
    for path in sorted(store.path.rglob("*.partial")):
        inside = path.relative_to(store.path).parts
        if "attempts" in inside or any(part.startswith((".removing-", ".unused-", ".arriving-")) for part in inside):
            continue  # goes with its folder
        if path.is_file() and _silent(path, older_than):
            yield Doomed(path, _size(path), "a file that its writer did not finish", "partial", older_than)


def _attempts(folder: Path, older_than: float) -> Iterator[Doomed]:
    home = folder / "attempts"
    decided = decisions.decided_attempts(folder)
    for attempt in sorted(home.iterdir()) if home.is_dir() else []:
        if attempt.name not in decided and _silent(attempt, older_than):
            yield Doomed(attempt, _size(attempt), "a block that its writer did not finish", "attempt", older_than)


def _orphans(folder: Path, older_than: float) -> Iterator[Doomed]:
    """Shards without a marker: of blocks that were taken back, or whose commit was given up."""
    try:
        book = ledger.read_ledger(folder)
        rows = int(read_spec(folder)["layout"]["block_rows"])
    except OSError:
        return  # damaged: what belongs to what cannot be told
    for group, arrays in book.groups.items():
        held = commits.committed_blocks(folder, group) | _being_published(folder, group)
        for array in arrays:
            shard_rows = array.layout(rows)[0]
            base = folder / "data.zarr" / array.name
            for path in sorted((base / "c").glob("*")):
                if not path.name.isdecimal():
                    continue
                shard = base / shard_key(int(path.name), 1 + len(array.row_shape))
                block = int(path.name) * shard_rows // rows
                if block not in held and shard.is_file() and _silent(shard, older_than):
                    yield Doomed(shard, _size(shard), "a shard that no commit names", "orphan", older_than)


def _being_published(folder: Path, group: str) -> set[int]:
    """Blocks that somebody decided and did not finish; a decision without its files is one of a stopped collector."""
    found = set()
    for block in decisions.open_intents(folder, group):
        with suppress(CorruptError):
            intent = decisions.decided(folder, group, block)
            if intent is not None and (folder / "attempts" / intent.attempt / commits.MARKER).is_file():
                found.add(block)
    return found


def _withdraw(shard: Path) -> None:
    """Take a shard away unless its block is committed, being committed, or becomes so."""
    folder = next(parent for parent in shard.parents if (parent / "data.zarr").is_dir())
    book = ledger.read_ledger(folder)
    rows = int(read_spec(folder)["layout"]["block_rows"])
    inside = shard.relative_to(folder / "data.zarr").as_posix()
    array = next(item for item in book.arrays.values() if inside.startswith(f"{item.name}/c/"))
    group = book.group_of(array.name)
    number = int(inside.removeprefix(f"{array.name}/c/").split("/")[0])
    block = number * array.layout(rows)[0] // rows
    commits.finish_block(folder, group, book.groups[group], block, rows)
    home = folder / "attempts" / files.own_name()
    files.make_folder(home)
    decisions.decide(folder, group, block, home.name)
    intent = decisions.decided(folder, group, block)
    if intent is None or intent.attempt != home.name:
        with suppress(OSError):
            home.rmdir()  # the block is somebody else's
        return
    if not decisions.is_marked(folder, group, block):
        # Fails where another process has finished this decision: the folder is gone, and the shard not ours.
        with suppress(FileNotFoundError):
            os.rename(shard, home / commits.attempt_file(array.name, number))
    commits.finish_block(folder, group, book.groups[group], block, rows)


def _stale_sets(store: Store) -> Iterator[Doomed]:
    for folder in set_folders(store):
        why = _stale(store, folder)
        if why:
            yield Doomed(folder, _size(folder), why, "set", EMPTY_SECONDS)


def _stale(store: Store, folder: Path) -> str:
    """Why a set is of no use, or ''. A set that cannot be read is never called stale."""
    try:
        spec = read_spec(folder)
        ledger.read_ledger(folder)
        if not _has_commits(folder):
            return "a set that holds nothing" if _silent(folder, EMPTY_SECONDS) else ""
        if spec["schema"] < SCHEMA and _is_replaced(store, folder, spec):
            return f"a set of schema {spec['schema']} that was made anew in schema {SCHEMA}"
    except (OSError, KeyError):
        return ""
    return ""


def _has_commits(folder: Path) -> bool:
    """Blocks committed or decided; also markers that are damaged."""
    return any(path.suffix in (".json", ".intent") for path in folder.glob("commits/*/*"))


def _is_replaced(store: Store, folder: Path, spec: dict[str, Any]) -> bool:
    """Whether a complete set of the present schema has the same name, the same identity and all arrays of this one."""
    wanted = {**spec["identity"], "schema": SCHEMA}
    for other in set_folders(store):
        if other == folder or other.parent != folder.parent:
            continue
        try:
            found = read_spec(other)
            if found["identity"] == wanted and set_name(found) == set_name(spec):
                old, new = store.open(Entry(folder, spec)), store.open(Entry(other, found))
                if set(old.arrays) <= set(new.arrays) and not new.pending().any():
                    return True
        except (FeatstoreError, FileNotFoundError):
            continue
    return False


def _unused_manifests(store: Store, older_than: float) -> Iterator[Doomed]:
    for dataset in store.datasets():
        used = _used_manifests(store, dataset)
        for folder in sorted((store.datasets_folder / dataset).iterdir()):
            unused = folder.is_dir() and not folder.name.startswith(".") and folder.name not in used
            if unused and _silent(folder, older_than):
                why = "a manifest that no set and no record names"
                yield Doomed(folder, _size(folder), why, "manifest", older_than)


def _used_manifests(store: Store, dataset: str) -> set[str]:
    """Short digests that the data set itself, a set or a record in the store's results names.

    Raises:
        StoreError: a record or a ledger is damaged.
    """
    used = {(store.datasets_folder / dataset / "current").read_bytes().decode("ascii", "replace").strip()}
    used |= {path.name.partition(".")[0] for path in store.path.glob(f"sets/{dataset}/*/rows/*")}
    for folder in set_folders(store):
        if folder.parent.name == dataset:
            used |= {segment.manifest for segment in ledger.read_ledger(folder).segments}
    for path in store.path.glob("results/*.json"):
        used.add(str(files.unseal(path.read_bytes(), path).get("manifest"))[:8])
    return used


def _put_away(store: Store, item: Doomed) -> None:
    """Rename a set or a manifest out of sight and settle it there."""
    spare = item.place.with_name(f".unused-{files.own_name()}.{item.place.name}")
    with suppress(FileNotFoundError):
        item.place.rename(spare)
        _settle(store, spare)


def _settle(store: Store, spare: Path) -> None:
    """Empty what was put away, or put it back if somebody began to use it before it went out of sight."""
    if spare.parent.parent == store.datasets_folder:
        needed = spare.name.split(".", 2)[2] in _used_manifests(store, spare.parent.name)
    else:
        needed = _has_commits(spare) and read_spec(spare)["schema"] == SCHEMA
    if needed:
        with suppress(FileExistsError, OSError):  # where the name is taken again, both stay
            spare.rename(spare.with_name(spare.name.split(".", 2)[2]))
    else:
        shutil.rmtree(spare, ignore_errors=True)


def _cache(store: Store) -> Iterator[Doomed]:
    """Digests remembered of weight files that are gone."""
    path = store.path / "cache" / "weights.json"
    if path.is_file():
        before, after = path.stat().st_size, len(files.canonical_json(_living(path)))
        if after < before:
            why = "digests of weight files that are gone"
            yield Doomed(path, before - after, why, "cache", 0.0)


def _living(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_bytes())
    except ValueError:
        return {}  # a damaged cache holds nothing
    return {name: facts for name, facts in entries.items() if Path(name).exists()}
