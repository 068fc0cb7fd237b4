"""Objects of a bucket as paths, against moto's S3 server on loopback."""

import json
import pickle
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_server import Server, serving

from featstore import files
from featstore.errors import ConfigError, CorruptError, StoreError
from featstore.objects import ObjectPath, ReplacedError, as_object, connection, parse_place
from featstore.store import shards
from featstore.store.reader import ShardedArray
from featstore.store.remote import ObjectCache


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


@pytest.fixture
def root(server: Server) -> ObjectPath:
    return server.prefix()


class TestNames:
    def test_a_path_is_its_text(self) -> None:
        path = ObjectPath.parse("s3://bucket/a/b.json")
        assert str(path) == path.as_posix() == "s3://bucket/a/b.json"
        assert repr(path) == "ObjectPath('s3://bucket/a/b.json')"
        assert (path.name, path.stem, path.suffix) == ("b.json", "b", ".json")
        assert path.parent == ObjectPath("bucket", "a")
        assert [str(parent) for parent in path.parents] == ["s3://bucket/a", "s3://bucket"]
        assert str(path.with_name("c")) == "s3://bucket/a/c"
        assert str(path.with_suffix(".parquet")) == "s3://bucket/a/b.parquet"
        assert path.relative_to(ObjectPath("bucket")).as_posix() == "a/b.json"
        assert str(path / "x" / "y") == "s3://bucket/a/b.json/x/y"
        assert pickle.loads(pickle.dumps(path)) == path
        assert {path: 1}[ObjectPath("bucket", "a/b.json")] == 1
        assert path != "s3://bucket/a/b.json"
        assert sorted([ObjectPath("b", "z"), ObjectPath("b", "a")])[0].name == "a"

    @pytest.mark.parametrize("text", ["s3://bucket", "s3://bucket/", "s3://bucket//"])
    def test_a_whole_bucket_has_no_key(self, text: str) -> None:
        assert str(ObjectPath.parse(text)) == "s3://bucket"
        assert not ObjectPath.parse(text).is_file()

    @pytest.mark.parametrize("text", ["s3://", "s3://Bucket/a", "s3://bucket/../x", "gs://bucket"])
    def test_what_is_no_object_store(self, text: str) -> None:
        with pytest.raises(ConfigError, match="an object store is given as s3://BUCKET/PREFIX, got"):
            ObjectPath.parse(text)

    def test_places(self, tmp_path: Path) -> None:
        assert as_object(parse_place("s3://bucket/a")) == ObjectPath("bucket", "a")
        assert as_object(parse_place("s3:/bucket/a")) == ObjectPath("bucket", "a")  # as pathlib spells it
        assert parse_place(str(tmp_path)) == tmp_path
        assert as_object(tmp_path) is None
        with pytest.raises(ConfigError, match="a store is a folder or s3://BUCKET/PREFIX, got 'gs://x'"):
            parse_place("gs://x")


class TestObjects:
    def test_what_is_put_is_read(self, root: ObjectPath) -> None:
        path = root / "a" / "b"
        assert not path.exists()
        assert not path.is_file()
        with pytest.raises(FileNotFoundError, match="no such object"):
            path.read_bytes()
        with pytest.raises(FileNotFoundError, match="no such object"):
            path.stat()
        path.put(b"one")
        before = time.time()
        assert (path.read_bytes(), path.read_text(), path.stat().st_size) == (b"one", "one", 3)
        assert abs(path.stat().st_mtime - before) < 60
        assert (path.is_file(), path.exists(), path.is_dir()) == (True, True, False)
        assert (root.is_dir(), (root / "a").exists(), (root / "a").is_file()) == (True, True, False)
        path.put(b"two")
        assert path.read_bytes() == b"two"
        path.unlink()
        path.unlink()
        assert not root.is_dir()

    def test_a_name_is_taken_once(self, root: ObjectPath) -> None:
        assert (root / "a").put_new(b"one")
        assert not (root / "a").put_new(b"two")
        assert (root / "a").read_bytes() == b"one"

    def test_an_object_is_replaced_only_while_it_is_the_one_that_was_read(self, root: ObjectPath) -> None:
        path = root / "a"
        path.put(b"one")
        data, tag = path.read_tagged()
        assert (data, tag) == (b"one", path.stat().e_tag)
        assert path.put_over(b"two", tag)
        assert not path.put_over(b"three", tag)
        assert path.read_bytes() == b"two"
        assert not (root / "none").put_over(b"four", tag)
        assert not (root / "none").exists()

    def test_of_many_at_once_one_wins(self, root: ObjectPath) -> None:
        won: list[int] = []
        barrier = threading.Barrier(8)

        def race(number: int) -> None:
            barrier.wait()
            if (root / "a").put_new(b"%d" % number):
                won.append(number)

        threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [b"%d" % number for number in won] == [(root / "a").read_bytes()]

    def test_ranges(self, root: ObjectPath) -> None:
        path, data = root / "a", bytes(range(256)) * 4
        path.put(data)
        tag = path.stat().e_tag
        assert path.read_range(250, 260, tag) == data[250:260]
        assert path.read_range(0, 1024) == data
        assert path.read_range(5, 5) == b""
        with pytest.raises(StoreError, match="20 bytes asked for, 10 came; run it again"):
            path.read_range(1014, 1034)
        path.put(data[::-1])
        with pytest.raises(ReplacedError, match="the object was replaced while it was read; open it again"):
            path.read_range(0, 5, tag)

    def test_a_reader_seeks(self, root: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("featstore.objects.PIECE_BYTES", 100)
        path, data = root / "a", bytes(range(250)) * 4
        path.put(data)
        with path.open() as file:
            assert (file.readable(), file.seekable()) == (True, True)
            assert file.seek(0, 2) == 1000
            assert file.read() == b""
            file.seek(95)
            assert (file.read(10), file.tell()) == (data[95:105], 105)
            file.seek(3)
            buffer = bytearray(300)
            assert (file.readinto(buffer), bytes(buffer)) == (300, data[3:303])
            assert file.read() == data[303:]
        assert b"".join(path.pieces(path.stat())) == data
        assert bytes(files.read_large(parse_place(str(path)))) == data

    def test_listings(self, root: ObjectPath) -> None:
        names = ["x.json", "d/1/spec.json", "d/2/spec.json", "d/2/other.json", "d/spec.json", "e/.hid/spec.json"]
        for name in names:
            (root / name).put(name.encode())

        def found(paths: list[ObjectPath]) -> list[str]:
            return [path.relative_to(root).as_posix() for path in paths]

        assert found(list(root.iterdir())) == ["d", "e", "x.json"]
        assert found(root.glob("*/*/spec.json")) == ["d/1/spec.json", "d/2/spec.json", "e/.hid/spec.json"]
        assert found(root.glob("d/*")) == ["d/1", "d/2", "d/spec.json"]
        assert found(root.glob("d/*/*.json")) == ["d/1/spec.json", "d/2/other.json", "d/2/spec.json"]
        assert found(root.glob("*.json")) == ["x.json"]
        assert found(root.glob("none/*")) == []
        assert found(root.rglob("*.json")) == sorted(names)
        assert found(root.rglob("other*")) == ["d/2/other.json"]
        folders, objects = (root / "d").listing()
        assert (found(folders), {path.name: facts.st_size for path, facts in objects.items()}) == (
            ["d/1", "d/2"],
            {"spec.json": 11},
        )
        (root / "d").remove_below()
        assert found(root.rglob("*")) == ["e/.hid/spec.json", "x.json"]
        (root / "none").remove_below()

    @pytest.mark.slow
    def test_a_listing_of_several_pages(self, root: ObjectPath) -> None:
        for number in range(1005):
            (root / "many" / f"{number:04d}").put(b"1")
        assert len(list((root / "many").walk())) == len((root / "many").listing()[1]) == 1005
        (root / "many").remove_below()
        assert not (root / "many").is_dir()


class TestErrors:
    def test_a_bucket_that_does_not_exist(self, server: Server) -> None:
        missing = ObjectPath.parse("s3://nobucket/a")
        what = r"s3://nobucket/a: the bucket 'nobucket' does not exist; create it, or check its name and AWS_ENDPOINT"
        for call in (missing.read_bytes, lambda: missing.put(b"1"), lambda: list(missing.walk()), missing.listing):
            with pytest.raises(StoreError, match=what):
                call()

    @pytest.mark.parametrize(
        ("status", "what"),
        [(403, "access denied; check AWS_ACCESS_KEY_ID"), (400, "the object store cannot be used")],
    )
    def test_what_the_server_answers_is_told(self, server: Server, root: ObjectPath, status: int, what: str) -> None:
        with server.answering(status), pytest.raises(StoreError, match=what):
            (root / "a").read_bytes()
        with server.answering(status), pytest.raises(StoreError, match=what):
            (root / "a").put(b"1")

    def test_errors_that_pass_are_tried_again(self, server: Server, root: ObjectPath) -> None:
        with server.answering(503, times=2):
            (root / "a").put(b"1")
        with server.answering(500, times=2):
            assert (root / "a").read_bytes() == b"1"

    def test_a_refused_connection_is_told_soon(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        started = time.monotonic()
        with pytest.raises(StoreError, match=r"the object store cannot be used .*; check AWS_ENDPOINT_URL"):
            ObjectPath("bucket", "a").read_bytes()
        assert time.monotonic() - started < 12

    def test_a_connection_belongs_to_its_variables(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        first = connection("bucket")
        assert connection("bucket") is first
        monkeypatch.setenv("AWS_REGION", "eu-central-1")
        assert connection("bucket") is not first

    def test_without_obstore(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        import sys

        monkeypatch.setitem(sys.modules, "obstore.store", None)
        monkeypatch.setenv("AWS_REGION", "eu-north-1")
        with pytest.raises(StoreError, match=r"need the package obstore: pip install 'featstore\[remote\]'"):
            connection("bucket")


class TestFiles:
    """What files.py promises, in a bucket."""

    def test_replacing_and_first_wins(self, root: ObjectPath) -> None:
        place = parse_place(str(root))
        files.make_folder(place / "d")
        files.sync_folder(place / "d")
        assert not place.exists()
        files.write_atomic(place / "a", b"one")
        files.write_atomic(place / "a", b"two")
        assert (place / "a").read_bytes() == b"two"
        assert files.create_exclusive(place / "b", b"one")
        assert not files.create_exclusive(place / "b", b"two")
        assert files.link_kept(place / "a", place / "c")
        assert not files.link_kept(place / "b", place / "c")
        assert (place / "c").read_bytes() == b"two"
        with pytest.raises(FileNotFoundError, match="no such object"):
            files.link_kept(place / "gone", place / "new")

    def test_a_replacement_needs_the_version_that_was_seen(self, root: ObjectPath) -> None:
        place = parse_place(str(root))
        files.write_atomic(place / "source", b"new")
        files.write_atomic(place / "final", b"old")
        seen = files.version(place / "final")
        files.write_atomic(place / "final", b"other")
        files.replace_kept(place / "source", place / "final", seen)
        assert (place / "final").read_bytes() == b"other"
        files.replace_kept(place / "source", place / "final", files.version(place / "final"))
        assert (place / "final").read_bytes() == b"new"
        assert files.version(place / "none") == ""
        files.replace_kept(place / "source", place / "none", "")
        assert (place / "none").read_bytes() == b"new"

    def test_uploading_dating_and_removing(self, root: ObjectPath, tmp_path: Path) -> None:
        place = parse_place(str(root))
        for target in (place, tmp_path / "store"):
            (tmp_path / "file").write_bytes(b"12345")
            files.upload(tmp_path / "file", target / "t" / "a")
            files.upload(tmp_path / "file", target / "t" / "b")
            assert all(time.time() - when < 60 for when in files.modified(target / "t").values())
            files.remove_tree(target / "t", first="a")
            assert not (target / "t").exists()


@pytest.fixture
def cache(tmp_path: Path) -> ObjectCache:
    return ObjectCache(tmp_path / "cache")


def bucket_array(root: ObjectPath, rows: int, dim: int = 700, *, chunk: int = 16, shard: int = 1024) -> np.ndarray:
    """An array in the bucket; shards of 1.4 MB, so that a few rows of one are read by their chunks."""
    values = np.random.default_rng(rows).standard_normal((rows, dim)).astype(np.float16)
    metadata = shards.array_metadata(
        num_rows=rows, row_shape=(dim,), dtype="float16", chunk_rows=chunk, shard_rows=shard, attributes={}
    )
    (root / "zarr.json").put(json.dumps(metadata).encode())
    for number in range(-(-rows // shard)):
        put_shard(root, number, values[number * shard : (number + 1) * shard], chunk, shard)
    return values


def put_shard(root: ObjectPath, number: int, rows: np.ndarray, chunk: int = 16, shard: int = 1024) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with shards.ShardWriter(
            Path(folder) / "shard", row_shape=rows.shape[1:], dtype="float16", chunk_rows=chunk, shard_rows=shard
        ) as writer:
            writer.append(rows)
        (root / shards.shard_key(number, rows.ndim)).put((Path(folder) / "shard").read_bytes())


def flipped(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1
    return bytes(changed)


def flip(path: ObjectPath, position: int) -> None:
    path.put(flipped(path.read_bytes(), position))


def opened(root: ObjectPath, cache: ObjectCache) -> ShardedArray:
    return ShardedArray(parse_place(str(root)), cache)


class TestReading:
    @pytest.mark.parametrize("rows", [1, 16, 2500])
    def test_every_way_of_reading_gives_the_same(self, root: ObjectPath, cache: ObjectCache, rows: int) -> None:
        truth = bucket_array(root, rows)
        array = opened(root, cache)
        assert (array.shape, str(array.dtype), array.chunk_rows, array.is_mapped) == (truth.shape, "float16", 16, True)
        few = np.array([rows - 1, 0, rows // 2, 0, -1])
        np.testing.assert_array_equal(array.gather(few), truth[few])  # chunk by chunk where shards are large
        np.testing.assert_array_equal(array[rows - 1], truth[-1])
        np.testing.assert_array_equal(array[rows // 3 : rows // 2], truth[rows // 3 : rows // 2])
        np.testing.assert_array_equal(array.load(verify=True), truth)
        everything = np.random.default_rng(0).integers(-rows, rows, 3 * rows)
        out = np.empty((3 * rows, 700), np.float16)
        assert array.gather(everything, out, verify=True) is out
        np.testing.assert_array_equal(out, truth[everything])
        np.testing.assert_array_equal(array[::7, 3], truth[::7, 3])
        np.testing.assert_array_equal(array.gather([]), truth[:0])
        again = pickle.loads(pickle.dumps(array))
        np.testing.assert_array_equal(again[:3], truth[:3])
        array.close()
        with pytest.raises(StoreError, match="is closed; open it again"):
            array.load()

    def test_few_rows_take_their_chunks_only_and_many_the_shard(
        self, server: Server, root: ObjectPath, cache: ObjectCache
    ) -> None:
        truth = bucket_array(root, 2500)
        array = opened(root, cache)
        array.gather([0])
        for number in range(9):  # neighbours come in one request
            rows = np.array([40, 30, 20]) + 64 * number
            with server.counting() as requests:
                np.testing.assert_array_equal(array.gather(rows), truth[rows])
            if number < 4:
                assert len(requests) == 1
                assert not cache.folder.exists()
        assert len(list(cache.folder.iterdir())) == 1  # asked for so often, the shard was fetched
        with server.counting() as requests:
            np.testing.assert_array_equal(array.gather(np.arange(1024)), truth[:1024])
        assert requests == []

    def test_what_is_in_the_cache_needs_no_bucket(self, server: Server, root: ObjectPath, cache: ObjectCache) -> None:
        truth = bucket_array(root, 1500)
        array = opened(root, cache)
        array.load()
        with server.answering(403):
            np.testing.assert_array_equal(array.load(), truth)
            np.testing.assert_array_equal(array.gather([5, 1400]), truth[[5, 1400]])

    @pytest.mark.parametrize("few", [True, False], ids=["chunks", "whole"])
    def test_a_damaged_object_is_found(self, root: ObjectPath, cache: ObjectCache, few: bool) -> None:
        truth = bucket_array(root, 2500)
        flip(root / "c" / "1" / "0", 5)
        array = opened(root, cache)
        rows = np.array([1024]) if few else np.arange(2500)
        with pytest.raises(CorruptError, match=rf"shard {root}/c/1/0, chunk 0 .*: checksum is 0x"):
            array.gather(rows)
        np.testing.assert_array_equal(array.gather([3, 2499]), truth[[3, 2499]])
        assert not any(path.name.endswith(".partial") for path in cache.folder.glob("*"))
        flip(root / "c" / "0" / "0", -2)
        with pytest.raises(CorruptError, match=rf"shard {root}/c/0/0: index checksum is 0x"):
            opened(root, ObjectCache(cache.folder / "other")).gather(rows - 1024 if few else rows)

    def test_missing_shards_and_rows(self, root: ObjectPath, cache: ObjectCache) -> None:
        truth = bucket_array(root, 2500)
        put_shard(root, 2, truth[2048:2100])
        with pytest.raises(CorruptError, match=rf"rows 2112 to 2499 of {root} are not on disk: shard c/2/0 holds 4"):
            opened(root, cache).gather([2400])
        with pytest.raises(CorruptError, match=rf"rows 2112 to 2499 of {root} are not on disk: shard c/2/0 holds 4"):
            opened(root, cache).load()
        (root / "c" / "2" / "0").unlink()
        array = opened(root, cache)
        for call in (array.load, lambda: array.gather([2400])):
            with pytest.raises(CorruptError, match=rf"rows 2048 to 2499 of {root} are not on disk: shard c/2/0 is mis"):
                call()  # type: ignore[no-untyped-call]
        put_shard(root, 2, truth[2048:])  # written since
        np.testing.assert_array_equal(array.load(), truth)

    def test_a_changed_object_is_not_served_stale(self, root: ObjectPath, cache: ObjectCache) -> None:
        truth = bucket_array(root, 2500)
        array = opened(root, cache)
        array.load()
        few = opened(root, ObjectCache(cache.folder / "few"))
        few.gather([0])
        other = truth[:1024] + np.float16(1)
        put_shard(root, 0, other)
        np.testing.assert_array_equal(opened(root, cache).gather(np.arange(1024)), other)
        np.testing.assert_array_equal(few.gather([7]), other[[7]])  # while it is open

    def test_the_cache_is_bounded_by_least_recent_use(self, root: ObjectPath, tmp_path: Path) -> None:
        truth = bucket_array(root, 8 * 64, chunk=16, shard=64)
        size = (root / "c" / "0" / "0").stat().st_size
        cache = ObjectCache(tmp_path / "cache", limit=3 * size)
        array = opened(root, cache)
        for first in range(0, 512, 64):
            array[first : first + 64]
            opened(root, cache)[0:64]  # used again and again
            time.sleep(0.01)
        held = sum(path.stat().st_size for path in cache.folder.iterdir())
        assert held <= 3 * size
        zero = root / "c" / "0" / "0"
        assert cache.find(zero, str(zero.stat().e_tag)) is not None
        np.testing.assert_array_equal(array.load(), truth)  # maps outlive their files' names
        small = ObjectCache(tmp_path / "small", limit=1)
        np.testing.assert_array_equal(opened(root, small).load(), truth)

    def test_a_damaged_file_of_the_cache_is_fetched_again(self, root: ObjectPath, cache: ObjectCache) -> None:
        truth = bucket_array(root, 64, chunk=16, shard=64)
        opened(root, cache).load()
        (path,) = cache.folder.iterdir()
        path.write_bytes(path.read_bytes()[:-1])
        np.testing.assert_array_equal(opened(root, cache).load(), truth)
        raw = path.read_bytes()
        for position in (-1, 5):  # index, first chunk
            for array in (opened(root, cache), opened(root, cache)):
                path.write_bytes(flipped(raw, position))
                np.testing.assert_array_equal(array.load(verify=True), truth)
                np.testing.assert_array_equal(array.gather([3, 0], verify=True), truth[[3, 0]])
                assert path.read_bytes() == raw

    def test_a_cache_on_a_bad_disk(self, root: ObjectPath, cache: ObjectCache, monkeypatch: pytest.MonkeyPatch) -> None:
        bucket_array(root, 64, chunk=16, shard=64)
        fetch = cache.fetch

        def bad(*args: Any) -> Path:
            path = fetch(*args)
            path.write_bytes(flipped(path.read_bytes(), 5))
            return path

        monkeypatch.setattr(cache, "fetch", bad)
        with pytest.raises(CorruptError, match=r"its copy in the read cache was damaged twice, .*; check the disk of"):
            opened(root, cache).load(verify=True)

    def test_a_cache_that_cannot_be_written(self, root: ObjectPath, tmp_path: Path) -> None:
        bucket_array(root, 64, chunk=16, shard=64)
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(StoreError, match=r"the read cache cannot be written \(.*\); free space there, or set XDG"):
            opened(root, ObjectCache(tmp_path / "file")).load()

    def test_zarr_opens_it_and_what_zarr_wrote_is_read(self, root: ObjectPath) -> None:
        import zarr
        from obstore.store import S3Store
        from zarr.storage import ObjectStore

        truth = bucket_array(root / "ours", 100, chunk=16, shard=64)
        store: Any = ObjectStore(S3Store("bucket", client_options={"allow_http": True}))
        held = zarr.open_array(store, path=str((root / "ours").key), mode="r")
        np.testing.assert_array_equal(held[:], truth)
        made = zarr.create_array(store, name=str((root / "zarr").key), shape=(50, 7), chunks=(8, 7), dtype="float32")
        made[:] = np.arange(350, dtype=np.float32).reshape(50, 7)
        array = ShardedArray(parse_place(str(root / "zarr")))
        assert not array.is_mapped
        np.testing.assert_array_equal(array.gather([49, 3]), np.arange(350).reshape(50, 7)[[49, 3]])


class TestWhatElseIsWritten:
    def test_imported_features(self, root: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        from featstore.store.importer import import_features

        place = parse_place(str(root))
        features = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
        np.savez(tmp_path / "x.npz", features=features, ids=np.array(list("abcde")))
        store, _, held = import_features(place, tmp_path / "x.npz", dataset="mine", model="other")
        assert held == 5
        np.testing.assert_array_equal(store.set("mine/other").load("cls"), features)

    def test_records(self, root: ObjectPath) -> None:
        from probes.records import load_predictions, load_records, save_record

        home = parse_place(str(root)) / "results"
        path = save_record(home, {"task": "t", "store": root}, {"id": ["a", "b"]})
        (record,) = load_records(home, task="t")
        assert (record["file"], record["store"]) == (str(path), str(root))
        assert load_predictions(record).column("id").to_pylist() == ["a", "b"]
        path.with_suffix(".parquet").unlink()
        with pytest.raises(CorruptError, match="the predictions of this record are missing"):
            load_predictions(record)
