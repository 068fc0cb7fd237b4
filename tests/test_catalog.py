"""Names find sets, ambiguous ones say what differs, damage to one set leaves the others usable, removal is whole."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_sets import CLS, make_manifest, make_spec_of, named, prepare, values_of, write_missing

from featstore.errors import CorruptError, IncompleteError, StoreError, UnknownNameError
from featstore.store.catalog import Store, open_store

MANIFEST = make_manifest(named(5))


def add(root: Path, **identity: Any) -> Path:
    folder = prepare(root, make_spec_of(**identity), MANIFEST, [CLS])
    write_missing(folder, 1, block_rows=16)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    add(tmp_path)
    add(tmp_path, model="other")
    add(tmp_path, model="twin", weights="a", compute_dtype="bfloat16")
    add(tmp_path, model="twin", weights="b")
    return Store(tmp_path)


def test_sets_are_listed_with_the_fingerprint_where_names_repeat(store: Store) -> None:
    names = store.sets()
    assert names[:2] == ["demo/other@42", "demo/tiny@42"]
    assert [name.rpartition("-")[0] for name in names[2:]] == ["demo/twin@42"] * 2
    assert [store.entry(name).full_name for name in names[2:]] == names[2:]
    assert store.datasets() == ["demo"]
    assert store.entries("absent") == store.entries("*") == []
    assert repr(store) == f"<Store {store.path}: 1 data sets, 4 sets>"


@pytest.mark.parametrize("selector", ["demo/tiny", "demo/tiny@42", "demo/tiny@42-{}"])
def test_unique_names_open(store: Store, selector: str) -> None:
    fingerprint = make_spec_of()["fingerprint"]
    for length in (1, 4, 8):
        fs = store[selector.format(fingerprint[:length])]
        assert (fs.name, fs.fingerprint) == ("demo/tiny@42", fingerprint)
    np.testing.assert_array_equal(store["demo", "tiny"].load("cls"), values_of(CLS, 0, 5, 1))


def test_ambiguous_names_list_what_differs(store: Store) -> None:
    message = (
        r"'demo/twin' names 2 sets; add more of the name:\n  demo/twin@42-\w{8}\n"
        r"  demo/twin@42-\w{8} differs in compute_dtype, weights"
    )
    with pytest.raises(UnknownNameError, match=message):
        store.entry("demo/twin")


def test_unknown_names_list_what_there_is(store: Store) -> None:
    with pytest.raises(UnknownNameError, match=r"no set 'demo/tin' in .*; sets of 'demo': demo/other@42, demo/tiny@42"):
        store.entry("demo/tin")
    with pytest.raises(UnknownNameError, match=r"no set 'x/tiny' .*: none; run `featstore extract` first"):
        store.entry("x/tiny")
    with pytest.raises(UnknownNameError, match=r"a set is named DATASET/MODEL@RES, got 'tiny'; `featstore ls` lists"):
        store.entry("tiny")


def test_one_damaged_spec_leaves_the_other_sets_usable(store: Store) -> None:
    damaged = store.entry("demo/other").folder
    (damaged / "spec.json").write_bytes(b"{}")
    assert store["demo/tiny"].load("cls").shape == (5, 8)
    rows = {row["set"]: row for row in store.summaries()}
    assert "not a sealed JSON file" in rows["demo/other@42"]["error"]
    assert rows["demo/tiny@42"]["ok"] == 5
    for find in (lambda: store.entry("demo/other"), store.entries, lambda: store.find("demo")):
        with pytest.raises(CorruptError, match=r"spec.json: not a sealed JSON file"):
            find()


def test_a_set_that_cannot_be_summed_up_says_why(store: Store) -> None:
    for path in (store.entry("demo/tiny").folder / "rows").iterdir():
        path.unlink()
    rows = {row["set"]: row for row in store.summaries()}
    assert "not extracted for manifest" in rows["demo/tiny@42"]["error"]
    with pytest.raises(IncompleteError, match="not extracted for manifest"):
        store["demo/tiny"].load("cls")


def test_a_removed_set_is_gone_at_once_and_open_arrays_stay_readable(store: Store) -> None:
    fs = store["demo/tiny"]
    array = fs.cls
    first = array.load()
    folder = store.remove("demo/tiny")
    assert not folder.exists()
    assert not list(folder.parent.glob(".*"))
    np.testing.assert_array_equal(array.load(), first)
    assert "demo/tiny@42" not in store.sets()
    with pytest.raises(UnknownNameError, match="no set 'demo/tiny'"):
        Store(store.path)["demo/tiny"]


def test_what_a_killed_removal_left_is_ignored_and_swept(store: Store) -> None:
    tiny, other = (store.entry(f"demo/{name}").folder for name in ("tiny", "other"))
    shutil.copytree(tiny, tiny.with_name(f".removing-{tiny.name}"))
    assert len(store.entries()) == 4
    store.remove("demo/tiny")
    assert not list(tiny.parent.glob(".*"))
    assert other.is_dir()


def test_a_removal_that_is_not_allowed_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(StoreError, match=r"cannot remove \(Permission denied\); check its owner and access"):
            store.remove("demo/tiny")
    assert store["demo/tiny"].load("cls").shape == (5, 8)
    for name in store.sets():
        store.remove(name)
    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(StoreError, match=r"datasets/demo: cannot remove \(Permission denied\)"):
        store.remove_dataset("demo")


def test_a_data_set_is_removed_after_its_sets(store: Store) -> None:
    with pytest.raises(
        StoreError, match=r"data set 'demo' still has 4 sets \(demo/other@42, demo/tiny@42, .*remove them"
    ):
        store.remove_dataset("demo")
    for name in store.sets():
        store.remove(name)
    assert not store.remove_dataset("demo").exists()
    assert store.datasets() == []
    with pytest.raises(UnknownNameError, match="unknown data set 'demo'"):
        store.remove_dataset("demo")


def test_older_manifests_open_by_digest(store: Store) -> None:
    grown = make_manifest(named(9))
    prepare(store.path, make_spec_of(), grown, [CLS])
    assert len(store["demo/tiny"]) == 9
    assert len(store.set("demo/tiny", manifest=MANIFEST.short)) == 5
    assert store["demo/tiny"].pending().sum() == 4


def test_html_lists_the_sets_escaped(tmp_path: Path) -> None:
    add(tmp_path, model="<i>")
    text = open_store(str(tmp_path))._repr_html_()
    assert "<i>" not in text
    assert "demo/&lt;i&gt;@42" in text


def test_an_empty_or_absent_store_has_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "absent")
    assert (store.sets(), store.datasets(), store.summaries()) == ([], [], [])
    assert not store.path.exists()
