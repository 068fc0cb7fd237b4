"""Bring a store of schema 1 to schema 2: names, descriptions and seals are written anew, the rows stay the same files.

Schema 2 says in the ledger how arrays are cut, names their axes, and seals mappings and manifests; the schema is part
of a set's identity, so its fingerprint and folder change. The new folder is built beside the old one under a name that
no reader looks at, with hard links to all shards, and checked; then it gets its name, and only then the old one goes.
`store.json` changes last: until then the store is open for reading only. A call after a kill goes on from there.
"""

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from featstore import files
from featstore.datasets import manifest as manifests
from featstore.errors import CorruptError, ManifestError, StoreError
from featstore.objects import Place
from featstore.store import commits, ledger
from featstore.store.archive import exclusive
from featstore.store.catalog import Entry, Store
from featstore.store.layout import SCHEMA, check_store, read_spec, set_folder

OLD = 1  # the one schema that can be brought to the present one
UPGRADED, LOCK = "upgraded.json", "upgrade.lock"
BUILDING = ".upgrading"  # in the root of the store, so that names and depths below it are those of sets
Advance = Callable[[int], None]


def upgraded(root: Place) -> dict[str, str]:
    """Fingerprint before -> fingerprint after, of every set of this store that was ever upgraded."""
    path = root / UPGRADED
    return dict(files.unseal(path.read_bytes(), path)["fingerprints"]) if path.is_file() else {}


def new_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec of the same set under the present schema."""
    identity = {**spec["identity"], "schema": SCHEMA}
    return {**spec, "schema": SCHEMA, "identity": identity, "fingerprint": files.digest(identity)}


def schema_of(root: Place) -> int:
    """The schema that `store.json` states.

    Raises:
        StoreError: no store there.
    """
    mark = root / "store.json"
    if not mark.is_file():
        raise StoreError(f"{root}: no store here, so there is nothing to upgrade; pass --store or set FEATSTORE_HOME")
    check_store(root)
    return int(files.unseal(mark.read_bytes(), mark)["schema"])


def upgrade_store(root: Place, *, dry_run: bool = False, advance: Advance = lambda _: None) -> dict[str, Any]:
    """Upgrade every set and manifest of a store; nothing is recomputed. `advance` is told each set that is done.

    Returns the schema before and after, and of each set its name, fingerprints, files and bytes. `dry_run` changes
    nothing.

    Raises:
        StoreError: no store, one in a bucket, a run of an older version still writes, or another process upgrades.
        CorruptError, ManifestError: a set or manifest is damaged in a way that a new seal would hide.
    """
    if not isinstance(root, Path):
        raise StoreError(f"{root}: stores of schema {OLD} are folders; upgrade the folder, then copy it to the bucket")
    before = schema_of(root)
    if before == SCHEMA:
        if (root / LOCK).exists() and not dry_run:
            with files.writing(root), exclusive(root, LOCK, "upgrading this store"):
                pass  # which removes what a call left that was killed with nothing left to do
        return {"store": str(root), "from": before, "to": SCHEMA, "sets": [], "manifests": 0}
    if dry_run:
        return _facts(root, before, _old_sets(root))
    with files.writing(root), exclusive(root, LOCK, "upgrading this store"):
        manifest_folders = _checked_manifests(root)
        sets = _old_sets(root)
        for entry in sets:
            _require_quiet(entry)
        facts = _facts(root, before, sets)
        for entry in sets:
            _upgrade_set(root, entry)
            advance(1)
        for left in [root / BUILDING, *(root / "sets").glob("*/.removing-*")]:
            if left.exists():
                shutil.rmtree(left)
        for folder in manifest_folders:
            _seal_manifest(folder)
        mark = root / "store.json"
        if schema_of(root) != SCHEMA:
            held = files.unseal(mark.read_bytes(), mark)
            files.write_atomic(mark, files.sealed({**held, "schema": SCHEMA}))
    return facts


def _old_sets(root: Place) -> list[Entry]:
    return [entry for entry in Store(root).entries() if entry.spec["schema"] == OLD]


def _facts(root: Place, before: int, sets: list[Entry]) -> dict[str, Any]:
    rows = []
    for entry in sets:
        sizes = [path.stat().st_size for path in entry.folder.rglob("*") if path.is_file()]
        rows.append(
            {
                "set": entry.name,
                "old": entry.spec["fingerprint"],
                "new": new_spec(entry.spec)["fingerprint"],
                "files": len(sizes),
                "bytes": sum(sizes),
            }
        )
    count = sum(1 for _ in (root / "datasets").glob("*/*/source.toml"))
    return {"store": str(root), "from": before, "to": SCHEMA, "sets": rows, "manifests": count}


def _require_quiet(entry: Entry) -> None:
    """Finish what dead writers decided; refuse while a living one may still write."""
    size = int(entry.spec["layout"]["block_rows"])
    commits.finish_intents(entry.folder, ledger.read_ledger(entry.folder), size)
    commits.sweep_attempts(entry.folder, older_than=commits.STALE_SECONDS)
    left = sorted((entry.folder / "attempts").glob("*"))
    if left:
        raise StoreError(
            f"{left[0]}: a run is still writing into this set; let it end (or wait an hour, if it died on another "
            "machine), then upgrade again"
        )


def _upgrade_set(root: Place, entry: Entry) -> None:
    old, spec = entry.folder, new_spec(entry.spec)
    new = set_folder(root, spec)
    building = root / BUILDING / new.relative_to(root / "sets")
    if not new.exists():
        if building.exists():
            shutil.rmtree(building)  # of a killed call; links cost little
        _build(old, building, spec)
        _compare(root, entry, Entry(building, spec))
        _remember(root, entry.spec["fingerprint"], spec["fingerprint"])
        os.rename(building, new)
        files.sync_folder(new.parent)
    elif read_spec(new) != spec:
        raise CorruptError(f"{new}: stands where {old} would be upgraded to, and is another set; move one of them away")
    doomed = old.with_name(f".removing-{uuid.uuid4().hex}")
    os.rename(old, doomed)  # gone at once for every reader, then emptied
    files.sync_folder(old.parent)
    shutil.rmtree(doomed)


def _kept(old: Place) -> Iterator[Place]:
    """Files that go into the new set as they are: shards, markers, mappings, run files."""
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old).as_posix()
        written_anew = (
            name == "spec.json" or name.startswith("ledger/") or re.fullmatch(r"data\.zarr/.*zarr\.json", name)
        )
        unfinished = name.startswith("attempts/") or name.endswith((".partial", ".intent"))
        if path.is_file() and not written_anew and not unfinished:
            yield path


def _build(old: Place, building: Place, spec: dict[str, Any]) -> None:
    book = ledger.read_ledger(old)
    files.create_exclusive(building / "spec.json", files.sealed(spec))
    for number in range(book.num_entries):
        path = ledger.entry_path(old, number)
        entry = files.unseal(path.read_bytes(), path)
        if entry["kind"] == "arrays":  # read_ledger has worked out how they are cut
            entry["arrays"] = [array.as_dict() for array in book.groups[entry["group"]]]
        files.create_exclusive(ledger.entry_path(building, number), files.sealed(entry))
    folders = set()
    for path in _kept(old):
        target = building / path.relative_to(old)
        files.make_folder(target.parent)
        _link(path, target)
        folders.add(target.parent)
    for folder in folders:
        files.sync_folder(folder)
    for path in (building / "rows").glob("*.parquet"):
        ledger.read_mapping(path)  # raises if it is damaged: it gets no seal then
        ledger.seal_rows(path)
    ledger.write_metadata(building, spec, ledger.read_ledger(building))


def _link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in files.NO_LINKS:
            raise
        if shutil.disk_usage(target.parent).free < source.stat().st_size:
            raise StoreError(
                f"{target}: this file system has no hard links, and a copy has no room; free as much as the largest "
                "set takes, then upgrade again"
            ) from error
        shutil.copyfile(source, target)
        with open(target, "rb+") as file:
            files.sync(file.fileno(), target)


def _compare(root: Place, old: Entry, new: Entry) -> None:
    """The new set may have no problem that the old one does not have."""
    from featstore.store.verify import verify_set

    store = Store(root)
    before, after = verify_set(store, old), verify_set(store, new)
    had = {problem.place for problem in before.problems}
    found = [f"{problem.place}: {problem.what}" for problem in after.problems if problem.place not in had]
    if after.num_blocks != before.num_blocks:
        found.append(f"it has {after.num_blocks} of {before.num_blocks} blocks")
    if found:
        raise CorruptError(
            f"{old.folder}: not upgraded, because the new set would not be whole ({found[0]}); the old one stays as it "
            "is, and the version that wrote it can repair it"
        )


def _remember(root: Place, old: str, new: str) -> None:
    known = upgraded(root)
    if known.get(old) != new:
        files.write_atomic(root / UPGRADED, files.sealed({"schema": SCHEMA, "fingerprints": {**known, old: new}}))


def _checked_manifests(root: Place) -> list[Place]:
    """Folders of all manifests, each found whole: a seal must not be put on damage.

    Raises:
        ManifestError: one is not.
    """
    found = []
    for source in sorted((root / "datasets").glob("*/*/source.toml")):
        folder = source.parent
        manifest = manifests.load(root / "datasets", folder.parent.name, folder.name)
        if manifests.table_digest(manifest.table) != manifest.digest:
            raise ManifestError(
                f"{folder}: the samples do not match the digest of this manifest; restore it from a copy, or remove "
                "the folder if no set needs it, then upgrade again"
            )
        found.append(folder)
    return found


def _seal_manifest(folder: Place) -> None:
    path = folder / "source.toml"
    data = path.read_bytes()
    if b'\nseal = "' in data:
        return
    head = data + f'sha256 = "{files.digest((folder / "manifest.parquet").read_bytes())}"\n'.encode()
    files.write_atomic(path, head + f'seal = "{files.digest(head)}"\n'.encode())
