"""Stores that somebody else sealed: names that would leave the store are refused before anything is made of them."""

from pathlib import Path
from typing import Any

import pytest
from tiny_sets import CLS, make_manifest, make_spec_of, named, prepare, write_missing

from featstore import files
from featstore.errors import CorruptError
from featstore.store import ledger, reductions
from featstore.store.catalog import Store
from featstore.store.layout import read_spec
from featstore.store.merge import merge


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = prepare(tmp_path / "source", make_spec_of(), make_manifest(named(20)), [CLS])
    write_missing(made, 1, block_rows=16)
    return made


def reseal(path: Path, **changes: Any) -> None:
    path.write_bytes(files.sealed({**files.unseal(path.read_bytes(), path), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "../../../out/x"},
        {"dataset": ".."},
        {"dataset": "a/b"},
        {"model": "a\\b"},
        {"fingerprint": "../../out"},
        {"resolution": "/etc"},
    ],
)
def test_names_of_sets(folder: Path, tmp_path: Path, changes: dict[str, str]) -> None:
    reseal(folder / "spec.json", **changes)
    with pytest.raises(CorruptError, match="is no name of a set; do not use a store from this source"):
        read_spec(folder)
    with pytest.raises(CorruptError, match="is no name of a set"):
        merge(Store(tmp_path / "source"), tmp_path / "deep" / "target", [])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["../../other/data.zarr/cls", "/cls", "layers/../cls", "layers/1/../../cls", "cls/", ""]
)
def test_names_of_arrays(folder: Path, tmp_path: Path, name: str) -> None:
    array = {**CLS.as_dict(), "name": name, "shard_rows": 16, "chunk_rows": 16}
    entry = {"kind": "arrays", "group": ledger.group_name([name]), "arrays": [array]}
    files.create_exclusive(ledger.entry_path(folder, 2), files.sealed(entry))
    with pytest.raises(CorruptError, match="is no name of this format; do not use a store from this source"):
        ledger.read_ledger(folder)
    with pytest.raises(CorruptError, match="is no name of this format"):
        merge(Store(tmp_path / "source"), tmp_path / "target", [])


def test_names_of_groups_and_manifests(folder: Path) -> None:
    array = {**CLS.as_dict(), "name": "patches", "shard_rows": 16, "chunk_rows": 16}
    path = ledger.entry_path(folder, 2)
    for entry in (
        {"kind": "arrays", "group": "../../x", "arrays": [array]},
        {"kind": "rows", "start": 32, "stop": 33, "manifest": "../../abc"},
    ):
        path.write_bytes(files.sealed(entry))
        with pytest.raises(CorruptError, match="is no name of this format"):
            ledger.read_ledger(folder)


def test_names_of_parameters(folder: Path) -> None:
    with pytest.raises(CorruptError, match="names no parameters; do not use a store from this source"):
        reductions.parameters_path(folder, "../../x")


@pytest.mark.parametrize(("ours", "theirs"), [(16, 32), (32, 16)])
def test_a_merge_of_other_blocks_matches_rows(tmp_path: Path, ours: int, theirs: int) -> None:
    """Numbers of blocks mean nothing where blocks have another size, also if the target has no ledger yet."""
    few, many = make_manifest(named(10)), make_manifest(named(40))
    source = prepare(tmp_path / "source", make_spec_of(block_rows=theirs), few, [CLS])
    write_missing(source, 1, block_rows=theirs)
    source = prepare(tmp_path / "source", make_spec_of(block_rows=theirs), many, [CLS])
    write_missing(source, 1, block_rows=theirs)
    target = prepare(tmp_path / "target", make_spec_of(block_rows=ours), many, [CLS])
    for path in (target / "ledger").glob("*"):
        path.unlink()
    for path in (target / "rows").glob("*"):
        path.unlink()
    merge(Store(tmp_path / "source"), tmp_path / "target", [])
    book = ledger.read_ledger(target)
    blocks = [block for block, _, _ in book.blocks(ours)]
    assert len(set(blocks)) == len(blocks)
    held = Store(tmp_path / "target").set("demo/tiny", manifest=many.short)
    wanted = Store(tmp_path / "source").set("demo/tiny", manifest=many.short)
    there = ~held.pending()
    assert there.any()
    assert (held.cls[there] == wanted.cls[there]).all()
