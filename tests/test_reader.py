"""The mapped reader against numpy's own indexing, on every system it may meet; damage, threads, descriptors."""

import gc
import mmap
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_arrays import damage, same, store, values

from featstore.errors import ConfigError, CorruptError, StoreError
from featstore.store import mapped
from featstore.store.mapped import MappedRows
from featstore.store.reader import ShardedArray
from featstore.store.shards import ShardWriter


@pytest.fixture(params=["as is", "no preadv", "no advice", "no probes", "bare", "large rows"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Operating systems without this or that; the last one takes the path of rows beyond the window."""
    name = str(request.param)
    monkeypatch.setattr(mapped, "HAVE_PREADV", mapped.HAVE_PREADV and name not in ("no preadv", "bare"))
    monkeypatch.setattr(mapped, "HAVE_ADVICE", mapped.HAVE_ADVICE and name not in ("no advice", "bare"))
    monkeypatch.setattr(mapped, "HAVE_NOWAIT", mapped.HAVE_NOWAIT and name not in ("no probes", "bare"))
    monkeypatch.setattr(mapped, "_MINCORE", None if name == "bare" else mapped._MINCORE)
    if name == "large rows":
        monkeypatch.setattr(mapped, "WINDOW_ROW_BYTES", 0)
    return name


def keys(num_rows: int) -> st.SearchStrategy[Any]:
    """What picks rows: integers, slices, lists and arrays (any order, duplicates, negative, two axes), masks."""
    numbers = st.integers(-num_rows, num_rows - 1)
    lists = st.lists(numbers, max_size=12)
    bounds = st.none() | st.integers(-num_rows - 3, num_rows + 3)
    slices = st.builds(slice, bounds, bounds, st.none() | st.integers(-5, 5).filter(bool))
    arrays = lists.map(lambda rows: np.array(rows, np.int64)) | lists.filter(bool).map(
        lambda rows: np.array(rows, np.int8)
    )
    grids = st.lists(numbers, min_size=6, max_size=6).map(lambda rows: np.array(rows).reshape(2, 3))
    masks = st.lists(st.booleans(), min_size=num_rows, max_size=num_rows).map(np.array)
    return numbers | numbers.map(np.int32) | slices | lists.filter(bool) | arrays | grids | masks | st.just(Ellipsis)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[ShardedArray, np.ndarray]]:
    folder = tmp_path_factory.mktemp("arrays")
    shapes = [(37, 6), (37, 3, 2), (37,), (5, 1), (16, 2, 1, 2), (1, 6)]
    truths = [values(shape[0], shape[1:]) for shape in shapes]
    truths += [values(37, (3,), np.int8), values(37, (5,), np.float64), values(37, (3,), ml_dtypes.bfloat16)]
    return [(store(folder / str(number), truth), truth) for number, truth in enumerate(truths)]


class TestIndexing:
    @settings(max_examples=300, deadline=None)
    @given(data=st.data())
    def test_rows_are_those_of_numpy(self, arrays: list[tuple[ShardedArray, np.ndarray]], data: st.DataObject) -> None:
        array, truth = data.draw(st.sampled_from(arrays))
        key = data.draw(keys(len(truth)))
        same(array[key], np.array(truth[key])[()] if np.ndim(truth[key]) == 0 else truth[key])

    @pytest.mark.parametrize(
        "key",
        [
            (3, 1),
            (3, ...),
            (..., 1),
            (slice(2, 30, 7), 1),
            ([1, 20, 1], slice(None), 0),
            ([1, 20], [0, 2], 1),
            (5, slice(None), [1, 0]),
            (np.arange(37) % 5 == 0, [0, 1, 2, 0, 1, 2, 0, 1], 0),
            ([[1], [2]], [[0, 2]], 0),
            (..., np.array([[True, False]] * 3)),
            (Ellipsis, 4, 1, 1),
            (-1, -1, -1),
            (),
            (slice(None), slice(None), slice(None, None, -1)),
        ],
    )
    def test_further_axes_are_numpys(self, tmp_path: Path, key: Any) -> None:
        truth = values(37, (3, 2))
        same(store(tmp_path / "a", truth)[key], truth[key])

    def test_parts_of_rows_do_not_keep_the_rows(self, tmp_path: Path) -> None:
        array = store(tmp_path / "a", values(37, (3, 2)))
        assert array[:, 0].base is None
        assert array[4, 0].base is None

    @pytest.mark.parametrize("row", [37, -38, 10**12, np.int64(37)])
    def test_one_row_out_of_range(self, tmp_path: Path, row: int) -> None:
        array = store(tmp_path / "a", values(37))
        message = rf"row {row} is out of range for an array of 37 rows; give -37 to 36"
        with pytest.raises(IndexError, match=message):
            array[row]
        with pytest.raises(IndexError, match=message):
            array[[0, row, 1]]
        with pytest.raises(IndexError, match=message):
            array.gather(np.array([[row]]).ravel())

    def test_unsigned_rows_do_not_wrap(self, tmp_path: Path) -> None:
        array = store(tmp_path / "a", values(37))
        same(array[np.array([3, 1], np.uint8)], values(37)[[3, 1]])
        with pytest.raises(IndexError, match="row 18446744073709551615 is out of range"):
            array[np.array([2**64 - 1], np.uint64)]

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ([0.5], "rows are picked by integers, slices, integer lists or a mask, got float64"),
            ("cls", "rows are picked by integers, slices, integer lists or a mask, got str"),
            (1.0, "integer lists or a mask, got float"),
            (None, "new axes cannot be made while reading; index first"),
            (True, "one truth value picks no rows; give a mask"),
            (np.ones(36, bool), r"a mask of shape \(37,\) must come, got \(36,\)"),
            ((0, 0, 0), "too many indices"),
        ],
    )
    def test_keys_that_pick_no_rows(self, tmp_path: Path, key: Any, message: str) -> None:
        with pytest.raises(IndexError, match=message):
            store(tmp_path / "a", values(37))[key]

    def test_an_array_without_rows(self, tmp_path: Path) -> None:
        array = store(tmp_path / "a", values(0))
        assert len(array) == 0
        for found in (array[:], array[[]], array.load(), array.gather([]), array[np.ones(0, bool)], array[::-1]):
            same(found, values(0))
        with pytest.raises(IndexError, match="row 0 is out of range for an array of 0 rows; it has none"):
            array[0]

    def test_numpy_takes_the_array_whole(self, tmp_path: Path) -> None:
        array = store(tmp_path / "a", values(37))
        same(np.asarray(array), values(37))
        same(np.asarray(array, np.float32), values(37).astype(np.float32))
        with pytest.raises(ValueError, match="an array on disk is always copied into memory; drop copy=False"):
            np.asarray(array, copy=False)


class TestReading:
    # The fixture patches the same for all examples.
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_every_system_reads_the_same(
        self, system: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        chunk_rows = data.draw(st.integers(1, 5))
        shard_rows = chunk_rows * data.draw(st.integers(1, 4))
        truth = values(data.draw(st.integers(1, 60)), data.draw(st.sampled_from([(), (1,), (6,), (3, 2)])))
        array = store(tmp_path_factory.mktemp("a") / "a", truth, chunk_rows=chunk_rows, shard_rows=shard_rows)
        rows = data.draw(st.lists(st.integers(-len(truth), len(truth) - 1), max_size=20))
        verify = data.draw(st.booleans())
        same(array.gather(rows, verify=verify), truth[np.array(rows, int)])
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(truth))] * 2)))
        same(array.read(start, stop, verify=verify), truth[start:stop])
        same(array.load(verify=verify), truth)

    def test_results_go_where_they_are_told(self, system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mapped, "BLOCK_BYTES", 3 * 12)
        truth = values(60)
        array = store(tmp_path / "a", truth)
        rows = [5, 59, 0, 5, 33, 17, 16, 15]
        calls: list[tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]] = [
            (lambda out: array.gather(rows, out), truth[rows]),
            (lambda out: array.read(3, 50, out), truth[3:50]),
            (lambda out: array.load(out), truth),
            (lambda out: array.gather([], out), truth[:0]),
        ]
        for call, wanted in calls:
            out = np.full(wanted.shape, np.nan, np.float16)
            assert call(out) is out
            same(out, wanted)

    @pytest.mark.parametrize(
        "out",
        [
            np.empty((2, 6), np.float16),
            np.empty((3, 6), np.float32),
            np.empty((6, 3), np.float16).T,
            np.frombuffer(bytes(36), np.float16).reshape(3, 6),
        ],
    )
    def test_an_out_that_does_not_fit(self, tmp_path: Path, out: np.ndarray) -> None:
        array = store(tmp_path / "a", values(37))
        message = r"out must be writable, C-contiguous, of shape \(3, 6\) and dtype float16; got"
        with pytest.raises(ConfigError, match=message):
            array.gather([1, 2, 3], out)
        with pytest.raises(ConfigError, match=message):
            array.read(1, 4, out)

    @pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, 38)])
    def test_ranges_outside(self, tmp_path: Path, start: int, stop: int) -> None:
        with pytest.raises(IndexError, match=rf"rows {start} to {stop} \(exclusive\) asked of 37; 0 <= start <= stop"):
            store(tmp_path / "a", values(37)).read(start, stop)

    def test_gather_takes_one_axis(self, tmp_path: Path) -> None:
        with pytest.raises(IndexError, match=r"gather takes one axis of row numbers, got shape \(1, 2\)"):
            store(tmp_path / "a", values(37)).gather(np.array([[1, 2]]))

    def test_rows_not_in_memory_are_the_same(self, tmp_path: Path) -> None:
        truth = values(5000, (700,))
        array = store(tmp_path / "a", truth, chunk_rows=64, shard_rows=1024)
        rows = np.random.default_rng(0).integers(0, 5000, 200)
        array.close()
        for file in (tmp_path / "a/c").rglob("0"):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        same(ShardedArray(tmp_path / "a").gather(rows), truth[rows])

    @pytest.mark.skipif(not mapped.HAVE_ADVICE, reason="no madvise here")
    def test_the_pages_of_wanted_rows_are_asked_for_when_they_are_not_in_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[tuple[int, int]] = []

        class Map(mmap.mmap):
            def madvise(self, option: int, *pages: int) -> None:
                if option == mmap.MADV_WILLNEED:
                    asked.append((pages[0], pages[1]))

        def not_in_memory(*_: Any) -> int:
            raise BlockingIOError

        array = store(tmp_path / "a", values(3000, (700,)), chunk_rows=64, shard_rows=4096)
        monkeypatch.setattr(mmap, "mmap", Map)
        monkeypatch.setattr(os, "preadv", not_in_memory)
        rows = np.random.default_rng(0).integers(0, 3000, 50)
        same(array.gather(rows), values(3000, (700,))[rows])
        places = (rows * 1400 + rows // 64 * 4).tolist()
        assert all(page % mmap.PAGESIZE == 0 for page, _ in asked)
        assert all(any(page <= place and place + 1400 <= page + n for page, n in asked) for place in places)
        assert sum(length for _, length in asked) <= 50 * (1400 + mmap.PAGESIZE)

    @pytest.mark.skipif(not mapped.HAVE_ADVICE, reason="no madvise here")
    def test_few_rows_are_probed_after_a_run_of_batches_in_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        probes: list[int] = []
        in_memory = [True]

        def probe(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
            probes.append(offset)
            if not in_memory[0]:
                raise BlockingIOError
            return 1

        array = store(tmp_path / "a", values(600), shard_rows=1024)
        monkeypatch.setattr(mapped, "HAVE_NOWAIT", True)
        monkeypatch.setattr(os, "preadv", probe, raising=False)
        monkeypatch.setattr(os, "RWF_NOWAIT", 8, raising=False)

        def probed() -> int:
            probes.clear()
            array.gather(np.arange(0, 512, 2))
            return len(probes)

        assert probed() == mapped.PROBES_COLD
        for _ in range(mapped.BATCHES_TO_WARM):
            probed()
        assert probed() == mapped.PROBES_WARM
        in_memory[0] = False
        assert probed() == 1
        in_memory[0] = True
        assert probed() == mapped.PROBES_COLD

    def test_short_reads_are_continued(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        truth = values(61)
        array = store(tmp_path / "a", truth)
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:7]], at))
        same(array.load(), truth)

    def test_long_reads_are_split(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        truth = values(61)
        array = store(tmp_path / "a", truth)
        for name, limit in [("READ_BUFFERS", 1), ("READ_BUFFERS", 3), ("READ_BYTES", 50)]:
            with monkeypatch.context() as patch:
                patch.setattr(mapped, name, limit)
                same(array.load(), truth)

    def test_a_file_that_ends_while_it_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        array = store(tmp_path / "a", values(61))
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: 0)
        with pytest.raises(CorruptError, match=r"shard .*c/0/0 was truncated while it was read; restore it"):
            array.load()

    def test_strangers_beside_the_shards_are_not_read(self, tmp_path: Path) -> None:
        array = store(tmp_path / "a", values(37))
        (tmp_path / "a/c/0/0.7f3a.partial").write_bytes(b"half a shard")
        (tmp_path / "a/c/1.partial").mkdir()
        same(array.load(), values(37))
        same(ShardedArray(tmp_path / "a")[[36, 0]], values(37)[[36, 0]])


class TestDamage:
    def test_opening_is_flat_and_a_missing_shard_says_its_rows(self, system: str, tmp_path: Path) -> None:
        store(tmp_path / "a", values(37))
        (tmp_path / "a/c/1/0").unlink()
        array = ShardedArray(tmp_path / "a")
        same(array[[0, 36]], values(37)[[0, 36]])
        message = r"rows 16 to 31 of .*a are not on disk: shard c/1/0 is missing; restore it or extract them again"
        for read in (lambda: array[20], lambda: array[[0, 20]], lambda: array[:], lambda: array.load()):
            with pytest.raises(CorruptError, match=message):
                read()
        with ShardWriter(tmp_path / "a/c/1/0", row_shape=(6,), dtype="float16", chunk_rows=4, shard_rows=16) as writer:
            writer.append(values(37)[16:32])
        same(array.load(), values(37))  # what was missing is looked for again

    def test_rows_behind_a_partly_filled_shard(self, system: str, tmp_path: Path) -> None:
        store(tmp_path / "a", values(6), num_rows=40)
        for shard in (1, 2):
            os.makedirs(tmp_path / f"a/c/{shard}")
            layout: dict[str, Any] = {"row_shape": (6,), "dtype": "float16", "chunk_rows": 4, "shard_rows": 16}
            with ShardWriter(tmp_path / f"a/c/{shard}/0", **layout) as writer:
                writer.append(values(40)[16 * shard : 16 * shard + 16])
        array = ShardedArray(tmp_path / "a")
        same(array[[39, 5, 20]], values(40)[[39, 5, 20]])
        same(array[:6], values(6))
        same(array[16:], values(40)[16:])
        assert np.isnan(array[6:8]).all()  # the padding of the last chunk
        message = (
            r"rows 8 to 15 of .*a are not on disk: shard c/0/0 holds 2 chunks only; extract them, or leave them out"
        )
        for read in (lambda: array[8], lambda: array[[20, 15]], lambda: array[5:20], lambda: array.load()):
            with pytest.raises(CorruptError, match=message):
                read()

    def test_verify_finds_every_flipped_bit_of_the_rows_it_touches(self, system: str, tmp_path: Path) -> None:
        truth = values(22)
        store(tmp_path / "a", truth)
        content = (tmp_path / "a/c/0/0").read_bytes()
        for position in range(0, 4 * 52, 5):
            damage(tmp_path / "a/c/0/0", position)
            array = ShardedArray(tmp_path / "a")
            chunk = position // 52
            message = (
                rf"shard .*a/c/0/0, chunk {chunk} \(from its row {4 * chunk}\): checksum is 0x.*, its bytes give 0x"
            )
            with pytest.raises(CorruptError, match=message):
                array.gather([21, 4 * chunk + 3], verify=True)
            with pytest.raises(CorruptError, match=message):
                array.read(4 * chunk + 1, 22, verify=True)
            with pytest.raises(CorruptError, match=message):
                array.load(verify=True)
            others = [row for row in range(22) if row // 4 != chunk]
            same(array.gather(others, verify=True), truth[others])
            assert array.load().shape == truth.shape
            (tmp_path / "a/c/0/0").write_bytes(content)

    def test_a_damaged_index_is_found_without_verify(self, system: str, tmp_path: Path) -> None:
        store(tmp_path / "a", values(22))
        damage(tmp_path / "a/c/1/0", -30)
        with pytest.raises(CorruptError, match=r"shard .*c/1/0: index checksum is 0x"):
            ShardedArray(tmp_path / "a").gather([0, 17])

    @pytest.mark.parametrize("size", [0, 10, 68, 100, 275])
    def test_a_truncated_shard_is_found_without_verify(self, tmp_path: Path, size: int) -> None:
        store(tmp_path / "a", values(16))
        os.truncate(tmp_path / "a/c/0/0", size)
        with pytest.raises(CorruptError, match=rf"c/0/0 has {size} bytes, which no whole number of chunks"):
            ShardedArray(tmp_path / "a")[3]

    @pytest.mark.parametrize(
        ("content", "error", "message"),
        [
            (None, StoreError, r"no zarr v3 array at .*a: it has no zarr.json; give the folder of one array"),
            (b"{", CorruptError, r"zarr.json is not valid JSON \(.*\); restore it from a copy"),
            (b"\xff\xfe\x00", CorruptError, "is not valid JSON"),
            (
                b'{"zarr_format": 3, "node_type": "group"}',
                StoreError,
                "is a zarr group; give the folder of one of its arrays",
            ),
            (b"[]", CorruptError, r"zarr.json does not describe an array \(node_type None\)"),
            (b'{"node_type": "array"}', CorruptError, "does not describe an array"),
            (b'{"node_type": "array", "shape": []}', StoreError, "has no axis, so it has no rows"),
            (
                b'{"node_type": "array", "shape": [3, 2], "data_type": "float9"}',
                StoreError,
                "zarr-python cannot open this",
            ),
        ],
    )
    def test_folders_that_hold_no_array_of_rows(
        self, tmp_path: Path, content: bytes | None, error: type[Exception], message: str
    ) -> None:
        (tmp_path / "a").mkdir()
        if content is not None:
            (tmp_path / "a/zarr.json").write_bytes(content)
        with pytest.raises(error, match=message):
            ShardedArray(tmp_path / "a")


class TestFiles:
    def test_attributes(self, tmp_path: Path) -> None:
        array = store(tmp_path / "a", values(37, (3, 2)))
        assert (array.shape, array.row_shape, len(array), array.dtype.name) == ((37, 3, 2), (3, 2), 37, "float16")
        assert (array.chunk_rows, array.shard_rows, array.attributes, array.is_mapped) == (4, 16, {"a": 1}, True)
        assert repr(array) == f"ShardedArray({str(tmp_path / 'a')!r}, shape=(37, 3, 2), dtype=float16)"

    def test_a_closed_array_says_so_and_a_pickled_one_opens_again(self, tmp_path: Path) -> None:
        with store(tmp_path / "a", values(37)) as array:
            array[3]
            copy = pickle.loads(pickle.dumps(array))
        for read in (lambda: array[3], lambda: array[[3]], lambda: array.load()):
            with pytest.raises(StoreError, match=r"array .*a is closed; open it again"):
                read()
        same(copy[3], values(37)[3])

    @pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors through /proc")
    def test_descriptors_are_bounded_and_returned(self, tmp_path: Path) -> None:
        truth = values(64 * 16)
        array = store(tmp_path / "a", truth)
        backend = array._backend
        assert isinstance(backend, MappedRows)
        backend._max_open = 8
        gc.collect()  # what failed tests still hold
        before = len(os.listdir("/proc/self/fd"))
        rows = np.random.default_rng(0).permutation(len(truth))
        same(array.gather(rows), truth[rows])
        same(array.gather(rows, np.empty_like(truth)), truth[rows])
        same(array.load(), truth)
        for row in rows[:100].tolist():
            same(array[row], truth[row])
        assert len(os.listdir("/proc/self/fd")) <= before + 2 * 8
        assert len(backend._opened.shards) == 8
        array.close()
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before

    def test_shards_used_last_stay_open(self, tmp_path: Path) -> None:
        array = store(tmp_path / "a", values(6 * 16))
        backend = array._backend
        assert isinstance(backend, MappedRows)
        backend._max_open = 3
        for row in (0, 16, 32, 0, 48, 64):
            array.gather([row, 0])
        assert sorted(backend._opened.shards) == [0, 3, 4]

    def test_threads_share_an_array_while_shards_come_and_go(self, system: str, tmp_path: Path) -> None:
        truth = values(20 * 16)
        array = store(tmp_path / "a", truth)
        backend = array._backend
        assert isinstance(backend, MappedRows)
        backend._max_open = 5

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(25):
                rows = rng.integers(0, len(truth), rng.integers(1, 12))
                same(array.gather(rows), truth[rows])
                start, stop = np.sort(rng.integers(0, len(truth), 2)).tolist()
                same(array.read(start, stop), truth[start:stop])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))

    def test_closing_under_a_reader_is_safe(self, tmp_path: Path) -> None:
        truth = values(20 * 16)
        store(tmp_path / "a", truth)
        for _ in range(10):
            array = ShardedArray(tmp_path / "a")
            with ThreadPoolExecutor(4) as pool:
                reads = [pool.submit(array.gather, np.arange(320)[::-1]) for _ in range(20)]
                array.close()
            for read in reads:
                if read.exception() is None:
                    same(read.result(), truth[::-1])
                else:
                    assert isinstance(read.exception(), StoreError)
