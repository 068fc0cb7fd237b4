"""Stores of schema 1: read as they are, upgraded without a byte of a shard copied, whole after any kill."""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_sets import (
    CLS,
    PATCHES,
    KilledError,
    Trap,
    contents,
    kill,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    values_of,
    write_missing,
    writer_of,
)

from featstore import files
from featstore.configs import RegisterConfig
from featstore.datasets import manifest as manifests
from featstore.errors import CorruptError, ManifestError, SchemaError, StoreError
from featstore.objects import ObjectPath
from featstore.register import register
from featstore.store import commits, ledger, shards
from featstore.store.archive import archive_set
from featstore.store.catalog import Store
from featstore.store.importer import import_features
from featstore.store.layout import check_store, read_spec, set_folder
from featstore.store.upgrade import schema_of, upgrade_store, upgraded
from featstore.store.verify import verify_set

OLD_LIMIT = 4 * CLS.row_bytes  # of a shard in these stores of schema 1: 4 rows of cls, 1 of patches
NEW_LIMIT = 8 * CLS.row_bytes
ROWS = 21
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_LIMIT_BYTES", NEW_LIMIT)
    monkeypatch.setattr(ledger, "_SCHEMA_1_SHARD_BYTES", OLD_LIMIT)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here cuts the power, and the page cache outlives a kill


def rewrite(path: Path, value: dict[str, Any]) -> None:
    path.write_bytes(files.sealed(value))


def as_schema_1(folder: Path) -> Path:
    """Turn a set into what schema 1 wrote; returns its folder, whose name follows from the fingerprint."""
    spec = read_spec(folder)
    spec = {**spec, "schema": 1, "identity": {**spec["identity"], "schema": 1}}
    spec["fingerprint"] = files.digest(spec["identity"])
    rewrite(folder / "spec.json", spec)
    for path in (folder / "ledger").iterdir():
        entry = files.unseal(path.read_bytes(), path)
        for array in entry.get("arrays", []):
            del array["shard_rows"], array["chunk_rows"]
        rewrite(path, entry)
    for path in (folder / "data.zarr").rglob("zarr.json"):
        value = json.loads(path.read_bytes())
        value.pop("dimension_names", None)
        if "featstore" in value["attributes"]:
            value["attributes"]["featstore"] = {"schema": 1, "fingerprint": spec["fingerprint"]}
        path.write_text(json.dumps(value, indent=2))
    for path in (folder / "rows").glob("*.json"):
        path.unlink()
    return folder.rename(set_folder(folder.parents[2], spec))


def make_old(root: Path, *, models: tuple[str, ...] = ("tiny",), rows: int = ROWS, block_rows: int = 16) -> Path:
    """A store of schema 1 with a set of `rows` rows for each model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_LIMIT_BYTES", OLD_LIMIT)
        for seed, model in enumerate(models):
            spec = make_spec_of(block_rows=block_rows, model=model, weights=model)
            folder = prepare(root, spec, make_manifest(named(rows)), [CLS, PATCHES])
            write_missing(folder, seed, block_rows=block_rows)
            files.write_atomic(folder / "runs" / "a.json", files.sealed({"time": "2025-01-01T00:00:00Z"}))
            as_schema_1(folder)
    for path in (root / "datasets").rglob("source.toml"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if not line.startswith(("sha256", "seal"))))
    (root / "store.json").write_bytes(files.sealed({"schema": 1, "format": "featstore"}))
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_old(tmp_path / "store")


def folders(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob("sets/*/*/spec.json"))


def shard_inodes(root: Path) -> dict[str, int]:
    """Inode of each shard and marker, by data set and path inside the set."""
    found = {}
    for folder in folders(root):
        model = folder.name.partition("@")[0]
        for path in folder.rglob("*"):
            if path.is_file() and ("/c/" in path.as_posix() or "commits" in path.parts):
                found[f"{model}/{path.relative_to(folder).as_posix()}"] = path.stat().st_ino
    return found


def check_values(root: Path, model: str = "tiny", seed: int = 0, rows: int = ROWS) -> None:
    fs = Store(root)["demo", model]
    for array in (CLS, PATCHES):
        np.testing.assert_array_equal(fs.array(array.name).load(verify=True), values_of(array, 0, rows, seed))
        np.testing.assert_array_equal(fs.array(array.name)[[4, 0, -1]], values_of(array, 0, rows, seed)[[4, 0, -1]])


def test_a_store_of_schema_1_is_read(root: Path) -> None:
    store = Store(root)
    (row,) = store.summaries()
    assert (row["set"], row["ok"], row["pending"], row["samples"]) == ("demo/tiny@42", ROWS, 0, ROWS)
    assert row["arrays"] == {"cls": [8], "patches": [3, 8]}
    array = store["demo", "tiny"].ledger.arrays["cls"]
    assert (array.shard_rows, array.chunk_rows) == (4, 4)
    check_values(root)
    assert verify_set(store, store.entry("demo/tiny"), deep=True).ok


def test_a_store_of_schema_1_is_not_written(root: Path, tmp_path: Path) -> None:
    before = contents(root)
    refusal = "has schema 1 and is open for reading only; `featstore upgrade` brings"
    with pytest.raises(SchemaError, match=refusal):
        check_store(root, create=True)
    with pytest.raises(SchemaError, match=refusal):
        register(root, "phantom", None, RegisterConfig())
    np.savez(tmp_path / "f.npz", features=np.ones((2, 3), np.float32), ids=np.array(["a", "b"]))
    with pytest.raises(SchemaError, match=refusal):
        import_features(root, tmp_path / "f.npz", dataset="new", model="m")
    with pytest.raises(SchemaError, match=refusal):
        archive_set(folders(root)[0])
    assert contents(root) == before


def test_extract_into_schema_1_is_refused(tmp_path: Path) -> None:
    from pictures import register_pictures

    from featstore.configs import RunConfig, SetConfig
    from featstore.extraction.plan import make_plan
    from featstore.extraction.prepare import prepare as prepare_set

    register_pictures(tmp_path / "store", tmp_path / "data", 2)
    (tmp_path / "store" / "store.json").write_bytes(files.sealed({"schema": 1, "format": "featstore"}))
    plan = make_plan(Store(tmp_path / "store"), "pics", SetConfig(model="tiny", res="42"), RunConfig(device="cpu"))
    before = contents(tmp_path / "store")
    with pytest.raises(SchemaError, match="`featstore upgrade` brings the store to schema 2"):
        prepare_set(plan)
    assert contents(tmp_path / "store") == before


def test_upgrade(tmp_path: Path) -> None:
    root = make_old(tmp_path, models=("tiny", "large"))
    inodes = shard_inodes(root)
    assert len(inodes) > 40
    old = {folder.name.partition("@")[0]: read_spec(folder) for folder in folders(root)}
    digests = {path.parent.name: Store(root).manifest("demo").digest for path in root.rglob("source.toml")}
    before = contents(root)
    plan = upgrade_store(root, dry_run=True)
    assert contents(root) == before
    seen: list[int] = []
    assert upgrade_store(root, advance=seen.append) == plan
    assert (plan["from"], plan["to"], plan["manifests"], sum(seen)) == (1, 2, 1, 2)
    assert [item["set"] for item in plan["sets"]] == ["demo/large@42", "demo/tiny@42"]
    assert schema_of(root) == 2
    assert shard_inodes(root) == inodes
    assert len(folders(root)) == 2
    for folder in folders(root):
        spec = read_spec(folder)
        was = old[folder.name.partition("@")[0]]
        assert spec["schema"] == spec["identity"]["schema"] == 2
        assert spec["fingerprint"] == files.digest(spec["identity"]) != was["fingerprint"]
        assert folder == set_folder(root, spec)
        assert upgraded(root)[was["fingerprint"]] == spec["fingerprint"]
        for path in (folder / "ledger").iterdir():
            for array in files.unseal(path.read_bytes(), path).get("arrays", []):
                assert (array["shard_rows"], array["chunk_rows"]) == {"cls": (4, 4), "patches": (1, 1)}[array["name"]]
        metadata = json.loads((folder / "data.zarr" / "patches" / "zarr.json").read_bytes())
        assert metadata["dimension_names"] == ["row", "patch", "dim"]
        assert [path.name for path in (folder / "runs").iterdir()] == ["a.json"]
        mapping = next((folder / "rows").glob("*.parquet"))
        assert files.unseal(ledger.seal_path(mapping).read_bytes(), mapping)["sha256"] == files.digest(
            mapping.read_bytes()
        )
    check_values(root, "large", 1)
    check_values(root, "tiny", 0)
    store = Store(root)
    assert all(verify_set(store, entry, deep=True).ok for entry in store.entries())
    for path in root.rglob("source.toml"):
        assert 'seal = "' in path.read_text()
        assert store.manifest("demo").digest == digests[path.parent.name]
    assert [path.name for path in root.rglob(".*")] == []
    after = contents(root)
    assert upgrade_store(root) == {"store": str(root), "from": 2, "to": 2, "sets": [], "manifests": 0}
    assert contents(root) == after


def test_an_upgraded_set_is_the_one_that_schema_2_makes(root: Path) -> None:
    """The next run with the same options finds the upgraded set, and adds to it by its own layout."""
    upgrade_store(root)
    spec = make_spec_of(weights="tiny")
    folder = prepare(root, spec, make_manifest(named(ROWS + 5)), [CLS, PATCHES])
    assert folders(root) == [folder]
    write_missing(folder, 9, block_rows=16)
    fs = Store(root)["demo", "tiny"]
    assert fs.ok.all()
    np.testing.assert_array_equal(fs.cls.load()[:ROWS], values_of(CLS, 0, ROWS, 0))
    np.testing.assert_array_equal(fs.cls.load()[ROWS:], values_of(CLS, 32, 37, 9))
    check_source = next((root / "datasets" / "demo").glob("*/source.toml")).read_bytes()
    assert b'seal = "' in check_source


def test_bits_that_flip_after_the_upgrade_are_found(root: Path) -> None:
    upgrade_store(root)
    path = next((root / "datasets").rglob("source.toml"))
    path.write_bytes(path.read_bytes().replace(b"/nowhere", b"/nowhera"))
    with pytest.raises(ManifestError, match="the manifest is damaged"):
        Store(root).manifest("demo")


def test_refusals(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    with pytest.raises(StoreError, match="no store here, so there is nothing to upgrade"):
        upgrade_store(tmp_path / "absent")
    remote: Any = ObjectPath.parse("s3://bucket/store")
    with pytest.raises(StoreError, match="stores of schema 1 are folders"):
        upgrade_store(remote)
    with open(root / "upgrade.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="another process is upgrading this store; let it finish"):
            upgrade_store(root)
    attempt = folders(root)[0] / "attempts" / files.own_name()
    attempt.mkdir(parents=True)
    (attempt / "cls.0").write_bytes(b"rows")
    with pytest.raises(StoreError, match="a run is still writing into this set; let it end"):
        upgrade_store(root)
    assert schema_of(root) == 1
    check_values(root)


def test_a_decided_block_is_finished_first(root: Path) -> None:
    """A writer of schema 1 that died between its decision and its marker loses nothing."""
    folder = folders(root)[0]
    book = ledger.read_ledger(folder)
    commits.take_back(folder, "cls+patches", book.groups["cls+patches"], 1, 16)
    shutil.rmtree(folder / "data.zarr" / "cls" / "c" / "5")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commits, "finish_block", lambda *_: True)
        with writer_of(folder, "cls+patches", 1) as writer:
            rows = {array.name: values_of(array, 16, ROWS, 0) for array in (CLS, PATCHES)}
            writer.append(rows, [commits.RowState("0" * 32)] * (ROWS - 16))
            writer.commit()
    assert commits.committed_blocks(folder, "cls+patches") == {0}
    upgrade_store(root)
    check_values(root)


def test_damage_is_never_sealed(root: Path) -> None:
    parquet = next((root / "datasets").rglob("manifest.parquet"))
    held = parquet.read_bytes()
    other = make_manifest(["x", "y"])
    scratch = root.parent / "scratch"
    manifests.save(scratch, other)
    parquet.write_bytes((scratch / "demo" / other.short / "manifest.parquet").read_bytes())
    with pytest.raises(ManifestError, match="the samples do not match the digest of this manifest"):
        upgrade_store(root)
    parquet.write_bytes(held)
    mapping = next(folders(root)[0].glob("rows/*.parquet"))
    kept = mapping.read_bytes()
    mapping.write_bytes(kept[:50])
    with pytest.raises(CorruptError, match="damaged"):
        upgrade_store(root)
    assert schema_of(root) == 1
    mapping.write_bytes(kept)
    upgrade_store(root)
    check_values(root)


def test_old_damage_stays_and_new_damage_stops(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = folders(root)[0] / "data.zarr" / "cls" / "c" / "0" / "0"
    shard.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("featstore.store.upgrade._link", lambda *_: None)
        with pytest.raises(CorruptError, match="not upgraded, because the new set would not be whole"):
            upgrade_store(root)
    assert [folder.name for folder in folders(root)] == [read_name(root)]
    upgrade_store(root)  # one shard was missing before and is missing now; the rest is upgraded
    store = Store(root)
    problems = verify_set(store, store.entry("demo/tiny")).problems
    assert ["c/0/0" in problem.place for problem in problems] == [True]


def read_name(root: Path) -> str:
    """The folder's name by its own spec."""
    return set_folder(root, read_spec(folders(root)[0])).name


def test_another_set_in_the_place(root: Path) -> None:
    spec = make_spec_of(weights="tiny")
    files.create_exclusive(set_folder(root, spec) / "spec.json", files.sealed({**spec, "model": "other"}))
    with pytest.raises(CorruptError, match="and is another set; move one of them away"):
        upgrade_store(root)


def test_without_hard_links_shards_are_copied(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def no_links(source: Any, target: Any, **options: Any) -> None:
        if "/c/" in str(source):
            raise OSError(errno.EPERM, "no links here")
        real(source, target, **options)

    monkeypatch.setattr(os, "link", no_links)
    usage = shutil._ntuple_diskusage(10**9, 10**9, 3)  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(StoreError, match="this file system has no hard links, and a copy has no room"):
            upgrade_store(root)
    check_values(root)
    upgrade_store(root)
    check_values(root)
    with monkeypatch.context() as patch:
        again = make_old(root.parent / "again")
        patch.setattr(os, "link", failing(real))
        with pytest.raises(StoreError, match="cannot write"):
            upgrade_store(again)


def failing(real: Any) -> Any:
    def link(source: Any, target: Any, **options: Any) -> None:
        if "/c/" in str(source):
            raise OSError(errno.EIO, "broken disk")
        real(source, target, **options)

    return link


@pytest.mark.parametrize("after", [False, pytest.param(True, marks=SLOW)])
def test_a_kill_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    """The set is there at every moment, as the old one, the new one, or for two renames as both; a rerun finishes."""
    start = make_old(tmp_path / "start", rows=5, block_rows=8)
    whole = tmp_path / "whole"
    shutil.copytree(start, whole)
    with monkeypatch.context() as patch:
        trap = Trap(at=-1, then=kill)
        trap.install(patch)
        upgrade_store(whole)
    end = contents(whole)
    both = 0
    for at in range(1, trap.count + 1, 1 if after else 9):
        root = tmp_path / "trial"
        shutil.copytree(start, root)
        with monkeypatch.context() as patch:
            Trap(at=at, then=kill, after=after).install(patch)
            with contextlib.suppress(KilledError):
                upgrade_store(root)
        names = [folder.name for folder in folders(root) if not folder.name.startswith(".")]
        assert len(names) in (1, 2)
        both += len(names) == 2
        for row in Store(root).summaries():
            assert (row["ok"], row.get("error")) == (5, None)
        if len(names) == 1:
            check_values(root, rows=5)
        upgrade_store(root)
        check_values(root, rows=5)
        for folder in [root, *folders(root)]:
            commits.sweep_attempts(folder, older_than=0.0)
        for path in (root / "datasets").rglob("*.partial"):
            path.unlink()
        assert contents(root) == end
        shutil.rmtree(root)
    assert trap.count > 40
    assert both <= 2


def run(capsys: pytest.CaptureFixture[str], root: Path, *words: str, code: int = 0) -> str:
    """One command in this process: what it prints."""
    import sys

    from cli.main import featstore

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["featstore", *words, "--store", str(root)])
        with pytest.raises(SystemExit) as stop:
            featstore()
    printed = capsys.readouterr()
    assert (stop.value.code or 0) == code, printed
    return printed.out + printed.err


def test_the_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(root)
    old, new = (spec["fingerprint"][:8] for spec in (read_spec(folders(root)[0]), make_spec_of(weights="tiny")))
    said = run(capsys, root, "upgrade", "--dry-run")
    assert f"demo/tiny@42: {old} would become {new}" in said
    assert "schema 1 to 2: 1 sets, 1 manifests; run it without --dry-run to do it" in said
    assert contents(root) == before
    assert json.loads(run(capsys, root, "upgrade", "--json"))["sets"][0]["old"][:8] == old
    assert "schema 2 already; nothing to upgrade" in run(capsys, root, "upgrade")
    check_values(root)
