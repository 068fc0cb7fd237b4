"""The store in a bucket: commits by conditional puts, writers that die, freeze or race, one writer where needed."""

import itertools
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_server import Server, serving
from tiny_sets import (
    CLS,
    PATCHES,
    KilledError,
    Trap,
    check_blocks,
    kill,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    states_of,
    values_of,
    write_block,
    write_missing,
    writer_of,
)
from typer.testing import CliRunner

import featstore
from cli import main
from featstore import files
from featstore.errors import CorruptError, StoreError
from featstore.objects import ObjectPath, Place, connection, parse_place
from featstore.store import bucket, commits, decisions, ledger, shards
from featstore.store.catalog import Store
from featstore.store.verify import repair_set, verify_set

ROWS = 12
REQUESTS = ("_put", "read_tagged", "read_range", "stat", "unlink", "remove_below", "listing")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_LIMIT_BYTES", 8 * CLS.row_bytes)  # 8 rows of cls, 2 of patches
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(server: Server) -> Place:
    return parse_place(str(server.prefix()))


def new_set(root: Place, rows: int = ROWS, arrays: Any = (CLS,), block_rows: int = 16) -> Place:
    return prepare(root, make_spec_of(block_rows=block_rows), make_manifest(named(rows)), list(arrays))


def committed(folder: Place) -> dict[str, bytes]:
    """Bytes of all markers and of all shards that they name."""
    found = {}
    book = ledger.read_ledger(folder)
    for group, arrays in book.groups.items():
        for block, commit in commits.read_commits(folder, group).items():
            paths = [commits.marker_path(folder, group, block)]
            for array in arrays:
                keys = [shards.shard_key(int(number), 1 + len(array.row_shape)) for number in commit.shards[array.name]]
                paths += [folder / "data.zarr" / array.name / key for key in keys]
            found.update({str(path): path.read_bytes() for path in paths})
    return found


def settle(folder: Place, block_rows: int = 16) -> None:
    commits.finish_intents(folder, ledger.read_ledger(folder), block_rows)
    commits.sweep_attempts(folder, older_than=-60.0)  # the clock of the server may be ahead
    assert not (folder / "attempts").is_dir()
    assert decisions.decided_attempts(folder) == set()


def trapped(monkeypatch: pytest.MonkeyPatch, at: int, then: Callable[[], None], *, after: bool = False) -> Trap:
    """A trap on the requests to the bucket."""
    trap = Trap(at=at, then=then, after=after)
    for name in REQUESTS:
        monkeypatch.setattr(ObjectPath, name, trap._wrap(name, getattr(ObjectPath, name)))
    return trap


def count_requests(root: Place, monkeypatch: pytest.MonkeyPatch) -> int:
    """Requests of one undisturbed commit."""
    folder = new_set(root / "count")
    with monkeypatch.context() as patch:
        trap = trapped(patch, -1, kill)
        write_block(folder, "cls", 0, 1)
    assert {"_put", "read_tagged", "read_range", "stat", "remove_below"} <= set(trap.seen)
    return trap.count


STEP = pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.slow)])


class TestCommits:
    def test_a_set_is_written_and_read(self, root: Place) -> None:
        folder = new_set(root, rows=28, arrays=[CLS, PATCHES])
        assert write_block(folder, "cls+patches", 0, 1)
        assert write_block(folder, "cls+patches", 1, 1)
        assert commits.committed_blocks(folder, "cls+patches") == {0, 1}
        assert check_blocks(folder, {1}) == {("cls+patches", 0): 1, ("cls+patches", 1): 1}
        settle(folder)
        opened = featstore.open(str(root))["demo", "tiny"]
        assert opened.ok.all()
        np.testing.assert_array_equal(opened.load("cls", verify=True), values_of(CLS, 0, 28, 1))
        assert opened.summary()["ok"] == 28
        assert not list((files.user_cache() / "writing").iterdir())

    def test_bytes_are_those_of_a_local_store(self, root: Place, tmp_path: Path) -> None:
        for place in (root, tmp_path / "store"):
            write_missing(new_set(place, rows=28, arrays=[CLS, PATCHES]), 1, block_rows=16)
        remote = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*")}
        local = {
            path.relative_to(tmp_path / "store").as_posix(): path.read_bytes()
            for path in (tmp_path / "store").rglob("*")
            if path.is_file()
        }
        assert remote == local

    def test_intents_are_told_from_markers_by_their_size(self, root: Place) -> None:
        folder = new_set(root, rows=1)
        decisions.decide(folder, "cls", 0, files.own_name())
        assert commits.committed_blocks(folder, "cls") == set()
        assert len(decisions.decided_attempts(folder)) == 1
        with pytest.raises(FileNotFoundError, match="not committed"):
            commits.read_commit(folder, "cls", 0)
        assert commits.finish_intents(folder, ledger.read_ledger(folder), 16) == 1  # its files are not there
        assert decisions.decided_attempts(folder) == set()
        write_block(folder, "cls", 0, 1)
        smallest = commits.marker_path(folder, "cls", 0)
        assert smallest.stat().st_size > 2 * decisions.INTENT_BYTES
        smallest.unlink()
        smallest_object = ObjectPath.parse(str(smallest))
        smallest_object.put(b"neither")
        with pytest.raises(CorruptError, match="neither intent nor marker; run the same command again"):
            decisions.decided(folder, "cls", 0)
        assert write_block(folder, "cls", 0, 2)
        assert check_blocks(folder, {2}) == {("cls", 0): 2}

    def test_taking_back_and_writing_again(self, root: Place) -> None:
        folder = new_set(root)
        write_block(folder, "cls", 0, 1)
        commits.take_back(folder, "cls", [CLS], 0, 16)
        commits.take_back(folder, "cls", [CLS], 0, 16)
        assert commits.committed_blocks(folder, "cls") == set()
        assert commits.read_commits(folder, "cls") == {}
        assert not commits.finish_intents(folder, ledger.read_ledger(folder), 16)
        assert write_block(folder, "cls", 0, 2)
        assert check_blocks(folder, {2}) == {("cls", 0): 2}
        assert not write_block(folder, "cls", 0, 3)
        assert check_blocks(folder, {2}) == {("cls", 0): 2}

    @STEP
    def test_a_writer_that_dies_at_any_request_loses_nothing(
        self, root: Place, monkeypatch: pytest.MonkeyPatch, step: int
    ) -> None:
        winners = set()
        for at in range(1, count_requests(root, monkeypatch) + 1, step):
            folder = new_set(root / str(at))
            with monkeypatch.context() as patch:
                trapped(patch, at, kill)
                with pytest.raises(KilledError):
                    write_block(folder, "cls", 0, 1)
            before = committed(folder)
            decided = bool(before) or bool(decisions.decided_attempts(folder))
            write_block(folder, "cls", 0, 2)
            found = check_blocks(folder, {1, 2})
            assert found == {("cls", 0): 1 if decided else 2}
            winners |= set(found.values())
            assert not before or committed(folder) == before
            settle(folder)
        assert winners == {1, 2}

    @STEP
    @pytest.mark.parametrize(
        "again",
        [False, pytest.param(True, marks=pytest.mark.slow)],
        ids=["overtaken", "taken back and made again"],
    )
    def test_a_writer_that_freezes_at_any_request_changes_nothing_when_it_wakes(
        self, root: Place, monkeypatch: pytest.MonkeyPatch, step: int, again: bool
    ) -> None:
        for at in range(1, count_requests(root, monkeypatch) + 1, step):
            folder = new_set(root / str(at))
            seen: dict[str, bytes] = {}

            def other(folder: Place = folder, seen: dict[str, bytes] = seen) -> None:
                write_block(folder, "cls", 0, 2)
                if again:
                    commits.take_back(folder, "cls", [CLS], 0, 16)
                    write_block(folder, "cls", 0, 3)
                seen.update(committed(folder))

            with monkeypatch.context() as patch:
                trap = trapped(patch, at, other)
                with suppress(StoreError):
                    write_block(folder, "cls", 0, 1)
            assert trap.sprung
            assert committed(folder) == seen
            check_blocks(folder, {3} if again else {1, 2})
            settle(folder)

    @STEP
    def test_two_finishers_replace_a_leftover_without_harming_the_commit(
        self, root: Place, monkeypatch: pytest.MonkeyPatch, step: int
    ) -> None:
        for at in itertools.count(1, step):
            folder = new_set(root / str(at))
            write_block(folder, "cls", 0, 1)
            commits.take_back(folder, "cls", [CLS], 0, 16)
            seen: dict[str, bytes] = {}

            def other(folder: Place = folder, seen: dict[str, bytes] = seen) -> None:
                commits.finish_intents(folder, ledger.read_ledger(folder), 16)
                write_block(folder, "cls", 0, 3)
                seen.update(committed(folder))

            with monkeypatch.context() as patch:
                trap = trapped(patch, at, other)
                write_block(folder, "cls", 0, 2)
            if not trap.sprung:
                break
            assert committed(folder) == seen
            check_blocks(folder, {2, 3})
        assert at > 20

    def test_an_attempt_that_does_not_read_back_is_given_up(self, root: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = new_set(root)
        real = files.upload

        def damaging(source: Path, final: Place) -> None:
            raw = bytearray(source.read_bytes())
            raw[5] ^= 1
            source.write_bytes(raw)
            real(source, final)

        with monkeypatch.context() as patch:
            patch.setattr(files, "upload", damaging)
            with pytest.raises(StoreError, match=r"the shard just published is damaged .*; not committed; check"):
                write_block(folder, "cls", 0, 1)
        assert commits.committed_blocks(folder, "cls") == set()
        settle(folder)
        write_block(folder, "cls", 0, 2)
        assert check_blocks(folder, {2}) == {("cls", 0): 2}

    def test_a_swept_attempt_is_told(self, root: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = new_set(root)
        real = decisions.is_marked

        def swept(*place: Any) -> bool:
            commits.sweep_attempts(folder, older_than=-60.0)
            return real(*place)

        monkeypatch.setattr(commits, "is_marked", swept)
        with pytest.raises(StoreError, match=r"was removed before its commit .* run the same command again"):
            write_block(folder, "cls", 0, 1)

    def test_a_server_that_refuses_gives_a_clear_error(self, root: Place, server: Server) -> None:
        folder = new_set(root)
        with writer_of(folder, "cls", 0) as writer:
            writer.append({"cls": values_of(CLS, 0, ROWS, 1)}, states_of(ROWS, 1))
            with server.answering(403), pytest.raises(StoreError, match="access denied; check AWS_ACCESS_KEY_ID"):
                writer.commit()
            assert writer.commit()  # the same rows, once the server takes them
        assert check_blocks(folder, {1}) == {("cls", 0): 1}

    def test_a_scratch_folder_that_cannot_be_made(self, root: Place, tmp_path: Path) -> None:
        folder = new_set(root)
        (tmp_path / "cache").write_bytes(b"")
        with pytest.raises(StoreError, match=r"cache/featstore: cannot write \(.*\); free space, fix access"):
            write_block(folder, "cls", 0, 1)


class TestSingleWriter:
    """A server that ignores conditions, or does not know them."""

    @pytest.fixture(params=["ignored", "refused"])
    def lax(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_REGION", f"test-{uuid.uuid4().hex[:8]}")  # a connection of its own
        real = ObjectPath._put

        def put(self: ObjectPath, data: Any, mode: Any) -> None:
            if mode != "overwrite" and request.param == "refused":
                raise StoreError("501 not implemented")
            real(self, data, "overwrite")

        monkeypatch.setattr(ObjectPath, "_put", put)

    def test_conditions_are_tried(self, root: Place) -> None:
        assert bucket.keeps_conditions(ObjectPath.parse(str(root)))
        assert list(root.iterdir()) == []

    def test_one_writer_works_and_a_second_is_told_who_it_is(
        self, lax: None, root: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert not bucket.keeps_conditions(ObjectPath.parse(str(root)))
        folder = new_set(root, rows=28)
        assert files.commit_mode(root) == "single"
        write_missing(folder, 1, block_rows=16)
        commits.take_back(folder, "cls", [CLS], 1, 16)
        write_block(folder, "cls", 1, 2)
        assert not write_block(folder, "cls", 0, 3)
        assert check_blocks(folder, {1, 2}) == {("cls", 0): 1, ("cls", 1): 2}
        settle(folder)
        # Another process: it holds nothing yet.
        from featstore.store import locks

        mine = connection("bucket").entered.pop(str(root))
        monkeypatch.setattr(locks, "_held", {})
        with pytest.raises(StoreError, match=rf"process {os.getpid()} on .* has been writing here since"):
            new_set(root)
        assert mine is not None
        root_lock = root / locks.LOCK
        root_lock.unlink()
        mine.renewed -= 3600
        connection("bucket").entered[str(root)] = mine
        commits.take_back(folder, "cls", [CLS], 1, 16)
        with pytest.raises(StoreError, match="another writer took this store over while this process stood still"):
            write_block(folder, "cls", 1, 2)


CHILD = """
import sys
sys.path[:0] = [{tests!r}]
from featstore.store import shards
from tiny_sets import *
from featstore.objects import parse_place
shards.SHARD_LIMIT_BYTES = 8 * CLS.row_bytes
folder = prepare(parse_place({root!r}), make_spec_of(), make_manifest(named({rows})), [CLS])
print("ready", flush=True)
write_missing(folder, {seed}, block_rows=16, order={order})
"""


def child(root: Place, seed: int, rows: int, order: int = 1) -> subprocess.Popen[str]:
    """A writer in a process of its own; obstore does not survive a fork."""
    tests = Path(__file__).parent
    code = CHILD.format(tests=str(tests), root=str(root), seed=seed, rows=rows, order=order)
    return subprocess.Popen([sys.executable, "-c", code], cwd=tests.parent, stdout=subprocess.PIPE, text=True)


class TestProcesses:
    @pytest.mark.slow
    def test_two_processes_race_with_different_bytes(self, root: Place) -> None:
        children = [child(root, 1, 152), child(root, 2, 152, -1)]
        assert [process.communicate()[0] for process in children] == ["ready\n"] * 2
        assert [process.returncode for process in children] == [0, 0]
        folder = new_set(root, 152)
        found = check_blocks(folder, {1, 2})
        assert len(found) == 10
        assert set(found.values()) == {1, 2}
        settle(folder)

    @pytest.mark.slow
    def test_a_killed_and_a_frozen_process(self, root: Place) -> None:
        killed = child(root, 1, 152)
        frozen = child(root, 3, 152)
        assert killed.stdout is not None
        assert frozen.stdout is not None
        killed.stdout.readline()
        frozen.stdout.readline()
        time.sleep(0.15)
        frozen.send_signal(signal.SIGSTOP)
        killed.kill()
        killed.communicate()
        folder = new_set(root, 152)  # finishes and sweeps
        write_missing(folder, 2, block_rows=16)
        held = committed(folder)
        found = check_blocks(folder, {1, 2, 3})
        assert len(found) == 10
        frozen.send_signal(signal.SIGCONT)
        frozen.communicate()
        assert frozen.returncode == 0
        assert committed(folder) == held
        settle(folder)

    def test_the_command_line(self, root: Place, tmp_path: Path) -> None:
        from PIL import Image

        images = tmp_path / "images"
        images.mkdir()
        for number in range(5):
            pixels = np.random.default_rng(number).integers(0, 255, (30, 30), np.uint8)
            Image.fromarray(pixels).save(images / f"{number}.png")

        def run(*arguments: str) -> str:
            done = CliRunner().invoke(main._store_app(), [*arguments, "--store", str(root)], catch_exceptions=False)
            assert done.exit_code == 0, done.output
            return str(done.stdout)

        assert run("register", "pics", str(images)).startswith(f"store {root}\n")
        extract = ("extract", "--model", "tiny", "--random-weights", "0", "--res", "42", "--device", "cpu")
        first = run(*extract)
        assert f"store {root}\n" in first
        assert "free space is not checked: a bucket does not state it" in first
        assert "5 computed" in first
        assert Store(root).summaries()[0]["ok"] == 5
        assert np.isfinite(featstore.open(str(root)).set("pics/tiny-random").load().astype(float)).all()


class TestStore:
    def test_growth_and_old_manifests(self, root: Place) -> None:
        folder = new_set(root, rows=12)
        write_missing(folder, 1, block_rows=16)
        held = committed(folder)
        grown = prepare(root, make_spec_of(), make_manifest(named(20)), [CLS, PATCHES])
        assert grown == folder
        write_missing(folder, 1, block_rows=16)
        assert held.items() <= committed(folder).items()
        assert [(item.start, item.stop) for item in ledger.read_ledger(folder).segments] == [(0, 12), (16, 24)]
        old = Store(root).set("demo/tiny", manifest=make_manifest(named(12)).short)
        np.testing.assert_array_equal(old.load("cls"), values_of(CLS, 0, 12, 1))
        assert len(old) == 12

    def test_verify_and_repair(self, root: Place) -> None:
        folder = new_set(root, rows=28)
        write_missing(folder, 1, block_rows=16)
        entry = Store(root).entry("demo/tiny")
        assert verify_set(Store(root), entry, deep=True).problems == []
        shard = ObjectPath.parse(str(folder / "data.zarr" / "cls" / "c" / "2" / "0"))
        data = bytearray(shard.read_bytes())
        data[3] ^= 4
        shard.put(bytes(data))
        verdict = verify_set(Store(root), entry, deep=True)
        assert {(item.group, item.block) for item in verdict.problems} == {("cls", 1)}
        assert repair_set(verdict).num_blocks == 1
        assert commits.committed_blocks(folder, "cls") == {0}
        write_missing(folder, 1, block_rows=16)
        assert verify_set(Store(root), entry, deep=True).problems == []

    def test_requests_do_not_grow_with_blocks(self, root: Place, server: Server) -> None:
        counts = []
        for rows in (2, 24):
            folder = new_set(root / str(rows), rows=rows, block_rows=2)
            write_missing(folder, 1, block_rows=2)
            group = ledger.read_ledger(folder).groups
            with server.counting() as requests:
                assert len(commits.committed_blocks(folder, "cls")) == rows // 2
            assert len(requests) == 1
            commits.read_commits(folder, "cls")
            with server.counting() as requests:
                assert len(commits.read_commits(folder, "cls")) == rows // 2
            assert len(requests) == 1  # markers are in the cache
            assert set(group) == {"cls"}
            with server.counting() as requests:
                assert Store(root / str(rows)).sets() == ["demo/tiny@42"]
                assert Store(root / str(rows)).datasets() == ["demo"]
            counts.append(len(requests))
        assert counts[0] == counts[1] < 20

    def test_removing(self, root: Place) -> None:
        folder = new_set(root)
        write_missing(folder, 1, block_rows=16)
        store = Store(root)
        with pytest.raises(StoreError, match="data set 'demo' still has 1 sets"):
            store.remove_dataset("demo")
        assert store.remove("demo/tiny") == folder
        assert not folder.exists()
        store.remove_dataset("demo")
        assert [path.name for path in root.rglob("*")] == ["store.json"]

    def test_a_bucket_that_does_not_exist_and_a_closed_one(self, server: Server, root: Place) -> None:
        with pytest.raises(StoreError, match="the bucket 'nobucket' does not exist; create it"):
            featstore.open("s3://nobucket/x")
        with server.answering(403), pytest.raises(StoreError, match="access denied"):
            featstore.open(str(root))

    def test_generated_images_stay_on_this_machine(self, root: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        from featstore.configs import RegisterConfig
        from featstore.register import register

        seen: list[Path] = []

        def read(adapter: str, folder: Path, **_: Any) -> None:
            seen.append(folder)
            raise KilledError

        monkeypatch.setattr("featstore.register.read_source", read)
        with pytest.raises(KilledError):
            register(root, "digits", None, RegisterConfig())
        assert seen == [files.user_cache() / "generated" / "digits"]
