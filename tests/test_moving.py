"""mv: a set keeps what it is; at every moment one whole set stands, whoever dies, and the same command completes it."""

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_sets import (
    CLS,
    PATCHES,
    KilledError,
    Trap,
    check_blocks,
    contents,
    kill,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    values_of,
    write_block,
    write_missing,
    writer_of,
)

from featstore.datasets import manifest as manifests
from featstore.errors import ConfigError, CorruptError, SchemaError, StoreError
from featstore.objects import ObjectPath
from featstore.store import commits
from featstore.store.catalog import Entry, Store
from featstore.store.layout import ArraySpec, read_spec
from featstore.store.moving import move_set, rename_set, set_bytes
from featstore.store.verify import verify_set, verify_store

GROUP = "cls+patches"
MANIFEST = make_manifest(named(40))


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def new_set(root: Path, arrays: tuple[ArraySpec, ...] = (CLS, PATCHES)) -> Path:
    folder = prepare(root, make_spec_of(), MANIFEST, list(arrays))
    write_missing(folder, 1, block_rows=16)
    return folder


def entry_of(root: Path, name: str = "demo/tiny") -> Entry:
    return Store(root).entry(name)


def check_whole(root: Path, name: str) -> Path:
    """The one set of a store is whole, under this name, and every reader sees it."""
    store = Store(root)
    (entry,) = store.entries()
    assert entry.name == name
    assert verify_set(store, entry, deep=True).ok
    np.testing.assert_array_equal(store.set(name).load("cls", verify=True), values_of(CLS, 0, 40, 1))
    assert len(check_blocks(entry.folder, {1})) == 3
    return entry.folder


def test_a_renamed_set_is_the_same_set(tmp_path: Path) -> None:
    folder = new_set(tmp_path)
    fingerprint = read_spec(folder)["fingerprint"]
    before = contents(folder)
    moved = rename_set(entry_of(tmp_path), "demo/my-vit.2")
    assert moved == folder.with_name(f"my-vit.2@42-{fingerprint[:8]}")
    assert check_whole(tmp_path, "demo/my-vit.2@42") == moved
    assert {name: data for name, data in contents(moved).items() if before[name] != data}.keys() == {"spec.json"}
    assert read_spec(moved) == {**read_spec(moved), "model": "my-vit.2", "fingerprint": fingerprint}
    assert rename_set(entry_of(tmp_path, "demo/my-vit.2"), "demo/my-vit.2") == moved
    assert rename_set(entry_of(tmp_path, "demo/my-vit.2"), "demo/tiny") == folder
    assert contents(folder) == before


@pytest.mark.parametrize("new", ["other/tiny", "demo", "demo/", "demo/a@42", "demo/../x", "demo/.x", "demo/a/b"])
def test_names_that_cannot_be_given(tmp_path: Path, new: str) -> None:
    new_set(tmp_path)
    with pytest.raises(ConfigError, match="a set is renamed to demo/NEW-MODEL, where NEW-MODEL is letters"):
        rename_set(entry_of(tmp_path), new)


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    new_set(tmp_path)
    prepare(tmp_path, make_spec_of(model="taken"), MANIFEST, [CLS])
    with pytest.raises(StoreError, match=r"taken@42-.* exists already; choose another name, or remove that set first"):
        rename_set(entry_of(tmp_path), "demo/taken")
    assert len(Store(tmp_path).entries()) == 2


def test_a_set_with_a_writer_at_work_stays(tmp_path: Path) -> None:
    folder = new_set(tmp_path / "a")
    commits.take_back(folder, GROUP, [CLS, PATCHES], 0, 16)
    message = "a writer is at work here .1 attempts.; wait for it, or stop it"
    with writer_of(folder, GROUP, 0):
        with pytest.raises(StoreError, match=message):
            rename_set(entry_of(tmp_path / "a"), "demo/new")
        with pytest.raises(StoreError, match=message):
            move_set(Store(tmp_path / "a"), entry_of(tmp_path / "a"), tmp_path / "b")
    write_block(folder, GROUP, 0, 1)
    check_whole(tmp_path / "a", "demo/tiny@42")


def test_older_schemas_and_buckets_are_refused(tmp_path: Path) -> None:
    folder = new_set(tmp_path)
    entry = entry_of(tmp_path)
    with pytest.raises(SchemaError, match="has schema 1 and is open for reading only"):
        rename_set(Entry(folder, {**entry.spec, "schema": 1}), "demo/new")
    bucket: Any = ObjectPath("bucket", "sets/demo/x")
    with pytest.raises(StoreError, match="objects of a bucket cannot be renamed; extract or merge"):
        rename_set(Entry(bucket, entry.spec), "demo/new")


def renamed(root: Path) -> None:
    rename_set(entry_of(root), "demo/new")


def moved(root: Path) -> None:
    move_set(Store(root), entry_of(root), root.with_name(f"{root.name}-to"))


def killed_at_each_call(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[Path], None],
    *,
    after: bool,
    step: int = 1,
    copied: bool = False,
) -> list[Path]:
    """A store for each call of `work` (or each `step`-th) at which it died."""
    new_set(tmp_path / "template", (CLS,))
    roots = []
    for at in range(1, 1000, step):
        root = tmp_path / str(at)
        shutil.copytree(tmp_path / "template", root)
        with monkeypatch.context() as patch:
            trap = Trap(at=at, then=kill, after=after)
            if copied:
                without_links(patch, root.with_name(f"{root.name}-to"))
            trap.install(patch)
            with suppress(KilledError):
                work(root)
        if not trap.sprung:
            return roots
        roots.append(root)
    raise AssertionError("it never ends")


@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["before", "after"])
def test_a_rename_that_dies_leaves_one_set_and_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    roots = killed_at_each_call(tmp_path, monkeypatch, renamed, after=after)
    assert len(roots) >= 3
    for root in roots:
        (entry,) = Store(root).entries()
        assert len(check_blocks(entry.folder, {1})) == 3
        if entry.name == "demo/tiny@42":
            problems = verify_set(Store(root), entry).problems
            assert all("run the same `featstore mv` again" in problem.what for problem in problems)
            renamed(root)
        check_whole(root, "demo/new@42")


def test_a_moved_set_is_the_same_set_and_its_manifest_comes_along(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    folder = new_set(source)
    older = make_manifest(named(12))
    manifests.save(source / "datasets", older)  # of no interest to this set, but current
    before = contents(folder)
    counted: list[int] = []
    size = set_bytes(entry_of(source))
    landed = move_set(Store(source), entry_of(source), target, advance=counted.append)
    assert contents(landed) == before
    assert sum(counted) == size == sum(map(len, before.values()))
    assert check_whole(target, "demo/tiny@42") == landed
    assert Store(source).entries() == []
    assert list((source / "sets" / "demo").iterdir()) == []
    assert Store(target).manifest("demo").digest == MANIFEST.digest
    assert all(verdict.ok for verdict in verify_store(Store(target), deep=True))
    # Back again: the data set that is there keeps its current manifest.
    move_set(Store(target), entry_of(target), source)
    assert Store(source).manifest("demo").digest == older.digest


def without_links(monkeypatch: pytest.MonkeyPatch, elsewhere: Path) -> None:
    """As if `elsewhere` lay on another file system."""
    real = os.link

    def link(source: Any, target: Any, **kwargs: Any) -> None:
        if (elsewhere in Path(source).parents) != (elsewhere in Path(target).parents):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(source, target, **kwargs)

    monkeypatch.setattr(os, "link", link)


def test_to_another_file_system_files_are_copied_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    before = contents(new_set(source))
    without_links(monkeypatch, target)
    assert contents(move_set(Store(source), entry_of(source), target)) == before
    check_whole(target, "demo/tiny@42")


def test_a_copy_that_does_not_read_back_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featstore.store import moving

    source, target = tmp_path / "a", tmp_path / "b"
    new_set(source)
    without_links(monkeypatch, target)
    with monkeypatch.context() as patch:
        patch.setattr(moving, "_digest", lambda _: "0")
        with pytest.raises(CorruptError, match="does not read back as it was written; check that disk"):
            move_set(Store(source), entry_of(source), target)
    check_whole(source, "demo/tiny@42")
    assert Store(target).entries() == []
    move_set(Store(source), entry_of(source), target)
    check_whole(target, "demo/tiny@42")


@pytest.mark.parametrize(
    ("copied", "after", "step"),
    [
        (False, False, 3),
        (True, False, 5),
        pytest.param(False, True, 1, marks=pytest.mark.slow),
        pytest.param(True, False, 1, marks=pytest.mark.slow),
    ],
)
def test_a_move_that_dies_loses_nothing_and_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool, after: bool, step: int
) -> None:
    roots = killed_at_each_call(tmp_path, monkeypatch, moved, after=after, step=step, copied=copied)
    assert len(roots) > 10
    twice = 0
    for root in roots:
        target = root.with_name(f"{root.name}-to")
        here = Store(root).entries()
        there = Store(target).entries() if target.is_dir() else []
        assert here or there
        twice += bool(here and there)
        for entry in [*here, *there]:
            assert len(check_blocks(entry.folder, {1})) == 3
        if here:
            moved(root)
        check_whole(target, "demo/tiny@42")
        assert Store(root).entries() == []
    assert twice or step > 1


def test_another_set_at_the_target_is_never_touched(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    new_set(source)
    other = prepare(target, make_spec_of(), MANIFEST, [CLS, PATCHES])
    write_missing(other, 2, block_rows=16)
    before = contents(other)
    with pytest.raises(StoreError, match=r"exists and differs from .* in .*; remove one of the two, or merge them"):
        move_set(Store(source), entry_of(source), target)
    assert contents(other) == before
    check_whole(source, "demo/tiny@42")
    with pytest.raises(StoreError, match="the set is there already; name another store"):
        move_set(Store(source), entry_of(source), source)


def test_a_damaged_set_is_not_moved(tmp_path: Path) -> None:
    folder = new_set(tmp_path / "a")
    (folder / "data.zarr" / "cls" / "c" / "1" / "0").unlink()
    with pytest.raises(CorruptError, match="shard file is missing; verify and repair the set before it is moved"):
        move_set(Store(tmp_path / "a"), entry_of(tmp_path / "a"), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_set_written_while_it_is_moved_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a"
    folder = new_set(source)
    commits.take_back(folder, GROUP, [CLS, PATCHES], 1, 16)
    entry = entry_of(source)
    with pytest.raises(StoreError, match="was written while it was moved; nothing is removed here, run the same again"):
        move_set(Store(source), entry, tmp_path / "b", advance=lambda _: write_missing(folder, 1, block_rows=16))
    check_whole(source, "demo/tiny@42")
