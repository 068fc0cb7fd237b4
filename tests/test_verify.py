"""Damage of every kind is found, and repair takes back exactly the blocks that need it."""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_sets import CLS, PATCHES, check_blocks, contents, make_manifest, make_spec_of, named, prepare, write_missing

from featstore.datasets import manifest as manifests
from featstore.datasets.manifest import Manifest
from featstore.errors import FeatstoreError
from featstore.store import commits, ledger
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from featstore.store.verify import Repair, Verdict, repair_set, verify_set, verify_store

MANIFEST = make_manifest(named(40))
GROUP = "cls+patches"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = prepare(tmp_path, make_spec_of(), MANIFEST, [CLS, PATCHES])
    write_missing(folder, 1, block_rows=16)
    return tmp_path


def check(root: Path, *, deep: bool = True) -> Verdict:
    store = Store(root)
    return verify_set(store, store.entry("demo/tiny"), deep=deep)


def set_folder(root: Path) -> Path:
    return next((root / "sets" / "demo").iterdir())


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def readable_content(root: Path) -> tuple[object, ...]:
    """All that a reader can see of the set."""
    store = Store(root)
    fs = store["demo", "tiny"]
    table = fs.manifest.table.drop_columns(["mtime_ns"]).to_pydict()
    mapping = ledger.read_mapping(ledger.rows_path(fs.folder, fs.manifest.short))
    markers = [commits.read_commit(fs.folder, GROUP, block) for block in range(3)]
    arrays = [fs.load(name, verify=True).tobytes() for name in fs.arrays]
    return fs.spec, fs.ledger, table, mapping[:2], mapping[2].tobytes(), markers, arrays


def test_a_whole_set_passes_and_is_counted(root: Path) -> None:
    seen: list[int] = []
    store = Store(root)
    verdict = verify_set(store, store.entry("demo/tiny"), deep=True, advance=seen.append)
    assert verdict.ok
    shards = sum(len(data) for name, data in contents(set_folder(root)).items() if "/c/" in name)
    assert (verdict.num_blocks, verdict.num_bytes, sum(seen)) == (3, shards, shards)
    assert check(root, deep=False).ok


def test_every_flipped_bit_is_found_or_harmless(root: Path) -> None:
    rng = np.random.default_rng(7)
    kinds = ["data.zarr/cls/c", "data.zarr/patches/c", "commits", "ledger", "rows", "spec.json", "zarr.json"]
    files = {kind: sorted(p for p in set_folder(root).rglob("*") if p.is_file() and kind in str(p)) for kind in kinds}
    files["manifest"] = list((root / "datasets").rglob("manifest.parquet"))
    before = readable_content(root)
    found: dict[str, int] = dict.fromkeys(files, 0)
    for kind, paths in files.items():
        for _ in range(12):
            path = paths[rng.integers(len(paths))]
            held = path.read_bytes()
            flip(path, int(rng.integers(len(held) * 8)))
            try:
                clean = check(root).ok
            except FeatstoreError:
                clean = False
            if clean:
                assert readable_content(root) == before, path
            found[kind] += not clean
            path.write_bytes(held)
    assert check(root).ok
    assert all(found[kind] == 12 for kind in kinds if kind.startswith("data.zarr") or kind == "zarr.json"), found
    assert all(found.values()), found


@pytest.mark.slow
def test_every_bit_of_one_shard_and_of_the_mapping(root: Path) -> None:
    folder = set_folder(root)
    before = readable_content(root)
    for path in (folder / "data.zarr" / "cls" / "c" / "2" / "0", next((folder / "rows").iterdir())):
        held = path.read_bytes()
        for bit in range(len(held) * 8):
            flip(path, bit)
            if check(root).ok:
                assert path.suffix == ".parquet", bit
                assert readable_content(root) == before, bit
            path.write_bytes(held)


def shard(root: Path, name: str, block: int) -> Path:
    return set_folder(root) / "data.zarr" / name / "c" / str(block) / "/".join(["0"] * (1 if name == "cls" else 2))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_payload(path: Path) -> None:
    flip(path, 43)


@pytest.mark.parametrize(
    ("damage", "what", "deep"),
    [
        (Path.unlink, "the shard file is missing", False),
        (truncate, "truncated or of another layout", False),
        (lambda path: flip(path, 8 * path.stat().st_size - 70), "index", False),
        (flip_payload, "checksum is 0x", True),
    ],
    ids=["missing", "truncated", "index", "payload"],
)
def test_repair_makes_exactly_the_damaged_blocks_pending(
    root: Path, damage: Callable[[Path], None], what: str, deep: bool
) -> None:
    damage(shard(root, "patches", 1))
    verdict = check(root, deep=deep)
    assert [(item.group, item.block) for item in verdict.problems] == [(GROUP, 1)]
    assert what in verdict.problems[0].what
    assert verdict.problems[0].place == "patches/c/1/0/0"
    assert repair_set(verdict).num_blocks == 1
    assert FeatureSet(set_folder(root), MANIFEST).pending().tolist() == [16 <= row < 32 for row in range(40)]
    assert check(root).ok
    write_missing(set_folder(root), 1, block_rows=16)
    assert check_blocks(set_folder(root), {1}).keys() == {(GROUP, 0), (GROUP, 1), (GROUP, 2)}
    assert check(root).ok


def test_a_payload_flip_is_left_to_deep(root: Path) -> None:
    flip_payload(shard(root, "cls", 0))
    assert check(root, deep=False).ok
    assert not check(root).ok


def test_a_shard_of_another_commit_is_found(root: Path, tmp_path: Path) -> None:
    other = prepare(tmp_path / "other", make_spec_of(), MANIFEST, [CLS, PATCHES])
    write_missing(other, 2, block_rows=16)
    shard(root, "cls", 0).write_bytes((other / "data.zarr" / "cls" / "c" / "0" / "0").read_bytes())
    for deep in (False, True):
        (problem,) = check(root, deep=deep).problems
        assert problem.what == "size or checksum differs from what was committed"


def test_a_bad_sector_is_a_finding_not_a_crash(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.open
    bad = shard(root, "cls", 2)

    def opened(path: object, *args: str, **kwargs: str) -> object:
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(builtins, "open", opened)
    (problem,) = check(root, deep=False).problems
    assert "Input/output error" in problem.what
    assert problem.block == 2


def test_a_damaged_marker_is_found_and_repaired(root: Path) -> None:
    path = commits.marker_path(set_folder(root), GROUP, 2)
    path.write_bytes(b"{}")
    verdict = check(root, deep=False)
    assert [(item.place, item.block) for item in verdict.problems] == [(f"commits/{GROUP}/00000002.json", 2)]
    repair_set(verdict)
    assert commits.committed_blocks(set_folder(root), GROUP) == {0, 1}


def test_a_marker_of_other_rows_is_found(root: Path) -> None:
    folder = set_folder(root)
    raw = commits.marker_path(folder, GROUP, 0).read_bytes()
    commits.marker_path(folder, GROUP, 1).write_bytes(raw)
    (problem,) = check(root, deep=False).problems
    assert problem.what == "its rows are not those of the ledger"


def test_metadata_is_checked_and_written_again(root: Path) -> None:
    path = set_folder(root) / "data.zarr" / "cls" / "zarr.json"
    held = path.read_bytes()
    for data in (held.replace(b"40", b"30"), None):
        path.unlink()
        if data:
            path.write_bytes(data)
        verdict = check(root)
        assert [(item.place, item.group) for item in verdict.problems] == [("data.zarr/cls/zarr.json", None)]
        assert "--repair or the next extract writes it again" in verdict.problems[0].what
        assert repair_set(verdict) == Repair(0, 1, [])
        assert path.read_bytes() == held


@pytest.mark.parametrize(
    ("value", "failed", "what"),
    [
        (np.nan, False, "row 21 is NaN without having failed, or the reverse"),
        (1.0, True, "row 21 is NaN without having failed, or the reverse"),
        (0.0, False, "row 21 is all zero"),
    ],
)
def test_values_that_cannot_be_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, failed: bool, what: str
) -> None:
    """Written by a writer that does not check."""
    folder = prepare(tmp_path, make_spec_of(), MANIFEST, [CLS])
    monkeypatch.setattr(commits, "check_finite", lambda *_: None)
    rows = np.ones((16, 8), np.float16)
    rows[5] = value
    states = [commits.RowState("0" * 32, "bad" if failed and row == 5 else None) for row in range(16)]
    with commits.BlockWriter(folder, "cls", [CLS], 1, 16, 32, 16) as writer:
        writer.append({"cls": rows}, states)
        writer.commit()
    (problem,) = check(tmp_path).problems
    assert (problem.place, problem.what, problem.block) == ("data.zarr/cls", what, 1)
    assert check(tmp_path, deep=False).ok


def test_a_mapping_that_is_not_the_manifests_is_found(root: Path) -> None:
    folder = set_folder(root)
    other = make_manifest([*named(39), "else"])
    path = ledger.rows_path(folder, MANIFEST.short)
    held, seal = path.read_bytes(), ledger.seal_path(path).read_bytes()
    path.unlink()
    ledger.seal_path(path).unlink()
    ledger._write_rows(folder, with_digest(other), np.arange(40))
    (problem,) = check(root, deep=False).problems
    assert problem.what == "does not map the 40 samples of its manifest, each to a row"
    for rows in (np.arange(1, 41), np.zeros(40, np.int64)):
        path.unlink()
        ledger.seal_path(path).unlink()
        ledger._write_rows(folder, MANIFEST, rows)
        assert not check(root, deep=False).ok
    path.write_bytes(held)
    assert not check(root, deep=False).ok
    ledger.seal_path(path).write_bytes(seal)
    assert check(root).ok


def with_digest(other: Manifest) -> Manifest:

    return replace(other, digest=MANIFEST.digest)


def test_a_manifest_that_changed_is_found(root: Path) -> None:
    """By something that seals what it writes; other changes are found whenever it is read."""
    import pyarrow as pa

    table = MANIFEST.table
    position = table.column_names.index("split")
    table = table.set_column(position, "split", pa.array(["test"] * 40))
    manifests.save(root / "datasets", replace(MANIFEST, table=table))
    assert check(root, deep=False).ok
    (problem,) = check(root).problems
    assert "the manifest's digest does not match its rows; register it again" in problem.what


def test_ledger_and_spec_damage_ends_in_one_finding(root: Path) -> None:
    store = Store(root)
    entry = store.entry("demo/tiny")
    ledger.entry_path(entry.folder, 0).write_bytes(b"")
    assert [item.place for item in verify_set(store, entry).problems] == ["spec or ledger"]
    (entry.folder / "spec.json").unlink()
    assert [item.place for item in verify_set(store, entry).problems] == ["spec or ledger"]


def test_one_damaged_spec_is_one_finding_and_the_others_are_checked(root: Path) -> None:
    other = prepare(root, make_spec_of(model="other"), MANIFEST, [CLS])
    write_missing(other, 1, block_rows=16)
    damaged = set_folder_of(root, "tiny") / "spec.json"
    damaged.write_bytes(b"{")
    (root / "datasets" / "demo" / "current").write_bytes(b"0123abcd\n")
    (other / "data.zarr" / "cls" / "c" / "0" / "0").unlink()
    verdicts = {verdict.folder: verdict for verdict in verify_store(Store(root))}
    found = {folder.name.split("@")[0]: [item.place for item in found.problems] for folder, found in verdicts.items()}
    assert found == {"datasets": ["datasets/demo/current"], "tiny": ["spec or ledger"], "other": ["cls/c/0/0"]}
    assert (
        "does not name a manifest of this data set; register it again" in verdicts[root / "datasets"].problems[0].what
    )
    damaged.unlink()
    (problem,) = next(item for item in verify_store(Store(root)) if item.folder == damaged.parent).problems
    assert problem.what == "spec.json is missing; restore it from a copy, or remove the folder"
    assert repair_set(verdicts[other]) == Repair(1, 0, [])
    assert repair_set(verdicts[root / "datasets"]).left == verdicts[root / "datasets"].problems


def set_folder_of(root: Path, model: str) -> Path:
    return next((root / "sets" / "demo").glob(f"{model}@*"))


def test_lost_seals_mappings_and_ledger_entries_are_found(root: Path) -> None:
    folder = set_folder(root)
    path = ledger.rows_path(folder, MANIFEST.short)
    ledger.seal_path(path).unlink()
    (problem,) = check(root, deep=False).problems
    assert problem.what == "agrees with its manifest and is not sealed; --repair or the next extract does it"
    assert repair_set(check(root)) == Repair(0, 1, [])
    assert check(root).ok
    path.unlink()
    (problem,) = check(root, deep=False).problems
    assert problem.what == "is missing though rows of its manifest are committed; the next extract writes it again"
    ledger.add_rows(folder, MANIFEST, dict)
    assert check(root).ok
    ledger.entry_path(folder, 0).rename(root / "kept")
    ledger.entry_path(folder, 1).rename(ledger.entry_path(folder, 0))
    places = {item.place: item.what for item in check(root, deep=False).problems}
    assert "the ledger does not know: its last entry is lost" in places[f"commits/{GROUP}"]


def test_a_block_committed_anew_while_verify_ran_is_not_taken_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = set_folder(root)
    book = ledger.read_ledger(folder)
    group = next(iter(book.groups))
    shard = next(path for path in (folder / "data.zarr" / "cls").rglob("*") if path.is_file() and path.name == "0")
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    held = shard.read_bytes()
    shard.write_bytes(bytes(data))
    verdict = check(root)
    assert not verdict.ok
    before = commits.committed_blocks(folder, group)
    shard.write_bytes(held)  # somebody else made it whole
    assert repair_set(verdict).num_blocks == 0
    assert commits.committed_blocks(folder, group) == before
    shard.write_bytes(bytes(data))
    assert repair_set(verdict).num_blocks == 1
