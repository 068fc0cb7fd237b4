"""Two machines' parts of one set become the set that one machine would have made; kills and races harm nothing."""

import json
import os
import random
import shutil
import signal
import time
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
    committed_files,
    contents,
    fork,
    kill,
    kill_after,
    leftovers,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    values_of,
    wait,
    write_block,
    write_missing,
    writer_of,
)

from cli import exchange
from featstore import files
from featstore.datasets import manifest as manifests
from featstore.errors import ConfigError, CorruptError, ManifestError, SchemaError, UnknownNameError
from featstore.store import commits, ledger, reductions, shards
from featstore.store.catalog import Store
from featstore.store.commits import RowState
from featstore.store.layout import ArraySpec, read_spec, set_folder
from featstore.store.merge import Merged, bring_manifest, merge, num_blocks
from featstore.store.reductions import Reduction
from featstore.store.verify import verify_set

GROUP = "cls+patches"
ROWS, SIZE = 75, 16  # blocks 0 to 4, the last of 11 rows
ARRAYS = [CLS, PATCHES]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_LIMIT_BYTES", 8 * CLS.row_bytes)  # several shards a block
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here cuts the power


def part(root: Path, blocks: list[int], *, seed: int = 1, rows: int = ROWS, **spec: Any) -> Path:
    """A store that has these blocks of demo/tiny@42; returns the set's folder."""
    folder = prepare(root, make_spec_of(**spec), make_manifest(named(rows)), ARRAYS)
    for block in blocks:
        write_block(folder, GROUP, block, seed)
    return folder


def merged(source: Path, target: Path, **options: Any) -> Merged:
    (result,) = merge(Store(source), target, [], **options)
    return result


def check_store_whole(root: Path) -> None:
    for entry in Store(root).entries():
        assert verify_set(Store(root), entry, deep=True).problems == []
        assert leftovers(entry.folder) == []


def test_two_halves_make_the_set_of_one_machine(tmp_path: Path) -> None:
    whole = part(tmp_path / "whole", [0, 1, 2, 3, 4])
    part(tmp_path / "a", [0, 3])
    target = part(tmp_path / "b", [1, 3])
    before = committed_files(target)
    seen: list[int] = []
    assert num_blocks(Store(tmp_path / "a"), []) == 5
    result = merged(tmp_path / "a", tmp_path / "b", advance=seen.append)
    assert (result.copied, result.rows, result.equal, result.left, sum(seen)) == (1, 16, 1, 0, 5)
    assert {path: committed_files(target)[path] for path in before} == before
    part(tmp_path / "c", [2, 4])
    merged(tmp_path / "c", tmp_path / "b")
    assert contents(target) == contents(whole)
    check_store_whole(tmp_path / "b")
    assert merged(tmp_path / "a", tmp_path / "b").copied == 0


def test_an_empty_store_becomes_a_copy(tmp_path: Path) -> None:
    source = part(tmp_path / "a", [0, 1, 2, 3, 4])
    files.write_atomic(source / "runs" / "1.json", files.sealed({"time": "now"}))
    merged(tmp_path / "a", tmp_path / "new")
    assert contents(tmp_path / "new") == contents(tmp_path / "a")
    check_store_whole(tmp_path / "new")


def test_only_the_sets_named_come(tmp_path: Path) -> None:
    part(tmp_path / "a", [0])
    part(tmp_path / "a", [0], model="other")
    (result,) = merge(Store(tmp_path / "a"), tmp_path / "b", ["demo/other"])
    assert Store(tmp_path / "b").sets() == ["demo/other@42"]
    assert result.name.startswith("demo/other@42-")
    with pytest.raises(UnknownNameError, match="no set 'demo/none'"):
        merge(Store(tmp_path / "a"), tmp_path / "b", ["demo/none"])


def test_grown_sets_follow_their_source(tmp_path: Path) -> None:
    """The target knows the first manifest only; the source has grown by rows and by an array group."""
    target = part(tmp_path / "b", [0, 1])
    source = part(tmp_path / "a", [1, 2, 3, 4])
    grown = make_manifest(named(90))
    more = ArraySpec(name="mean_patch", row_shape=(8,), dtype="float16")
    prepare(tmp_path / "a", make_spec_of(), grown, [more])
    for group in ledger.read_ledger(source).groups:
        for block, _, _ in ledger.read_ledger(source).blocks(SIZE):
            if block not in commits.committed_blocks(source, group) | {0}:
                write_block(source, group, block, 1)
    result = merged(tmp_path / "a", tmp_path / "b")
    assert (result.copied, result.equal) == (3 + 1 + 5, 1)
    assert Store(tmp_path / "b").manifest("demo").short == make_manifest(named(ROWS)).short  # current stays
    check_blocks(target, {1})
    write_missing(target, 1, block_rows=SIZE)
    write_missing(source, 1, block_rows=SIZE)
    assert contents(target) == contents(source)


def test_other_row_orders_are_rewritten_block_by_block(tmp_path: Path) -> None:
    """Same samples under another manifest order and block size: no shard can be copied as it is."""
    source = prepare(tmp_path / "a", make_spec_of(), make_manifest(named(40)), ARRAYS)
    for block in (0, 2):
        write_block(source, GROUP, block, 1)
    order = [*named(16)[::-1], *named(24, 16)]
    sizes = [100 + int(name[1:]) for name in order]
    target = prepare(tmp_path / "b", make_spec_of(block_rows=8), make_manifest(order, sizes=sizes), ARRAYS)
    result = merged(tmp_path / "a", tmp_path / "b")
    # Rows 0 to 15 reversed fill blocks 0 and 1, rows 32 to 39 block 4.
    assert commits.committed_blocks(target, GROUP) == {0, 1, 4}
    assert (result.copied, result.rows, result.left) == (3, 24, 0)
    fs = Store(tmp_path / "b").open(
        Store(tmp_path / "b").entry("demo/tiny"), manifest=make_manifest(order, sizes=sizes).short
    )
    for array in ARRAYS:
        np.testing.assert_array_equal(fs.array(array.name)[:16], values_of(array, 0, 16, 1)[::-1])
        np.testing.assert_array_equal(fs.array(array.name)[32:], values_of(array, 32, 40, 1))
    check_store_whole(tmp_path / "b")
    again = merged(tmp_path / "a", tmp_path / "b")
    assert (again.copied, again.equal) == (0, 3)


def test_rows_that_fill_no_block_are_counted(tmp_path: Path) -> None:
    source = prepare(tmp_path / "a", make_spec_of(block_rows=8), make_manifest(named(40)), ARRAYS)
    write_block(source, GROUP, 1, 1)
    target = part(tmp_path / "b", [], rows=40)
    result = merged(tmp_path / "a", tmp_path / "b")
    assert (result.copied, result.left) == (0, 8)
    assert commits.committed_blocks(target, GROUP) == set()


def test_a_file_rewritten_in_place_is_told_apart_by_content(tmp_path: Path) -> None:
    """Source: s0003 twice, of one size, first seed 1 then seed 2; the target means the second."""
    source = part(tmp_path / "a", [0], rows=16)
    stated = make_manifest(named(16), contents=[f"{2:032x}" if row == 3 else None for row in range(16)])
    ledger.add_rows(source, stated, lambda: dict.fromkeys(range(16), f"{1:032x}"))
    manifests.save(tmp_path / "a" / "datasets", stated)
    ledger.write_metadata(source, read_spec(source), ledger.read_ledger(source))
    write_block(source, GROUP, 1, 2)
    target = prepare(tmp_path / "b", make_spec_of(), stated, ARRAYS)
    merged(tmp_path / "a", tmp_path / "b")
    fs = Store(tmp_path / "b").open(Store(tmp_path / "b").entry("demo/tiny"), manifest=stated.short)
    expected = values_of(CLS, 0, 16, 1).copy()
    expected[3] = values_of(CLS, 16, 17, 2)[0]
    np.testing.assert_array_equal(fs.cls.load(), expected)
    assert commits.read_commit(target, GROUP, 0).content(3) == f"{2:032x}"


def rewrite(folder: Path, block: int, *, scale: float = 1.0, content: int = 1, failed: int | None = None) -> None:
    """Commit a block whose values are `scale` times those of seed 1."""
    with writer_of(folder, GROUP, block) as writer:
        rows = {array.name: values_of(array, writer.start, writer.stop, 1) * np.float16(scale) for array in ARRAYS}
        states = [RowState(f"{content:032x}") for _ in range(writer.start, writer.stop)]
        if failed is not None:
            states[failed] = RowState(f"{content:032x}", "cannot be decoded")
            for values in rows.values():
                values[failed] = np.nan
        writer.append(rows, states)
        assert writer.commit()


def test_blocks_that_differ_by_rounding_stay_as_they_are(tmp_path: Path) -> None:
    part(tmp_path / "a", [0, 1])
    target = part(tmp_path / "b", [])
    rewrite(target, 0, scale=1.002)
    before = committed_files(target)
    result = merged(tmp_path / "a", tmp_path / "b")
    assert (result.copied, result.within_parity, result.equal) == (1, 1, 0)
    assert {path: committed_files(target)[path] for path in before} == before


def test_blocks_with_other_numbers_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    part(tmp_path / "a", [0, 1])
    target = part(tmp_path / "b", [])
    rewrite(target, 0, scale=1.02)
    before = contents(tmp_path / "b")
    message = (
        r"1 blocks hold other numbers.*\n.*cls\+patches block 0: relative difference 0\.019, more than 0\.005\nfind out"
    )
    with pytest.raises(CorruptError, match=message):
        merged(tmp_path / "a", tmp_path / "b")
    assert contents(tmp_path / "b") == before
    result = merged(tmp_path / "a", tmp_path / "b", keep="target")
    assert (result.copied, len(result.conflicts)) == (1, 1)
    assert {path: data for path, data in contents(tmp_path / "b").items() if path in before} == before
    assert commits.committed_blocks(target, GROUP) == {0, 1}


def test_blocks_read_from_other_images_are_refused(tmp_path: Path) -> None:
    part(tmp_path / "a", [0])
    rewrite(part(tmp_path / "b", []), 0, content=7)
    message = r"block 0: 16 rows, such as \('s0000', 100\), were read from other image bytes"
    with pytest.raises(CorruptError, match=message):
        merged(tmp_path / "a", tmp_path / "b")


def test_rows_that_failed_here_alone_are_counted(tmp_path: Path) -> None:
    part(tmp_path / "a", [0])
    rewrite(part(tmp_path / "b", []), 0, failed=5)
    result = merged(tmp_path / "a", tmp_path / "b")
    assert (result.failed_here_only, result.equal, result.conflicts) == (1, 1, [])


def test_failed_rows_come_with_their_reason(tmp_path: Path) -> None:
    rewrite(part(tmp_path / "a", []), 0, failed=5)
    target = part(tmp_path / "b", [])
    merged(tmp_path / "a", tmp_path / "b")
    assert commits.read_commit(target, GROUP, 0).failed == {5: "cannot be decoded"}
    check_store_whole(tmp_path / "b")


@pytest.mark.parametrize("where", ["payload", "checksums"])
def test_a_damaged_source_is_not_merged(tmp_path: Path, where: str) -> None:
    source = part(tmp_path / "a", [0])
    shard = source / "data.zarr" / "cls" / "c" / "0" / "0"
    if where == "payload":
        raw = bytearray(shard.read_bytes())
        raw[3] ^= 1
        shard.write_bytes(raw)
        message = "checksum is .*, its bytes give"
    else:  # a whole shard, but not the one that was committed
        other = part(tmp_path / "other", [0], seed=2)
        shard.write_bytes((other / "data.zarr" / "cls" / "c" / "0" / "0").read_bytes())
        message = r"size or checksum differs from what was committed; nothing of it is merged; run `featstore verify"
    target = part(tmp_path / "b", [])
    with pytest.raises(CorruptError, match=message):
        merged(tmp_path / "a", tmp_path / "b")
    assert commits.committed_blocks(target, GROUP) == set()
    assert leftovers(target) == []


def test_stores_that_cannot_be_merged(tmp_path: Path) -> None:
    part(tmp_path / "a", [0])
    with pytest.raises(ConfigError, match="source and target of a merge are the same store; name the other one"):
        merged(tmp_path / "a", tmp_path / "a")
    target = set_folder(tmp_path / "b", make_spec_of())
    other = make_spec_of(weights="x")
    files.create_exclusive(target / "spec.json", files.sealed(other))
    with pytest.raises(ConfigError, match=r"is the set of another fingerprint .* under another --name"):
        merged(tmp_path / "a", tmp_path / "b")
    spec = set_folder(tmp_path / "a", make_spec_of()) / "spec.json"
    spec.write_bytes(files.sealed({**make_spec_of(), "schema": 1}))
    with pytest.raises(SchemaError, match="has schema 1 and is open for reading only"):
        merged(tmp_path / "a", tmp_path / "c")


def test_manifests_whose_digests_begin_alike_are_told(tmp_path: Path) -> None:
    one = make_manifest(named(3))
    two = manifests.Manifest(name="demo", table=one.table, digest=one.digest[:-1] + "?", meta=one.meta)
    manifests.save(tmp_path / "a", one)
    manifests.save(tmp_path / "b", two)
    with pytest.raises(ManifestError, match="have different digests; register one of them under another name"):
        bring_manifest(tmp_path / "a", tmp_path / "b", "demo", one.short)


def test_a_manifest_that_does_not_read_back_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_manifest(named(3))
    manifests.save(tmp_path / "a", one)
    monkeypatch.setattr(files, "write_atomic", lambda path, data: None)
    with pytest.raises(ManifestError, match="the manifest copied does not read back; run the merge again"):
        bring_manifest(tmp_path / "a", tmp_path / "b", "demo", one.short)


def test_a_block_that_another_merge_committed_first_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part(tmp_path / "a", [0])
    target = part(tmp_path / "b", [])
    real = commits.BlockWriter.commit

    def late(self: commits.BlockWriter) -> bool:
        monkeypatch.setattr(commits.BlockWriter, "commit", real)
        rewrite(target, 0, scale=2.0)
        return real(self)

    monkeypatch.setattr(commits.BlockWriter, "commit", late)
    with pytest.raises(CorruptError, match=r"block 0: relative difference 0\.5"):
        merged(tmp_path / "a", tmp_path / "b")
    np.testing.assert_array_equal(Store(tmp_path / "b")["demo/tiny"].cls[:16], values_of(CLS, 0, 16, 1) * np.float16(2))


def test_a_merge_that_dies_at_any_call_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part(tmp_path / "a", [0], rows=11)
    wanted = contents(tmp_path / "a")
    trap = Trap(at=-1, then=kill)
    with monkeypatch.context() as patch:
        trap.install(patch)
        merged(tmp_path / "a", tmp_path / "calm")
    assert contents(tmp_path / "calm") == wanted
    for at in range(1, trap.count + 1, 9):
        target = tmp_path / f"b{at}"
        with monkeypatch.context() as patch:
            Trap(at=at, then=kill).install(patch)
            with pytest.raises(KilledError):
                merged(tmp_path / "a", target)
        merged(tmp_path / "a", target)
        for entry in Store(target).entries():
            commits.sweep_attempts(entry.folder, older_than=0.0)
        assert {path: data for path, data in contents(target).items() if not path.endswith(".partial")} == wanted
        shutil.rmtree(target)


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_merges_lose_nothing(tmp_path: Path, kills: int) -> None:
    blocks = 6 * kills
    whole = part(tmp_path / "whole", [*range(blocks)], rows=16 * blocks - 3)
    shutil.copytree(tmp_path / "whole", tmp_path / "a")
    target = part(tmp_path / "b", [], rows=16 * blocks - 3)
    for block in range(0, blocks, 3):
        write_block(target, GROUP, block, 1)
    rng = random.Random(kills)
    dead = 0
    for _ in range(kills):
        held = committed_files(target)
        enough = len(commits.committed_blocks(target, GROUP)) + rng.randint(0, 3)
        child = fork(lambda: merged(tmp_path / "a", tmp_path / "b"))
        # Killed in the middle of its work, however fast the machine is: after so many blocks of its own.
        deadline = time.monotonic() + 60
        while len(commits.committed_blocks(target, GROUP)) <= enough and time.monotonic() < deadline:
            time.sleep(0.001)
        dead += kill_after(child, rng.uniform(0, 0.01)) == -signal.SIGKILL
        now = committed_files(target)
        assert {path: now[path] for path in held} == held
        check_blocks(target, {1})
    held = committed_files(target)
    merged(tmp_path / "a", tmp_path / "b")
    now = committed_files(target)
    assert {path: now[path] for path in held} == held
    commits.sweep_attempts(target, older_than=0.0)
    assert contents(target) == contents(whole)
    assert dead >= kills // 2


def test_two_merges_may_race(tmp_path: Path) -> None:
    whole = part(tmp_path / "whole", [0, 1, 2, 3, 4])
    part(tmp_path / "a", [0, 1, 2])
    part(tmp_path / "b", [1, 2, 3, 4])
    children = [fork(lambda name=name: merged(tmp_path / name, tmp_path / "c")) for name in "ab"]  # type: ignore[misc]
    assert [wait(child) for child in children] == [0, 0]
    target = Store(tmp_path / "c").entry("demo/tiny").folder
    assert contents(target) == contents(whole)


def test_an_archived_target_is_refused(tmp_path: Path) -> None:
    part(tmp_path / "a", [0])
    target = part(tmp_path / "b", [])
    files.write_atomic(target / "archive.json", files.sealed({}))
    with pytest.raises(ConfigError, match="is archived and takes no rows; run `featstore unarchive` first, or"):
        merged(tmp_path / "a", tmp_path / "b")


def reduced(root: Path, blocks: list[int], *, scale: float = 0.5, shift: int = 0) -> Path:
    """A set whose patches are int8 with these parameters; their first dimension is moved by `shift` steps."""
    steps = ("int8",)
    reduction = Reduction(
        steps=steps,
        grid=(1, 3),
        dim=8,
        dtype="float32",
        parameters={"offset": np.zeros(8, np.float32), "scale": np.full(8, scale, np.float32)},
    )
    spec = make_spec_of(reductions=reductions.identity_of(steps))
    folder = set_folder(root, spec)
    name = reductions.write_parameters(folder, {"patches": reduction})
    spec["reduction"] = {"parameters": name, "arrays": {"patches": reductions.describe(reduction)}}
    array = ArraySpec(name="patches", row_shape=(3, 8), dtype="int8")
    prepare(root, spec, make_manifest(named(32)), [array])
    for block in blocks:
        with writer_of(folder, "patches", block) as writer:
            rows = np.random.default_rng(block).integers(-90, 90, (16, 3, 8)).astype(np.int8)
            rows[:, :, 0] += np.int8(shift)
            writer.append({"patches": rows}, [RowState("0" * 31 + "1")] * 16)
            assert writer.commit()
    return folder


def test_reduced_sets_come_with_their_parameters(tmp_path: Path) -> None:
    whole = reduced(tmp_path / "whole", [0, 1])
    reduced(tmp_path / "a", [0])
    merged(tmp_path / "a", tmp_path / "b")
    reduced(tmp_path / "c", [1])
    merged(tmp_path / "c", tmp_path / "b")
    target = Store(tmp_path / "b").entry("demo/tiny").folder
    assert contents(target) == contents(whole)
    values = Store(tmp_path / "b")["demo/tiny"].patches.load()
    np.testing.assert_array_equal(values, Store(tmp_path / "whole")["demo/tiny"].patches.load())


def test_reduced_rows_are_compared_as_tokens(tmp_path: Path) -> None:
    reduced(tmp_path / "a", [0])
    reduced(tmp_path / "near", [0], shift=1)
    reduced(tmp_path / "far", [0], shift=9)
    with pytest.raises(CorruptError, match=r"patches block 0: relative difference 0\.0\d+, more than 0\.01"):
        merged(tmp_path / "a", tmp_path / "far")
    assert merged(tmp_path / "a", tmp_path / "near").within_parity == 1


def test_reductions_with_other_parameters_are_refused(tmp_path: Path) -> None:
    reduced(tmp_path / "a", [0])
    reduced(tmp_path / "b", [1], scale=0.25)
    before = contents(tmp_path / "b")
    with pytest.raises(ConfigError, match="the two stores fitted other parameters to reduce patches, so their rows do"):
        merged(tmp_path / "a", tmp_path / "b")
    assert contents(tmp_path / "b") == before


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part(tmp_path / "a", [0, 1])
    rewrite(part(tmp_path / "b", []), 0, scale=1.02)
    source, target = str(tmp_path / "a"), str(tmp_path / "b")
    with pytest.raises(CorruptError, match="1 blocks hold other numbers"):
        exchange.merge(source, None, store=target)
    exchange.merge(source, None, keep="target", store=target)
    printed = capsys.readouterr().out
    assert "1 blocks (16 rows) came, 0 were here" in printed
    assert "kept: demo/tiny@42" in printed
    exchange.merge(source, ["demo/tiny"], store=str(tmp_path / "c"), json=True)
    assert json.loads(capsys.readouterr().out)["sets"][0]["copied"] == 2
