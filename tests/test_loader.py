"""Batches for training: order, read-ahead, large and truncated files."""

import errno
import gc
import json
import mmap
import os
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shard_arrays
from test_training import grown, make_set, same

from featstore.errors import ConfigError, CorruptError
from featstore.store import mapped
from featstore.store.layout import ArraySpec
from featstore.store.mapped import MappedRows
from featstore.store.reader import ShardedArray
from featstore.store.shards import ShardLayout, array_metadata
from featstore.store.training import FeatureDataset, FeatureLoader, _check_shuffle

MEAN = ArraySpec(name="mean_patch", row_shape=(8,), dtype="float16")
BLOCK = 16
ROOT = Path(__file__).resolve().parent.parent


def entropy(classes: np.ndarray, size: int) -> float:
    """Mean number of distinct classes in batches of a size."""
    return float(np.mean([len(np.unique(batch)) for batch in np.split(classes, len(classes) // size)]))


class Stored(FeatureDataset):
    """A data set where only the order of rows matters."""

    def __init__(self, count: int) -> None:
        self.index = self.stored = np.arange(count)


def order_of(count: int, epoch: int = 0, **options: Any) -> np.ndarray:
    return FeatureLoader(Stored(count), 1, **{"shuffle": "block", **options}).order(epoch)


class TestOrder:
    @pytest.mark.parametrize("shuffle", [True, False, "block"])
    @pytest.mark.parametrize("count", [0, 1, 5, 16, 17, 1000, 3001])
    @pytest.mark.parametrize("buffer", [1, 3, 64])
    def test_every_sample_once(self, shuffle: Any, count: int, buffer: int) -> None:
        order = order_of(count, shuffle=shuffle, buffer=buffer)
        assert sorted(order.tolist()) == list(range(count))

    @pytest.mark.parametrize("shuffle", [True, "block"])
    def test_seeds_and_epochs(self, shuffle: Any) -> None:
        orders = [
            order_of(3000, epoch, shuffle=shuffle, seed=seed).tobytes() for seed in range(3) for epoch in range(3)
        ]
        assert len(set(orders)) == 9
        assert order_of(3000, 2, shuffle=shuffle, seed=1).tobytes() == orders[5]

    @pytest.mark.parametrize("shuffle", [True, False, "block"])
    @pytest.mark.parametrize("world", [2, 3, 7])
    def test_ranks_are_disjoint_and_equal(self, shuffle: Any, world: int) -> None:
        shares = [order_of(1000, shuffle=shuffle, buffer=4, rank=rank, world=world) for rank in range(world)]
        assert {len(share) for share in shares} == {1000 // world}
        assert len(set(np.concatenate(shares).tolist())) == 1000 // world * world

    def test_batches_of_rows_stored_class_by_class(self) -> None:
        """Distinct classes of 16 in batches of 64: a full shuffle's expectation is 16 (1 - (15/16)^64) = 15.74."""
        classes = np.arange(32768) // 2048
        expected = 16 * (1 - (15 / 16) ** 64)
        full = entropy(classes[order_of(32768, shuffle=True)], 64)
        assert full == pytest.approx(expected, rel=0.01)
        blocks = classes[order_of(32768)]
        assert entropy(blocks, 64) > 0.9 * expected
        # Not only on average: the first and the last batches too, where a pool fills and empties.
        assert entropy(blocks[:1024], 64) > 0.85 * expected
        assert entropy(blocks[-1024:], 64) > 0.85 * expected
        # A small pool shows that this can fail.
        assert entropy(classes[order_of(32768, buffer=8)], 64) < 0.6 * expected

    def test_displacement(self) -> None:
        """Positions and stored positions are uncorrelated, and so are neighbours but for rows of one block.

        For two independent uniform positions the mean distance is N/3 with a standard deviation of N/sqrt(18) a row.
        Blocks move as one, so that a mean over N rows has the spread of one over N/16 blocks. Two neighbours are of one
        block with probability 1/64 (then fully correlated), else independent: the expected correlation is 1/64.
        """
        count, block, buffer = 32768, 16, 64
        order = order_of(count, block=block, buffer=buffer)
        distance = np.abs(order - np.arange(count)).mean() / count
        assert distance == pytest.approx(1 / 3, abs=4 / np.sqrt(18 * count / block))
        correlation = np.corrcoef(order[:-1], order[1:])[0, 1]
        assert abs(correlation - 1 / buffer) < 4 / np.sqrt(count)
        together = (order[:-1] // block == order[1:] // block).mean()
        assert together == pytest.approx(1 / buffer, rel=0.25)

    def test_blocks_stay_near_each_other(self) -> None:
        """The rows of a block come within the time of the pool, on the ring of the epoch."""
        count, block, buffer = 32768, 16, 64
        order = order_of(count, block=block, buffer=buffer)
        place = np.empty(count, np.int64)
        place[order] = np.arange(count)
        places = np.sort(place.reshape(-1, block), 1)
        gaps = np.diff(np.concatenate([places, places[:, :1] + count], 1), axis=1)
        assert (count - gaps.max(1)).max() < 1.3 * block * buffer

    def test_blocks_are_of_stored_rows(self, tmp_path: Path) -> None:
        fs = grown(tmp_path)
        data = FeatureDataset(fs, "cls")
        loader = FeatureLoader(data, 4, shuffle="block", block=4, buffer=1)
        stored = data.stored[loader.order(0)]
        by_place = np.searchsorted(np.sort(data.stored), stored)
        together = by_place[:-1] // 4 == by_place[1:] // 4
        assert together.mean() > 0.4  # of 1/13 for rows of any block

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"block": 0}, "block must be at least 1, got 0"),
            ({"buffer": 0}, "buffer must be at least 1, got 0"),
            ({"prefetch": 0}, "prefetch must be at least 1, got 0"),
            ({"seed": -1}, "seed must be at least 0, got -1"),
            ({"world": 0}, "world must be at least 1, got 0"),
            ({"rank": 2, "world": 2}, "rank must be from 0 to world - 1 = 1, got 2"),
            ({"world": 11}, "10 samples cannot be shared by 11 processes; lower world"),
        ],
    )
    def test_arguments(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            FeatureLoader(Stored(10), **{"batch_size": 2, **options})


def test_ways_to_shuffle() -> None:
    with pytest.raises(ConfigError, match="shuffle is True, False or 'block', got 'blocks'"):
        _check_shuffle("blocks")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("featstore-loader")]


class TestLoader:
    @pytest.mark.parametrize("shuffle", [True, False, "block"])
    @pytest.mark.parametrize("features", ["cls+mean_patch", "patches"])
    @pytest.mark.parametrize("drop_last", [True, False])
    def test_batches(self, tmp_path: Path, shuffle: Any, features: str, drop_last: bool) -> None:
        fs = grown(tmp_path)
        wanted, labels = fs.load(features), np.arange(50) % 3
        data = FeatureDataset(fs, features, labels=labels)
        loader = FeatureLoader(data, 8, shuffle=shuffle, block=2, buffer=3, drop_last=drop_last)
        seen: list[int] = []
        for features_of, label, index in loader:
            same(features_of, wanted[index])
            assert label.tolist() == labels[index].tolist()
            seen += index.tolist()
        assert len(loader) == (6 if drop_last else 7)
        assert seen == loader.order(0).tolist()[: 48 if drop_last else 50]
        assert threads() == []

    def test_epochs(self, tmp_path: Path) -> None:
        loader = FeatureLoader(FeatureDataset(make_set(tmp_path), "cls"), 7, seed=3)

        def run() -> list[int]:
            return [row for _, index in loader for row in index.tolist()]

        first, second = run(), run()
        assert first != second
        assert (first, second) == (loader.order(0).tolist(), loader.order(1).tolist())
        loader.set_epoch(0)
        assert run() == first
        assert run() == second

    def test_nothing_to_load(self, tmp_path: Path) -> None:
        data = FeatureDataset(make_set(tmp_path), rows=[])
        for shuffle in (True, False, "block"):
            loader = FeatureLoader(data, 4, shuffle=shuffle)
            assert (len(loader), list(loader)) == (0, [])

    def test_the_next_batch_is_read_ahead(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = FeatureDataset(make_set(tmp_path), "cls")
        done: list[tuple[str, list[int]]] = []
        monkeypatch.setattr(FeatureDataset, "prefetch", lambda self, rows: done.append(("ahead", rows.tolist())))
        real = FeatureDataset.batch

        def batch(self: FeatureDataset, positions: np.ndarray, **options: Any) -> Any:
            done.append(("batch", positions.tolist()))
            return real(self, positions, **options)

        monkeypatch.setattr(FeatureDataset, "batch", batch)
        list(FeatureLoader(data, 20, shuffle=False))
        steps = [list(range(20)), list(range(20, 40)), list(range(40, 50))]
        wanted = [("ahead", steps[0]), ("ahead", steps[1]), ("batch", steps[0]), ("ahead", steps[2])]
        assert done == [*wanted, ("batch", steps[1]), ("batch", steps[2])]
        # Blocks are asked for whole, once, before the batch that their first row is in.
        done.clear()
        loader = FeatureLoader(data, 5, shuffle="block", block=4, buffer=2)
        list(loader)
        asked: set[int] = set()
        times = 0
        for what, rows in done:
            if what == "ahead":
                blocks = {row // 4 for row in rows}
                assert not blocks & asked
                assert set(rows) == {row for block in blocks for row in range(4 * block, min(4 * block + 4, 50))}
                asked |= blocks
                times += 1
            else:
                assert {row // 4 for row in rows} <= asked
        assert asked == set(range(13))
        assert times > 5

    def test_at_most_so_many_batches_are_held(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = FeatureDataset(make_set(tmp_path), "cls")
        count = [0]
        real = FeatureDataset.batch

        def batch(self: FeatureDataset, positions: np.ndarray, **options: Any) -> Any:
            count[0] += 1
            return real(self, positions, **options)

        monkeypatch.setattr(FeatureDataset, "batch", batch)
        batches = iter(FeatureLoader(data, 2, prefetch=3))
        for taken in range(1, 6):
            next(batches)
            for _ in range(200):
                if count[0] >= taken + 3:
                    break
                threading.Event().wait(0.005)
            assert count[0] <= taken + 3
        assert count[0] == 8
        del batches

    def test_closing_early_leaves_no_thread(self, tmp_path: Path) -> None:
        loader = FeatureLoader(FeatureDataset(make_set(tmp_path), "cls"), 2)
        for _ in loader:
            assert len(threads()) == 1
            break
        gc.collect()
        assert threads() == []
        batches: Any = iter(loader)
        next(batches)
        batches.close()
        assert threads() == []

    def test_errors_reach_the_consumer(self, tmp_path: Path) -> None:
        fs = make_set(tmp_path)
        data = FeatureDataset(fs, "cls")
        (fs.folder / "data.zarr/cls/c/2/0").unlink()
        batches = iter(FeatureLoader(data, 8, shuffle=False))
        seen = [row for _ in range(3) for row in next(batches)[1].tolist()]
        assert seen == list(range(24))
        with pytest.raises(CorruptError, match=r"rows 32 to 47 of .* are not on disk"):
            next(batches)  # rows 24 to 31: their batch was to ask for the next one
        assert threads() == []

    def test_batches_on_a_device(self, tmp_path: Path) -> None:
        loader = FeatureLoader(FeatureDataset(make_set(tmp_path), "cls"), 8, device="meta")
        assert {part.device.type for batch in loader for part in batch} == {"meta"}


class TestReadAhead:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How many rows are in each advice; the system says that nothing is in memory."""
        found: list[int] = []
        monkeypatch.setattr(MappedRows, "_advise", lambda self, opened, shards, places: found.append(len(places)))
        monkeypatch.setattr(mapped, "HAVE_ADVICE", True)
        return found

    def test_rows_are_asked_for_unless_they_are_in_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[int]
    ) -> None:
        array = shard_arrays.store(tmp_path / "a", shard_arrays.values(100))
        backend: Any = array._backend
        monkeypatch.setattr(mapped, "HAVE_NOWAIT", False)
        monkeypatch.setattr(mapped, "_MINCORE", None)
        backend.prefetch(np.array([3, 99, 50, 3]))
        assert asked == [4]
        assert set(backend._opened.shards) == {0, 3, 6}
        backend._max_open = 2
        backend.prefetch(np.arange(100))
        assert asked == [4, 32, 32, 32, 4]
        asked.clear()
        backend.prefetch(np.zeros(0, np.int64))
        monkeypatch.setattr(backend, "_is_cold", lambda *_: False)
        backend.prefetch(np.array([3]))
        monkeypatch.setattr(mapped, "HAVE_ADVICE", False)
        backend.prefetch(np.array([3]))
        assert asked == []

    @pytest.mark.skipif(not mapped.HAVE_ADVICE, reason="no madvise here")
    def test_what_is_asked_for_covers_the_rows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Pages of every row, each run of neighbours at once, none twice."""
        spans: list[tuple[int, int]] = []

        class Map:
            def madvise(self, option: int, start: int, length: int) -> None:
                assert option == mmap.MADV_WILLNEED
                assert start % mmap.PAGESIZE == 0
                spans.append((start, start + length))

        array = shard_arrays.store(tmp_path / "a", shard_arrays.values(3000, (700,)), chunk_rows=64, shard_rows=4096)
        backend: Any = array._backend
        held: Any = object.__new__(mapped._Shard)
        held.map, held.descriptor = Map(), -1
        for rows in ([*range(100, 140), 7, 900, 901, 7], [5], list(range(3000))):
            spans.clear()
            numbers = np.array(rows)
            places = numbers * 1400 + numbers // 64 * 4

            backend._advise(replace(backend._opened, shards={0: held}), np.zeros(len(rows), np.int64), places)
            assert all(any(low <= place and place + 1400 <= high for low, high in spans) for place in places.tolist())
            assert all(high <= low for (_, high), (low, _) in pairwise(spans))
            assert len(spans) == {44: 3, 1: 1, 3000: 1}[len(rows)]

    def test_absent_rows_are_told(self, tmp_path: Path) -> None:
        array = shard_arrays.store(tmp_path / "a", shard_arrays.values(20), num_rows=40)
        backend: Any = array._backend
        with pytest.raises(CorruptError, match=r"rows 32 to 39 of .* are not on disk: shard c/2/0 is missing"):
            backend.prefetch(np.array([1, 39]))
        with pytest.raises(CorruptError, match=r"rows 20 to 31 of .* shard c/1/0 holds 1 chunks only"):
            backend.prefetch(np.array([1, 30]))


class TestLargeFiles:
    @pytest.mark.parametrize("width", [4096, 16384])
    def test_rows_beyond_4_gib(self, tmp_path: Path, width: int) -> None:
        """A shard of 4.6 GB with holes: the window and the copy of large rows, single rows, ranges, read-ahead."""
        chunk_rows, row_bytes = 4096 * 64 // width, 2 * width
        layout = ShardLayout(row_shape=(width,), dtype="float16", chunk_rows=chunk_rows, shard_rows=chunk_rows * 8800)
        (tmp_path / "a/c/0").mkdir(parents=True)
        metadata = array_metadata(
            num_rows=layout.shard_rows,
            row_shape=(width,),
            dtype="float16",
            chunk_rows=chunk_rows,
            shard_rows=layout.shard_rows,
            attributes={},
        )
        (tmp_path / "a/zarr.json").write_text(json.dumps(metadata))
        chosen = np.array([layout.shard_rows - 1, 3, layout.shard_rows // 2 + 1])
        rows = np.random.default_rng(0).standard_normal((3, width)).astype(np.float16)
        with open(tmp_path / "a/c/0/0", "wb") as file:
            for row, values in zip(chosen.tolist(), rows):
                file.seek(row * row_bytes + row // chunk_rows * 4)
                file.write(values.tobytes())
            file.seek(8800 * layout.stride)
            file.write(layout.index(8800))
        assert os.path.getsize(tmp_path / "a/c/0/0") > 4.5e9
        array = ShardedArray(tmp_path / "a")
        np.testing.assert_array_equal(array.gather(chosen), rows)
        np.testing.assert_array_equal(array.gather(chosen, np.empty_like(rows)), rows)
        np.testing.assert_array_equal(array[-1], rows[0])
        np.testing.assert_array_equal(array.read(int(chosen[2]) - 1, int(chosen[2]) + 1)[1], rows[2])
        backend: Any = array._backend
        backend.prefetch(chosen)


class TestTruncation:
    """A shard that another program cuts while it is mapped; touching what is gone would kill this process."""

    def cut(self, tmp_path: Path) -> tuple[ShardedArray, Any]:
        array = shard_arrays.store(tmp_path / "a", shard_arrays.values(64, (3000,)))
        array.gather(np.arange(64))
        os.truncate(tmp_path / "a/c/2/0", 4096)
        return array, array._backend

    def test_it_is_found_by_the_next_look_at_sizes(self, tmp_path: Path) -> None:
        array, backend = self.cut(tmp_path)
        for verify in (False, True):
            backend._sizes_due = 0.0
            with pytest.raises(
                CorruptError, match=r"c/2/0 was truncated while it was read; restore it, then open again"
            ):
                array.gather(np.array([0, 47]), verify=verify)
        with pytest.raises(CorruptError, match=r"c/2/0 was truncated while it was read"):
            array.read(0, 64, verify=True)
        with pytest.raises(CorruptError, match=r"c/2/0 was truncated while it was read"):
            array.load()

    @pytest.mark.skipif(not mapped.HAVE_ADVICE, reason="no advice, hence no probes here")
    @pytest.mark.parametrize("probe", ["as is", "refused", "not in memory", "none"])
    def test_it_is_found_by_the_rows_that_are_probed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: str
    ) -> None:
        """However rows are probed on this file system: a test that fails here kills the process."""
        array, backend = self.cut(tmp_path)

        def answer(*_: Any) -> int:
            raise OSError(errno.EOPNOTSUPP if probe == "refused" else errno.EAGAIN, probe)

        if probe in ("refused", "not in memory"):
            monkeypatch.setattr(mapped, "HAVE_NOWAIT", True)
            monkeypatch.setattr(os, "RWF_NOWAIT", 8, raising=False)
            monkeypatch.setattr(os, "preadv", answer, raising=False)
        elif probe == "none":
            monkeypatch.setattr(mapped, "HAVE_NOWAIT", False)
            monkeypatch.setattr(mapped, "_MINCORE", None)
        backend._sizes_due = float("inf")
        with pytest.raises(CorruptError, match=r"c/2/0 was truncated while it was read"):
            array.gather(np.array([0, 47]))
        with pytest.raises(CorruptError, match=r"c/2/0 was truncated while it was read"):
            backend.prefetch(np.array([0, 47]))

    def test_sizes_are_looked_at_now_and_then(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        array = shard_arrays.store(tmp_path / "a", shard_arrays.values(64))
        array.gather(np.arange(64))
        monkeypatch.setattr(MappedRows, "_is_cold", lambda *_: False)  # probes look at sizes where reads are refused
        looks: list[int] = []
        real = os.fstat
        monkeypatch.setattr(os, "fstat", lambda held: looks.append(held) or real(held))  # type: ignore[func-returns-value]
        now = [1e9]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        for step, wanted in [(0.0, 4), (0.1, 0), (mapped.SIZES_SECONDS, 4)]:
            now[0] += step
            looks.clear()
            array.gather(np.arange(0, 64, 2))
            assert len(looks) == wanted
