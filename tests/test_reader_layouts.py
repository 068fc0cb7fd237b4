"""The reader beside zarr-python and tensorstore: other layouts and writers; probes, speed; the benchmark runs."""

import json
import mmap
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from shard_arrays import damage, same, store, values
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

from featstore.errors import ConfigError, CorruptError, StoreError
from featstore.store import mapped
from featstore.store.bfloat16 import register
from featstore.store.reader import ShardedArray
from featstore.store.shards import ShardWriter, array_metadata

ROOT = Path(__file__).resolve().parent.parent


def foreign(path: Path, rows: np.ndarray, **options: Any) -> None:
    register()
    settings = {"chunks": (4, *rows.shape[1:]), "fill_value": 0, **options}
    zarr.create_array(path, shape=rows.shape, dtype=rows.dtype, **settings)[...] = rows


FOREIGN: dict[str, dict[str, Any]] = {
    "unsharded, compressed": {},
    "unsharded, plain": {"compressors": None},
    "sharded, compressed": {"shards": (16, 6), "compressors": [ZstdCodec(level=1), Crc32cCodec()]},
    "sharded without checksums": {"shards": (16, 6), "compressors": None},
    "cut along axis 1": {"chunks": (4, 3), "shards": (16, 6), "compressors": [Crc32cCodec()]},
    "dotted keys": {"shards": (16, 6), "compressors": [Crc32cCodec()], "chunk_key_encoding": {"name": "v2"}},
    "keys of version 2": {
        "shards": (16, 6),
        "compressors": [Crc32cCodec()],
        "chunk_key_encoding": {"name": "v2", "separator": "/"},
    },
    "index first": {
        "chunks": (16, 6),
        "compressors": None,
        "serializer": ShardingCodec(chunk_shape=(4, 6), codecs=[BytesCodec(), Crc32cCodec()], index_location="start"),
    },
    "big end first": {
        "chunks": (16, 6),
        "compressors": None,
        "serializer": ShardingCodec(chunk_shape=(4, 6), codecs=[BytesCodec(endian="big"), Crc32cCodec()]),
    },
}


class TestOtherLayouts:
    @pytest.mark.parametrize("name", FOREIGN)
    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
    def test_other_layouts_give_the_same_rows(self, tmp_path: Path, name: str, dtype: Any) -> None:
        truth = values(37, (6,), dtype)
        foreign(tmp_path / "a", truth, **FOREIGN[name])
        array = pickle.loads(pickle.dumps(ShardedArray(tmp_path / "a")))
        assert not array.is_mapped
        assert (array.chunk_rows, array.dtype) == (4, truth.dtype)
        for key in (0, -1, slice(3, 30), slice(None, None, -3), [36, 0, 5, 5, -2], np.arange(37) % 3 == 0, (..., 2)):
            same(array[key], truth[key])
        same(array.load(), truth)
        out = np.empty((3, 6), truth.dtype)
        assert array.gather([9, 1, 30], out) is out
        same(out, truth[[9, 1, 30]])
        with pytest.raises(IndexError, match="row 37 is out of range"):
            array[[37]]
        array.close()
        with pytest.raises(StoreError, match="is closed; open it again"):
            array.load()

    def test_verify_needs_checksums(self, tmp_path: Path) -> None:
        foreign(tmp_path / "a", values(37))
        with pytest.raises(ConfigError, match="was written without checksums, nothing can be verified; drop verify"):
            ShardedArray(tmp_path / "a").gather([1], verify=True)

    def test_verify_finds_what_zarr_finds(self, tmp_path: Path) -> None:
        foreign(tmp_path / "a", values(37), compressors=[Crc32cCodec()])
        same(ShardedArray(tmp_path / "a").load(verify=True), values(37))
        damage(tmp_path / "a/c/2/0", 5)
        array = ShardedArray(tmp_path / "a")
        same(array.gather([0, 36], verify=True), values(37)[[0, 36]])
        with pytest.raises(CorruptError, match=r"rows 8 to 8 of .*a cannot be decoded: .*checksum"):
            array.gather([8], verify=True)

    def test_shards_that_zarr_and_tensorstore_wrote_are_mapped(self, tmp_path: Path) -> None:
        truth = values(37)
        foreign(
            tmp_path / "zarr", truth, shards=(16, 6), compressors=[Crc32cCodec()], config={"write_empty_chunks": True}
        )
        metadata = array_metadata(
            num_rows=37, row_shape=(6,), dtype="float16", chunk_rows=4, shard_rows=16, attributes={}
        )
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/tensorstore/"}}
        tensorstore.open({**spec, "metadata": metadata, "create": True}).result()[...] = truth
        for writer in ("zarr", "tensorstore"):
            array = ShardedArray(tmp_path / writer)
            assert array.is_mapped
            same(array.load(verify=True), truth)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8, ml_dtypes.bfloat16])
    def test_zarr_and_tensorstore_read_what_we_read(self, tmp_path: Path, dtype: Any) -> None:
        register()
        truth = values(37, (3, 2), dtype)
        ours = store(tmp_path / "a", truth).load()
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/a/"}}
        same(ours, np.asarray(zarr.open_array(tmp_path / "a", mode="r")[:]))
        same(ours, tensorstore.open(spec).result().read().result())


class TestProbes:
    @pytest.mark.skipif(mapped._MINCORE is None or not mapped.HAVE_PREADV, reason="no mincore here")
    @pytest.mark.parametrize("refusal", mapped.REFUSALS)
    def test_maps_tell_what_is_in_memory_where_reads_cannot(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
    ) -> None:
        """As on tmpfs and NFS: asked once, remembered, and rows in memory are never advised."""
        truth = values(3000, (700,))
        array = store(tmp_path / "a", truth, chunk_rows=64, shard_rows=1024)
        array.gather(np.arange(3000))
        backend: Any = array._backend
        backend._refuses_nowait = False
        refused: list[int] = []
        advised: list[int] = []

        def refuse(*_: Any) -> int:
            refused.append(1)
            raise OSError(refusal, "refused")

        monkeypatch.setattr(mapped, "HAVE_ADVICE", True)
        monkeypatch.setattr(mapped, "HAVE_NOWAIT", True)
        monkeypatch.setattr(os, "RWF_NOWAIT", 8, raising=False)
        monkeypatch.setattr(os, "preadv", refuse)
        monkeypatch.setattr(mapped.MappedRows, "_advise", lambda self, opened, shards, places: advised.append(1))
        rows = np.arange(0, 3000, 7)
        for _ in range(mapped.BATCHES_TO_WARM + 2):
            same(array.gather(rows), truth[rows])
        backend.prefetch(rows)
        assert (refused, advised) == ([1], [])
        assert backend._batches_to_warm == 0
        # Linux says of the files of others that every page is in memory: there, nothing is believed.
        for shard in backend._opened.shards.values():
            shard.tells_pages = False
        same(array.gather(rows), truth[rows])
        assert (refused, advised) == ([1], [1])
        assert backend._batches_to_warm == mapped.BATCHES_TO_WARM

    @pytest.mark.skipif(mapped._MINCORE is None, reason="no mincore here")
    def test_maps_tell_each_page(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One page of a map was written, the others were never touched."""
        array = store(tmp_path / "a", values(3000, (700,)), chunk_rows=64, shard_rows=4096)
        array.gather(np.arange(3000))
        backend: Any = array._backend
        (held,) = backend._opened.shards.values()
        assert all(held.is_in_memory(offset) for offset in (0, 1, mmap.PAGESIZE, len(held.content) - 1))
        spare = mmap.mmap(-1, 64 * mmap.PAGESIZE)
        with suppress(OSError, AttributeError):  # kernels without huge pages
            spare.madvise(mmap.MADV_NOHUGEPAGE)
        spare[5 * mmap.PAGESIZE] = 1
        held.address = np.frombuffer(spare, np.uint8).__array_interface__["data"][0]
        assert [page for page in range(64) if held.is_in_memory(page * mmap.PAGESIZE + 17)] == [5]
        monkeypatch.setattr(mapped, "_MINCORE", lambda *_: -1)
        assert not held.is_in_memory(0)


def test_a_filter_that_keeps_much_is_read_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = values(1000, (50,))
    array = store(tmp_path / "a", truth, chunk_rows=16, shard_rows=128)
    monkeypatch.setattr(mapped, "DENSE_BYTES", 2000)  # pieces of ten rows
    monkeypatch.setattr(mapped.MappedRows, "_take", None)  # the other way is not gone
    rng = np.random.default_rng(0)
    for share in (0.3, 0.7, 1.0):
        rows = np.flatnonzero(rng.random(1000) < share)
        same(array.gather(rows), truth[rows])
        same(array.gather(rows, verify=True), truth[rows])
        out = np.empty((len(rows), 50), truth.dtype)
        array.gather(rows, out=out)
        same(out, truth[rows])
    rows = np.concatenate([np.arange(0, 40), np.arange(60, 100), [999]])[:-1]
    same(array.gather(rows), truth[rows])
    assert not mapped._is_dense(np.array([0, 8]))
    assert not mapped._is_dense(np.array([3, 2, 1, 0]))
    assert not mapped._is_dense(np.array([0, 0, 1]))
    assert mapped._is_dense(np.array([5]))


def ratios(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int, calls: int = 1) -> list[float]:
    """theirs / ours in seconds, each pair measured back to back, so that a busy machine slows both."""
    found = []
    for _ in range(repeats):
        seconds = []
        for call in (ours, theirs):
            start = time.perf_counter()
            for _ in range(calls):
                call()
            seconds.append(time.perf_counter() - start)
        found.append(seconds[1] / seconds[0])
    return found


def touch(array: ShardedArray, batch: int) -> None:
    """Enter every page in the page table, as in any long run; all rows in one gather would be read, not mapped."""
    for first in range(0, len(array), batch):
        array.gather(np.arange(first, min(len(array), first + batch)))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ShardedArray, Path]]:
    folder = tmp_path_factory.mktemp("large")
    # 100 MB in 256 chunks: with fewer, a stock reader that takes whole chunks has less to do for the same rows.
    rows = np.random.default_rng(0).integers(0, 15000, (65536, 768), np.uint16).view(np.float16)
    np.save(folder / "a.npy", rows)
    array = store(folder / "a", rows, chunk_rows=256, shard_rows=65536)
    touch(array, 1024)
    yield array, folder / "a.npy"
    array.close()


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ShardedArray, Path]]:
    folder = tmp_path_factory.mktemp("grids")
    rows = np.random.default_rng(0).integers(0, 15000, (256, 196, 384), np.uint16).view(np.float16)
    np.save(folder / "a.npy", rows)
    array = store(folder / "a", rows, chunk_rows=2, shard_rows=128)
    touch(array, 16)
    yield array, folder / "a.npy"
    array.close()


def evict(*paths: Path) -> None:
    """Drop files from the page cache; pages that are mapped stay."""
    for path in paths:
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def require_cold(path: Path) -> None:
    """Skip unless this file system tells, by a read that does not wait, that an emptied file is not in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.preadv(descriptor, [bytearray(1)], os.path.getsize(path) // 2, os.RWF_NOWAIT)
    except BlockingIOError:
        return
    except (OSError, AttributeError) as error:
        pytest.skip(f"this file system does not tell what is in memory: {error}")
    finally:
        os.close(descriptor)
    pytest.skip("this file system keeps its files in memory")


@pytest.mark.slow
def test_speed_without_checked_shapes() -> None:
    """The tests of `TestSpeed` in a process of their own: checks of every annotation cost more than a gather."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=-q --strict-markers", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"{__file__}::TestSpeed"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "MEASURE_SPEED": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)  # the cold ones are skipped on file systems in memory
    assert passed is not None, done.stdout
    assert int(passed[1]) >= 5, done.stdout


@pytest.mark.skipif("MEASURE_SPEED" not in os.environ, reason="measured in a process without checked shapes")
class TestSpeed:
    """Half of the floors of `benchmarks/bench_store.py`: medians of interleaved pairs, bad rounds measured again."""

    @staticmethod
    def hold(floor: float, measure: Callable[[], list[float]]) -> None:
        medians = []
        for _ in range(4):
            medians.append(statistics.median(measure()))
            if medians[-1] >= floor:
                return
        pytest.fail(f"medians of the ratio stayed below {floor}: {medians}")

    def test_gather(self, large: tuple[ShardedArray, Path]) -> None:
        array, npy = large
        plain = np.load(npy, mmap_mode="r")
        rows = np.random.default_rng(0).integers(0, len(array), (50, 256))
        batches = iter(np.tile(rows, (100, 1)))
        self.hold(0.2, lambda: ratios(lambda: array.gather(next(batches)), lambda: plain[next(batches)], 30, 5))

    def hold_cold(self, floor: float, large: tuple[ShardedArray, Path], tmp_path: Path, rows: np.ndarray) -> None:
        """Opening included, no page in memory; of copies, because the maps of the others hold their pages."""
        array, npy = large
        shutil.copytree(array.path, tmp_path / "a")
        shutil.copy(npy, tmp_path / "a.npy")
        evict(tmp_path)
        require_cold(tmp_path / "a.npy")

        def pairs() -> list[float]:
            found = []
            for _ in range(5):
                evict(tmp_path)
                found += ratios(
                    lambda: ShardedArray(tmp_path / "a").gather(rows),
                    lambda: np.load(tmp_path / "a.npy", mmap_mode="r")[rows],
                    1,
                )
            return found

        self.hold(floor, pairs)

    @pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the page cache cannot be emptied here")
    def test_cold_gather(self, large: tuple[ShardedArray, Path], tmp_path: Path) -> None:
        self.hold_cold(1.5, large, tmp_path, np.random.default_rng(0).integers(0, len(large[0]), 256))

    @pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the page cache cannot be emptied here")
    def test_cold_grids(self, grids: tuple[ShardedArray, Path], tmp_path: Path) -> None:
        self.hold_cold(0.5, grids, tmp_path, np.random.default_rng(0).integers(0, len(grids[0]), 16))

    def test_grids(self, grids: tuple[ShardedArray, Path]) -> None:
        array, npy = grids
        plain = np.load(npy, mmap_mode="r")
        batches = iter(np.random.default_rng(0).integers(0, len(array), (1000, 16)))
        self.hold(0.25, lambda: ratios(lambda: array.gather(next(batches)), lambda: plain[next(batches)], 30, 2))

    def test_write(self, tmp_path: Path) -> None:
        """One shard of 25 MB on disk for good, against plain writes of the same batches."""
        rows = np.random.default_rng(0).integers(0, 15000, (16384, 768), np.uint16).view(np.float16)
        batches = [rows[first : first + 512] for first in range(0, len(rows), 512)]
        names = iter(range(1000))

        def ours() -> None:
            path = tmp_path / f"ours{next(names)}"
            with ShardWriter(path, row_shape=(768,), dtype="float16", chunk_rows=256, shard_rows=16384) as writer:
                for batch in batches:
                    writer.append(batch)
            path.unlink()

        def plain() -> None:
            with open(tmp_path / "plain", "wb", buffering=0) as file:
                for batch in batches:
                    file.write(batch.view(np.uint8).data)
                os.fsync(file.fileno())
            (tmp_path / "plain").unlink()

        self.hold(0.22, lambda: ratios(ours, plain, 7))

    def test_gather_against_zarr(self, large: tuple[ShardedArray, Path]) -> None:
        array, _ = large
        stock = zarr.open_array(array.path, mode="r")
        rows = np.sort(np.random.default_rng(0).choice(len(array), 256, replace=False))
        self.hold(50, lambda: ratios(lambda: array.gather(rows), lambda: stock.oindex[rows], 3))

    def test_load(self, large: tuple[ShardedArray, Path]) -> None:
        array, npy = large
        self.hold(0.42, lambda: ratios(array.load, lambda: np.load(npy), 7))

    def test_opening_is_flat_in_rows(self, tmp_path: Path) -> None:
        store(tmp_path / "few", values(16))
        store(tmp_path / "many", values(16), num_rows=10**6)
        self.hold(
            0.3, lambda: ratios(lambda: ShardedArray(tmp_path / "many"), lambda: ShardedArray(tmp_path / "few"), 20)
        )


def test_reading_our_layout_imports_neither_zarr_nor_torch(tmp_path: Path) -> None:
    store(tmp_path / "a", values(37))
    code = f"""
import sys
from featstore.store.reader import ShardedArray
assert ShardedArray({str(tmp_path / "a")!r}).load().shape == (37, 6)
assert not {{"zarr", "torch", "ml_dtypes"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    "rivals",
    [
        ["zarr_oindex"],
        pytest.param([], marks=pytest.mark.slow, id="all"),
    ],
)
def test_the_benchmark_runs(tmp_path: Path, rivals: list[str]) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/bench_store.py"), "--quick"]
    command += ["--output", str(tmp_path / "results"), *(f"--rival={name}" for name in rivals)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    record = json.loads(line)
    (file,) = (tmp_path / "results").iterdir()
    assert json.loads(file.read_text()) == record
    assert file.name.startswith("store-")
    assert record["quick"] is True
    cases = record["results"]["cases"]
    for case in ("gather_warm", "gather_cold", "load_warm", "slice_warm", "grids_gather_warm", "write_synced"):
        assert cases[case]["ours"]["median_seconds"] > 0
    assert cases["gather_warm"]["ours"]["speed_to_zarr_oindex"] > 0
    assert cases["load_warm"].keys() >= {"np_load", "ours", "zarr_oindex"}
    floors = record["results"]["floors"]
    assert len(floors) == 7
    for floor in floors:
        assert floor["holds"] == (floor["speed"] >= floor["floor"])
        assert re.search(rf"{floor['case']} against {floor['rival']}: .*x, floor {floor['floor']}x", done.stderr)


def test_the_benchmark_knows_its_rivals(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/bench_store.py"), "--quick", "--rival", "sqlite"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "unknown rival 'sqlite'; known: numpy, ours," in done.stderr
