"""Give a set another model name, or another store.

What a set is, its fingerprint, stays. At every moment exactly one folder of a store is this set, whole: a rename moves
it, an atomic replace of its spec changes what it is called, and in another store it appears by a rename after every
file was read back. Whatever is stopped goes on when the same command is run again.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from featstore import files
from featstore.datasets import manifest as manifests
from featstore.errors import ConfigError, CorruptError, StoreError
from featstore.objects import Place
from featstore.store import commits, ledger
from featstore.store.archive import LOCK, exclusively, require_calm
from featstore.store.catalog import Entry, Store
from featstore.store.kinds import check_arrival
from featstore.store.layout import check_current, check_store, read_spec, set_folder, store_path
from featstore.store.locks import writer_lock
from featstore.store.verify import verify_set

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
COPY_BYTES = 2**20
# Left behind in a move: they belong to attempts, which are not committed, or to the move itself.
PASSING = re.compile(rf"(attempts/.*|.*\.partial|.*\.intent|{re.escape(LOCK)})")


def rename_set(entry: Entry, new: str) -> Path:
    """Give a set another model name: `dataset/new-name`; returns its folder.

    The folder is renamed first, then its spec is replaced: between the two the set stands under its old name, and the
    same call completes what was stopped there.

    Raises:
        ConfigError: no such name can be given, or sets of another kind of weights have it.
        StoreError: the name is taken, a writer is at work in the set, another process converts or moves it, or the
            store cannot be written.
    """
    dataset, _, model = new.partition("/")
    if dataset != entry.dataset or not NAME.fullmatch(model):
        raise ConfigError(
            f"a set is renamed to {entry.dataset}/NEW-MODEL, where NEW-MODEL is letters, digits, '.', '_', '+' and '-' "
            f"(resolution and fingerprint stay as they are); got {new!r}"
        )
    old = _local(entry.folder)
    check_arrival(Store(old.parents[2]), entry, model, "choose another name")
    spec = {key: value for key, value in entry.spec.items() if key != "digest"} | {"model": model}
    check_current(int(spec["schema"]), f"{old}: this set")
    folder = set_folder(old.parents[2], spec)
    with files.writing(old), exclusively(old):
        if folder != old:
            _require_calm(old)
            if folder.exists():
                raise StoreError(f"{folder} exists already; choose another name, or remove that set first")
        with writer_lock(old.parents[2]):
            if folder != old:
                os.rename(old, folder)  # never onto a set: a folder that is not empty is not replaced
                files.sync_folder(folder.parent)
            if read_spec(folder)["model"] != model:
                files.write_atomic(folder / "spec.json", files.sealed(spec))
        (folder / LOCK).unlink(missing_ok=True)  # which came along, still held
    return folder


def _local(folder: Place) -> Path:
    if not isinstance(folder, Path):
        raise StoreError(f"{folder}: objects of a bucket cannot be renamed; extract or merge into a new set instead")
    return folder


def _require_calm(folder: Path) -> None:
    """Blocks decided by dead writers are finished; anybody else at work here would write into a folder that is gone.

    Raises:
        StoreError: a writer is, or may be, at work.
    """
    with files.writing(folder):
        rows = int(read_spec(folder)["layout"]["block_rows"])
        require_calm(folder)
        commits.finish_intents(folder, ledger.read_ledger(folder), rows)


def move_set(store: Store, entry: Entry, to: str | Place, *, advance: Callable[[int], None] = lambda _: None) -> Path:
    """Move a set, and what it needs of its data set, to another store; returns its folder there.

    Files are linked where both stores lie on one file system, otherwise copied and read back. The manifests stay here
    too. `advance` is told the bytes done, of `set_bytes`.

    Raises:
        ConfigError: sets of another kind of weights have its name there.
        StoreError: the same store, another set under that name there, a writer at work, another process that converts
            or moves the set, or a store that cannot be written.
        CorruptError: a file does not read back, or the set is damaged; nothing is removed here.
    """
    source, root = _local(entry.folder), _local(store_path(to))
    check_current(int(entry.spec["schema"]), f"{source}: this set")
    if root.resolve() == Path(store.path).resolve():
        raise StoreError(f"{root}: the set is there already; name another store")
    model = str(entry.spec["model"])
    check_arrival(Store(root), entry, model, f"rename it first: `featstore mv {entry.full_name} {entry.dataset}/NEW`")
    with files.writing(source), exclusively(source):
        return _move(store, entry, source, root, advance)


def _move(store: Store, entry: Entry, source: Path, root: Path, advance: Callable[[int], None]) -> Path:
    _require_calm(source)
    verdict = verify_set(store, entry)
    if not verdict.ok:
        problem = verdict.problems[0]
        raise CorruptError(f"{source}: {problem.place}: {problem.what}; verify and repair the set before it is moved")
    check_store(root, create=True)
    final = root / source.relative_to(store.path)
    with files.writing(root), writer_lock(store.path) as here, writer_lock(root) as there:
        _copy_manifests(Path(store.datasets_folder), root / "datasets", entry, source)
        held = _listing(source)
        if not final.exists():
            arriving = final.with_name(f".arriving-{final.name}")
            _copy_files(source, arriving, held, here.renewing(there.renewing(advance)))
            with suppress(FileNotFoundError):  # another process moved the same set
                os.rename(arriving, final)
            files.sync_folder(final.parent)
        _require_same(source, final, held)
    _remove_source(source, held)
    return final


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and mtime of every file that belongs to the set."""
    found = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).as_posix()
        if path.is_file() and not PASSING.fullmatch(inside):
            facts = path.stat()
            found[inside] = facts.st_size, facts.st_mtime_ns
    return found


def _copy_manifests(source: Path, target: Path, entry: Entry, folder: Path) -> None:
    """Manifests that the set was extracted for; `current` only where the data set is new."""
    shorts = sorted(path.stem for path in (folder / "rows").glob("*.parquet"))
    for short in shorts:
        manifests.load(source, entry.dataset, short)  # what is damaged is not passed on
        for name in ("manifest.parquet", "source.toml"):
            files.create_exclusive(
                target / entry.dataset / short / name, (source / entry.dataset / short / name).read_bytes()
            )
    current = (source / entry.dataset / "current").read_bytes()
    known = current if current.decode().strip() in shorts else f"{shorts[-1]}\n".encode() if shorts else b""
    if known:
        files.create_exclusive(target / entry.dataset / "current", known)
    for short in shorts:
        manifests.load(target, entry.dataset, short)


def set_bytes(entry: Entry) -> int:
    """Bytes that a move of this set copies."""
    return sum(size for size, _ in _listing(_local(entry.folder)).values())


def _copy_files(source: Path, target: Path, held: dict[str, tuple[int, int]], advance: Callable[[int], None]) -> None:
    """Every file under its own name, whole; those that are there from a move that was stopped stay."""
    # The spec comes last: a folder without one is no set.
    for inside in sorted(held, key=lambda name: name == "spec.json"):
        final = target / inside
        if not (final.is_file() and _digest(final) == _digest(source / inside)):
            _copy_file(source / inside, final)
        advance(held[inside][0])
    for path in target.rglob("*"):
        inside = path.relative_to(target).as_posix()
        if path.is_file() and inside not in held and (files.is_dead(path.name) or not PASSING.fullmatch(inside)):
            path.unlink(missing_ok=True)  # the set changed since that move was stopped


def _copy_file(source: Path, final: Path) -> None:
    files.make_folder(final.parent)
    partial = final.with_name(f"{final.name}.{files.own_name()}.partial")
    try:
        try:
            os.link(source, partial)
        except OSError as error:
            if error.errno not in files.NO_LINKS:
                raise
            wanted = hashlib.sha256()
            with open(source, "rb") as held, open(partial, "xb") as file:
                while data := held.read(COPY_BYTES):
                    wanted.update(data)
                    file.write(data)
                file.flush()
                files.sync(file.fileno(), final)
            if _digest(partial) != wanted.hexdigest():
                raise CorruptError(f"{final}: does not read back as it was written; check that disk") from error
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)
    files.sync_folder(final.parent)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_same(source: Path, final: Path, held: dict[str, tuple[int, int]]) -> None:
    """What stands in the other store is this set, byte for byte."""
    there = _listing(final)
    for inside in sorted({*held, *there}):
        if inside in held and inside in there:
            a, b = source / inside, final / inside
            if a.samefile(b) or (held[inside][0] == there[inside][0] and _digest(a) == _digest(b)):
                continue
        raise StoreError(f"{final} exists and differs from {source} in {inside}; remove one of the two, or merge them")


def _remove_source(source: Path, held: dict[str, tuple[int, int]]) -> None:
    """Out of sight by one rename, looked at again, then emptied."""
    spare = source.with_name(f".removing-{files.own_name()}")
    with files.writing(source):
        _require_calm(source)
        same = _listing(source) == held
        if same:
            os.rename(source, spare)
            same = _listing(spare) == held
            if not same:
                os.rename(spare, source)
        if not same:
            raise StoreError(f"{source}: was written while it was moved; nothing is removed here, run the same again")
        shutil.rmtree(spare, ignore_errors=True)
