"""gc and du: what is listed goes, what is committed or may still be written stays, whoever dies or stands still."""

import os
import random
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from tiny_sets import (
    CLS,
    PATCHES,
    KilledError,
    Trap,
    check_blocks,
    committed_files,
    fork,
    kill,
    kill_after,
    leftovers,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    wait,
    write_block,
    write_missing,
    writer_of,
)

from featstore import files
from featstore.datasets import manifest as manifests
from featstore.errors import ConfigError, CorruptError, StoreError, UnknownNameError
from featstore.objects import ObjectPath
from featstore.store import commits, gc
from featstore.store.catalog import Store
from featstore.store.gc import collect, parse_age, plan_gc
from featstore.store.usage import measure

GROUP = "cls+patches"
MANIFEST = make_manifest(named(40))


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def new_set(root: Path, rows: int = 40) -> Path:
    return prepare(root, make_spec_of(), make_manifest(named(rows)), [CLS, PATCHES])


def sweep(root: Path, *, older_than: float = 0.0, **also: bool) -> list[str]:
    """Collect everything; returns the paths that were found."""
    store = Store(root)
    found = plan_gc(store, older_than=older_than, **also)
    for item in found:
        collect(store, item)
    return [item.place.relative_to(root).as_posix() for item in found]


def sweep_all(root: Path) -> None:
    sweep(root, manifests=True, stale=True)


def dead_name() -> str:
    """A name of a process of this machine that has ended."""
    child = fork(lambda: None)
    wait(child)
    boot, _, rest = files.own_name().split("-", 2)
    return f"{boot}-{child}-{rest}"


def test_a_finished_store_has_nothing_to_collect(tmp_path: Path) -> None:
    write_missing(new_set(tmp_path), 1, block_rows=16)
    assert plan_gc(Store(tmp_path), older_than=0.0, manifests=True, stale=True) == []


def test_what_dead_writers_left_is_listed_and_removed(tmp_path: Path) -> None:
    folder = new_set(tmp_path)
    write_missing(folder, 1, block_rows=16)
    held = committed_files(folder)
    dead = dead_name()
    attempt = folder / "attempts" / dead
    attempt.mkdir(parents=True)
    (attempt / "cls.0").write_bytes(b"1234567")
    partial = folder / "rows" / f"abc.parquet.{dead}.partial"
    partial.write_bytes(b"12345")
    doomed = folder.parent / f".removing-{dead}"
    (doomed / "rows").mkdir(parents=True)
    (doomed / "rows" / "x").write_bytes(b"123")
    for living in (f"mode.json.{files.own_name()}.partial", f"sets/demo/.removing-{files.own_name()}"):
        (tmp_path / living).write_bytes(b"")
    store = Store(tmp_path)
    found = plan_gc(store)
    assert {(item.place, item.num_bytes, item.why) for item in found} == {
        (attempt, 7, "a block that its writer did not finish"),
        (partial, 5, "a file that its writer did not finish"),
        (doomed, 3, "a removal that was stopped"),
    }
    assert attempt.exists()
    assert all(collect(store, item) for item in found)
    assert plan_gc(store) == []
    assert not any(path.exists() for path in (attempt, partial, doomed))
    assert len(list(tmp_path.rglob("*.partial"))) == 1
    assert committed_files(folder) == held
    # Silent for an hour by the inode's own clock, whatever the file's time says.
    assert plan_gc(store, older_than=3600.0) == []
    assert len(plan_gc(store, older_than=0.0)) == 2


def test_shards_of_a_block_taken_back_go_and_come_back(tmp_path: Path) -> None:
    folder = new_set(tmp_path)
    write_missing(folder, 1, block_rows=16)
    commits.take_back(folder, GROUP, [CLS, PATCHES], 1, 16)
    assert sweep(tmp_path) == [
        f"{folder.relative_to(tmp_path)}/data.zarr/{name}" for name in ("cls/c/1/0", "patches/c/1/0/0")
    ]
    assert leftovers(folder) == []
    assert sweep(tmp_path) == []
    assert check_blocks(folder, {1}).keys() == {(GROUP, 0), (GROUP, 2)}
    write_missing(folder, 2, block_rows=16)
    assert check_blocks(folder, {1, 2})[GROUP, 1] == 2


def orphaned(root: Path) -> Path:
    """A set of one block whose shards stand, of attempt 1, and whose marker was taken back."""
    folder = new_set(root, 12)
    write_block(folder, GROUP, 0, 1)
    commits.take_back(folder, GROUP, [CLS, PATCHES], 0, 16)
    return folder


def each_call(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[Path], object],
    other: Callable[[Path], None] | None,
    make: Callable[[Path], Path] = orphaned,
) -> list[Path]:
    """Run `work` on a new store with `other` in between (or death) at each of its calls; the stores' sets."""
    done = []
    for at in range(1, 1000):
        root = tmp_path / f"{at}"
        folder = make(root)
        with monkeypatch.context() as patch:
            trap = Trap(at=at, then=kill if other is None else partial(other, root))
            trap.install(patch)
            with suppress(KilledError, StoreError):
                work(root)
        if not trap.sprung:
            return done
        done.append(folder)
    raise AssertionError("it never ends")


def test_gc_beside_a_writer_that_stands_still_takes_nothing_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(root: Path) -> None:
        write_block(next((root / "sets" / "demo").iterdir()), GROUP, 0, 2)

    folders = each_call(tmp_path, monkeypatch, write, sweep_all)
    assert len(folders) > 20
    whole = 0
    for folder in folders:
        whole += len(check_blocks(folder, {2}))
        write_block(folder, GROUP, 0, 3)  # where the attempt was taken for dead, the error said so
        check_blocks(folder, {2, 3})
    assert whole > 5


def test_a_writer_beside_gc_that_stands_still_keeps_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(root: Path) -> None:
        write_block(next((root / "sets" / "demo").iterdir()), GROUP, 0, 2)

    folders = each_call(tmp_path, monkeypatch, sweep, write)
    assert len(folders) > 10
    for folder in folders:
        assert check_blocks(folder, {2}) == {(GROUP, 0): 2}


def test_gc_that_dies_anywhere_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(root: Path) -> Path:
        folder = new_set(root)
        write_missing(folder, 1, block_rows=16)
        commits.take_back(folder, GROUP, [CLS, PATCHES], 1, 16)
        (folder / "attempts" / dead_name()).mkdir(parents=True)
        return folder

    folders = each_call(tmp_path, monkeypatch, sweep, None, make)
    assert len(folders) > 10
    for folder in folders:
        assert check_blocks(folder, {1}).keys() == {(GROUP, 0), (GROUP, 2)}
        sweep(folder.parents[2])
        write_missing(folder, 1, block_rows=16)
        assert len(check_blocks(folder, {1})) == 3
        assert leftovers(folder) == []


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_collectors_beside_writers(tmp_path: Path, kills: int) -> None:
    """All start at once, when all are forked; collectors say that they began and ended, so that kills are counted."""
    root, reports = tmp_path / "store", tmp_path / "reports"
    reports.mkdir()
    folder = new_set(root)
    rng = random.Random(kills)
    gate, opener = os.pipe()

    def gated(work: Callable[[], object]) -> None:
        os.read(gate, 1)
        work()

    def collect_and_tell(name: str) -> None:
        (reports / f"{name}.began").touch()
        sweep(root, older_than=5.0)
        (reports / f"{name}.ended").touch()

    inside = 0
    for number in range(kills):
        for block in range(3):
            commits.take_back(folder, GROUP, [CLS, PATCHES], block, 16)
        started = time.perf_counter()
        sweep(root, older_than=5.0)
        calm = time.perf_counter() - started
        names = [f"{number}.{which}" for which in "ab"]
        collectors = [fork(partial(gated, partial(collect_and_tell, name))) for name in names]
        writer = fork(partial(gated, partial(write_missing, folder, 1, block_rows=16)))
        os.write(opener, b"123")
        statuses = [kill_after(child, rng.uniform(0, calm)) for child in collectors]
        assert set(statuses) <= {0, -9}
        assert wait(writer) == 0
        assert len(check_blocks(folder, {1})) == 3
        for name in names:
            inside += (reports / f"{name}.began").exists() and not (reports / f"{name}.ended").exists()
    os.close(gate)
    os.close(opener)
    assert inside >= kills // 3


def age(folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the clock be later than everything in this folder."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + seconds)


def test_empty_sets_go_after_a_day_and_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_set(tmp_path)
    full = prepare(tmp_path, make_spec_of(model="full"), MANIFEST, [CLS])
    write_missing(full, 1, block_rows=16)
    assert sweep(tmp_path, stale=True) == []
    age(folder, monkeypatch, 1.1 * gc.EMPTY_SECONDS)
    assert sweep(tmp_path) == []
    assert sweep(tmp_path, stale=True) == [folder.relative_to(tmp_path).as_posix()]
    assert [path.name for path in folder.parent.iterdir()] == [full.name]


def test_an_empty_set_that_gets_a_commit_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the rename, also where the collector dies right after the rename."""
    folder = new_set(tmp_path)
    age(folder, monkeypatch, 1.1 * gc.EMPTY_SECONDS)
    store = Store(tmp_path)
    (item,) = plan_gc(store, stale=True)
    write_missing(folder, 1, block_rows=16)
    assert not collect(store, item)
    assert len(check_blocks(folder, {1})) == 3
    spare = folder.with_name(f".unused-{dead_name()}.{folder.name}")
    folder.rename(spare)
    assert sweep(tmp_path) == [spare.relative_to(tmp_path).as_posix()]
    assert len(check_blocks(folder, {1})) == 3


def test_sets_of_an_older_schema_go_when_a_new_one_has_it_all(tmp_path: Path) -> None:
    spec = make_spec_of()
    old = spec | {"schema": 1, "identity": spec["identity"] | {"schema": 1}}
    old["fingerprint"] = files.digest(old["identity"])
    before = prepare(tmp_path, old, MANIFEST, [CLS])
    write_missing(before, 1, block_rows=16)
    assert sweep(tmp_path, stale=True) == []
    after = prepare(tmp_path, spec, MANIFEST, [CLS])
    write_block(after, "cls", 0, 1)
    assert sweep(tmp_path, stale=True) == []
    write_missing(after, 1, block_rows=16)
    assert sweep(tmp_path, stale=True) == [before.relative_to(tmp_path).as_posix()]
    assert len(check_blocks(after, {1})) == 3


def test_manifests_stay_while_a_set_or_a_record_needs_them(tmp_path: Path) -> None:
    folder = new_set(tmp_path)
    recorded, unused = make_manifest(named(5)), make_manifest(named(6))
    for manifest in (recorded, unused, MANIFEST):
        manifests.save(tmp_path / "datasets", manifest)
    manifests.save(tmp_path / "datasets", make_manifest(named(7)))  # the current one
    record = tmp_path / "results" / "r.json"
    files.write_atomic(record, files.sealed({"manifest": recorded.digest}))
    assert sweep(tmp_path) == []
    assert plan_gc(Store(tmp_path), manifests=True) == []
    assert sweep(tmp_path, manifests=True) == [f"datasets/demo/{unused.short}"]
    left = {path.name for path in (tmp_path / "datasets" / "demo").iterdir() if path.is_dir()}
    assert left == {recorded.short, MANIFEST.short, make_manifest(named(7)).short}
    assert folder.is_dir()
    record.write_bytes(b"{}")
    with pytest.raises(CorruptError, match="not a sealed JSON file"):
        plan_gc(Store(tmp_path), manifests=True)


def test_a_manifest_that_comes_into_use_is_put_back(tmp_path: Path) -> None:
    new_set(tmp_path)
    unused = make_manifest(named(6))
    manifests.save(tmp_path / "datasets", unused)
    manifests.save(tmp_path / "datasets", MANIFEST)
    store = Store(tmp_path)
    (item,) = plan_gc(store, older_than=0.0, manifests=True)
    manifests.save(tmp_path / "datasets", unused)
    assert not collect(store, item)
    assert store.manifest("demo").digest == unused.digest


def test_digests_of_weights_that_are_gone_are_forgotten(tmp_path: Path) -> None:
    new_set(tmp_path)
    path, weights = tmp_path / "cache" / "weights.json", tmp_path / "w.bin"
    weights.write_bytes(b"w")
    files.write_atomic(path, files.canonical_json({str(weights): {"sha256": "a"}, "/gone": {"sha256": "b"}}))
    assert sweep(tmp_path) == ["cache/weights.json"]
    assert path.read_bytes() == files.canonical_json({str(weights): {"sha256": "a"}})
    path.write_bytes(b"not json")
    assert sweep(tmp_path) == ["cache/weights.json"]


def test_what_cannot_be_collected_is_told(tmp_path: Path) -> None:
    new_set(tmp_path)
    store = Store(tmp_path)
    store.path = ObjectPath("bucket", "x")  # type: ignore[assignment]
    with pytest.raises(StoreError, match="gc works on folders; in a bucket, set a lifecycle rule"):
        plan_gc(store)
    assert [parse_age(text) for text in ("90s", "10min", "1h", "0.5 d")] == [90.0, 600.0, 3600.0, 43200.0]
    with pytest.raises(ConfigError, match=r"--older-than is a number with s, min, h or d .*, got '3 weeks'"):
        parse_age("3 weeks")


def test_usage_counts_every_file_once(tmp_path: Path) -> None:
    folder = new_set(tmp_path)
    write_missing(folder, 1, block_rows=16)
    (folder / "attempts" / "x").mkdir(parents=True)
    (folder / "attempts" / "x" / "cls.0").write_bytes(b"123")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_bytes(b"12345")
    os.link(tmp_path / "results" / "a.json", tmp_path / "results" / "b.json")
    (tmp_path / "sparse").write_bytes(b"")
    os.truncate(tmp_path / "sparse", 10**6)
    rows = measure(tmp_path)
    counted = subprocess.run(
        ["du", "-a", "-b", str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    sizes = [int(line.split("\t")[0]) for line in counted if Path(line.split("\t")[1]).is_file()]
    assert sum(row.num_bytes for row in rows) == sum(sizes)
    assert sum(row.num_files for row in rows) == len(sizes)
    assert sum(row.disk for row in rows) < sum(sizes)
    by_part = {(row.owner, row.part): row for row in rows}
    owner = f"demo/{folder.name}"
    assert by_part[owner, "array cls"].num_files == 3
    assert by_part[owner, "markers"].num_files == 3
    assert by_part[owner, "unfinished attempts"].num_bytes == 3
    assert by_part[owner, "array metadata"].num_files == 3
    assert by_part["store", "results"].num_bytes == 5
    assert by_part["demo", f"manifest {MANIFEST.short}"].num_files == 2
    assert {part for name, part in by_part if name == owner} >= {"spec", "ledger", "rows"}
    only = measure(tmp_path, "demo")
    assert {row.owner for row in only} == {"demo", owner}
    with pytest.raises(UnknownNameError, match="holds nothing of a data set 'other'; `featstore ls` lists"):
        measure(tmp_path, "other")


def test_a_living_writers_attempt_is_never_listed(tmp_path: Path) -> None:
    folder = new_set(tmp_path)
    with writer_of(folder, GROUP, 0):
        assert plan_gc(Store(tmp_path)) == []
