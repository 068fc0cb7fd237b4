"""Embeddings for torch: the same rows as numpy's, each once an epoch, well mixed, whatever process asks."""

import json
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import shard_arrays
import tiny_sets
import torch
from tiny_sets import CLS, PATCHES, named, prepare, write_missing
from torch.utils.data import DataLoader

from featstore.datasets import manifest as manifests
from featstore.errors import ConfigError, DeviceError, IncompleteError, UnknownNameError
from featstore.store import commits, ledger
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet, RowArray
from featstore.store.layout import ArraySpec
from featstore.store.mapped import MappedRows
from featstore.store.reader import ShardedArray
from featstore.store.training import FeatureDataset, as_numpy, as_torch, collate

MEAN = ArraySpec(name="mean_patch", row_shape=(8,), dtype="float16")
BLOCK = 16
ROOT = Path(__file__).resolve().parent.parent


def make_set(root: Path, count: int = 50, arrays: Any = (CLS, MEAN, PATCHES)) -> FeatureSet:
    manifest = tiny_sets.make_manifest(named(count))
    folder = prepare(root, tiny_sets.make_spec_of(block_rows=BLOCK), manifest, list(arrays))
    write_missing(folder, 1, block_rows=BLOCK)
    return FeatureSet(folder, manifest)


def grown(root: Path) -> FeatureSet:
    """60 samples of which the last 10 come first in the manifest: rows 48 to 57 of the arrays, then 0 to 39."""
    fs = make_set(root, 40)
    manifest = tiny_sets.make_manifest(
        named(10, 40) + named(40), sizes=[200 + i for i in range(10)] + [100 + i for i in range(40)]
    )
    manifests.save(root / "datasets", manifest)
    ledger.add_rows(fs.folder, manifest, dict)
    ledger.write_metadata(fs.folder, fs.spec, ledger.read_ledger(fs.folder))
    write_missing(fs.folder, 1, block_rows=BLOCK)
    return FeatureSet(fs.folder, manifest)


def with_failure(root: Path) -> FeatureSet:
    """20 samples, sample 3 failed."""
    manifest = tiny_sets.make_manifest(named(20))
    folder = prepare(root, tiny_sets.make_spec_of(block_rows=BLOCK), manifest, [CLS])
    for block in range(2):
        with tiny_sets.writer_of(folder, "cls", block) as writer:
            count = writer.stop - writer.start
            values, states = (
                tiny_sets.values_of(CLS, writer.start, writer.stop, 1).copy(),
                tiny_sets.states_of(count, 1),
            )
            if block == 0:
                values[3], states[3] = np.nan, commits.RowState(states[3].content, "broken")
            writer.append({"cls": values}, states)
            assert writer.commit()
    return FeatureSet(folder, manifest)


def same(found: torch.Tensor, wanted: np.ndarray) -> None:
    assert tuple(found.shape) == wanted.shape
    assert str(found.dtype).removeprefix("torch.") == wanted.dtype.name
    bits = found.view(torch.int16) if found.dtype == torch.bfloat16 else found
    assert bits.numpy().tobytes() == wanted.tobytes()


class TestWhole:
    @pytest.mark.parametrize("features", ["cls", "patches", "cls+mean_patch", "cls+patches", None])
    @pytest.mark.parametrize("make", [make_set, grown])
    @pytest.mark.parametrize("piece", [1, 2**20])
    def test_as_torch_and_as_numpy_are_load(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        make: Callable[[Path], FeatureSet],
        features: str | None,
        piece: int,
    ) -> None:
        monkeypatch.setattr("featstore.store.training.PIECE_BYTES", piece)
        fs = make(tmp_path)
        wanted = fs.load(features or "cls+mean_patch", verify=True)
        same(as_torch(fs, features), wanted)
        same(as_torch(fs, features, verify=True, device="cpu"), wanted)
        np.testing.assert_array_equal(as_numpy(fs, features), wanted)

    def test_one_array(self, tmp_path: Path) -> None:
        fs = make_set(tmp_path)
        same(as_torch(fs.patches), fs.patches.load())
        with pytest.raises(
            ConfigError, match=r"features are chosen of a set, and .*:cls is one array; drop features='x"
        ):
            as_torch(fs.cls, "x")

    def test_the_mean_of_all_tokens(self, tmp_path: Path) -> None:
        fs = make_set(tmp_path)
        truth = np.concatenate([fs.cls.load()[:, None], fs.patches.load()], 1).astype(np.float64).mean(1)
        np.testing.assert_allclose(as_torch(fs, "mean_all").numpy(), truth, rtol=1e-5, atol=1e-6)
        features, index = FeatureDataset(fs, "mean_all").batch(np.array([7, 3]))
        np.testing.assert_allclose(features.numpy(), truth[[7, 3]], rtol=1e-5, atol=1e-6)
        assert index.tolist() == [7, 3]

    def test_bfloat16(self, tmp_path: Path) -> None:
        rows = shard_arrays.values(37, (6,), ml_dtypes.bfloat16)
        array = shard_arrays.store(tmp_path / "a", rows)
        part = RowArray(array, np.arange(37)[::-1].copy(), np.zeros(37, bool), "x:cls")
        found = as_torch(part)
        assert found.dtype == torch.bfloat16
        same(found, rows[::-1])
        np.testing.assert_array_equal(found.float().numpy(), rows[::-1].astype(np.float32))

    def test_no_second_copy(self, tmp_path: Path) -> None:
        """Neither for rows in order nor for scattered ones; torch's own memory is not traced, numpy's is."""
        rows = np.zeros((16384, 1024), np.float16)  # 32 MiB
        rows[:, 0] = np.arange(len(rows)) % 2048
        array = shard_arrays.store(tmp_path / "a", rows, chunk_rows=256, shard_rows=4096)
        tracemalloc.start()
        try:
            for order in (np.arange(len(rows)), np.random.default_rng(0).permutation(len(rows))):
                part = RowArray(array, order, np.zeros(len(rows), bool), "x:cls")
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                tensor = as_torch(part)
                assert tracemalloc.get_traced_memory()[1] - before < 0.1 * rows.nbytes
                assert tensor.untyped_storage().nbytes() == rows.nbytes
                assert np.array_equal(tensor[:, 0].numpy(), rows[order, 0])
        finally:
            tracemalloc.stop()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="has page-locked memory")
    def test_page_locked_memory_needs_a_gpu(self, tmp_path: Path) -> None:
        with pytest.raises(
            DeviceError, match="page-locked memory needs a CUDA device and there is none; drop pin=True"
        ):
            as_torch(make_set(tmp_path), pin=True)

    def test_rows_that_are_not_extracted(self, tmp_path: Path) -> None:
        fs = make_set(tmp_path)
        commits.take_back(fs.folder, fs.ledger.group_of("cls"), fs.ledger.groups[fs.ledger.group_of("cls")], 1, BLOCK)
        with pytest.raises(IncompleteError, match="16 of the rows asked for are not extracted yet; run the same"):
            as_torch(fs)
        with pytest.raises(IncompleteError, match="1 of the rows asked for are not extracted yet"):
            FeatureDataset(fs, "cls", rows=[0, 20])
        assert FeatureDataset(fs, "cls", rows=[0, 40]).index.tolist() == [0, 40]
        assert FeatureDataset(fs, "cls").index.tolist() == [*range(16), *range(32, 50)]


class TestDataset:
    def test_samples(self, tmp_path: Path) -> None:
        fs = grown(tmp_path)
        labels = np.arange(50) * 3
        data = FeatureDataset(fs, "patches", labels=labels)
        wanted = fs.patches.load()
        assert len(data) == 50
        assert (data.row_shape, data.dtype) == ((3, 8), torch.float16)
        features, label, index = data[-2]
        same(features, wanted[48])
        assert (label.item(), index.item()) == (144, 48)
        chosen = [5, 49, 5]
        features, label, index = collate(data.__getitems__(chosen))
        same(features, wanted[chosen])
        assert (label.tolist(), index.tolist()) == ([15, 147, 15], chosen)
        for position in (50, -51):
            with pytest.raises(IndexError, match=f"sample {position} is out of range for 50 samples of demo/tiny@42"):
                data[position]

    def test_a_batch_is_one_gather_and_no_copy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = FeatureDataset(make_set(tmp_path), "patches")
        gathered: list[np.ndarray] = []
        real = ShardedArray.gather

        def gather(self: ShardedArray, *args: Any, **options: Any) -> np.ndarray:
            gathered.append(real(self, *args, **options))
            return gathered[-1]

        monkeypatch.setattr(ShardedArray, "gather", gather)
        samples = data.__getitems__([9, 4, 30])
        (block,) = gathered
        assert collate(samples)[0].data_ptr() == block.ctypes.data
        assert [sample[0].data_ptr() - block.ctypes.data for sample in samples] == [0, 48, 96]

    @pytest.mark.parametrize(
        ("rows", "wanted"),
        [
            ([3, -1, 3], [3, 49, 3]),
            (np.arange(50) % 7 == 0, list(range(0, 50, 7))),
            ([], []),
            (np.array([7], np.uint8), [7]),
        ],
    )
    def test_rows(self, tmp_path: Path, rows: Any, wanted: list[int]) -> None:
        fs = make_set(tmp_path)
        data = FeatureDataset(fs, rows=rows)
        assert data.index.tolist() == wanted
        same(data.batch(np.arange(len(wanted)))[0], fs.load()[wanted])

    def test_rows_that_cannot_be(self, tmp_path: Path) -> None:
        fs = make_set(tmp_path)
        for rows in ([50], [0, -51]):
            with pytest.raises(IndexError, match=rf"row {rows[-1]} is out of range for a manifest of 50 samples"):
                FeatureDataset(fs, rows=rows)
        wrong = [np.array([0.5]), np.array([[1]]), np.ones(49, bool)]
        for array in wrong:
            with pytest.raises(ConfigError, match=r"rows are a list of manifest rows or a mask of shape \(50,\), got"):
                FeatureDataset(fs, rows=array)
        with pytest.raises(UnknownNameError, match="has no 'registers'"):
            FeatureDataset(fs, "cls+registers")

    def test_failed_rows_are_left_out(self, tmp_path: Path) -> None:
        fs = with_failure(tmp_path)
        data = FeatureDataset(fs, "cls")
        assert data.index.tolist() == [0, 1, 2, *range(4, 20)]
        assert np.isfinite(data.batch(np.arange(19))[0].numpy()).all()
        assert torch.isnan(as_torch(fs, "cls")).any(1).nonzero().ravel().tolist() == [3]
        with pytest.raises(
            ConfigError, match="1 of the rows asked for failed and hold no features, the first is row 3"
        ):
            FeatureDataset(fs, "cls", rows=[1, 3])

    @pytest.mark.parametrize("labels", [np.eye(50), torch.arange(50), [0.5] * 50, np.arange(50)[::-1] > 20])
    def test_labels(self, tmp_path: Path, labels: Any) -> None:
        data = FeatureDataset(make_set(tmp_path), "cls", rows=[8, 2], labels=labels)
        found = data.batch(np.array([1, 0]))[1]
        assert found.tolist() == np.asarray(labels)[[2, 8]].tolist()

    def test_labels_that_do_not_fit(self, tmp_path: Path) -> None:
        fs = make_set(tmp_path)
        with pytest.raises(ConfigError, match=r"labels have one entry for each of the 50 samples .*, got \(3,\)"):
            FeatureDataset(fs, rows=[0, 1, 2], labels=[0, 1, 2])
        with pytest.raises(ConfigError, match="labels are numbers, got <U3; encode them first"):
            FeatureDataset(fs, labels=["cat"] * 50)

    @pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
    def test_workers(self, tmp_path: Path, context: str) -> None:
        fs = make_set(tmp_path)
        data = FeatureDataset(fs, "cls", labels=np.arange(50))
        data[0]
        loader = DataLoader(
            data,
            batch_size=8,
            num_workers=1,
            multiprocessing_context=context,
            collate_fn=collate if context == "fork" else None,
        )
        batches = list(loader)
        same(torch.cat([batch[0] for batch in batches]), fs.cls.load())
        assert torch.cat([batch[2] for batch in batches]).tolist() == list(range(50))

    def test_a_lock_that_is_held_at_a_fork(self, tmp_path: Path) -> None:
        data = FeatureDataset(make_set(tmp_path), "cls")
        backend = data._parts[0].array._backend
        assert isinstance(backend, MappedRows)
        with backend._lock:
            child = tiny_sets.fork(lambda: data.batch(np.arange(50)))
        assert tiny_sets.wait(child) == 0

    def test_pickles_are_small(self, tmp_path: Path) -> None:
        data = FeatureDataset(make_set(tmp_path), rows=[4])
        sent = pickle.dumps(data)
        assert len(sent) < 4000
        same(pickle.loads(sent)[0][0], data[0][0].numpy())


def test_a_set_from_the_store(tmp_path: Path) -> None:
    fs = make_set(tmp_path)
    found = Store(tmp_path)["demo", "tiny@42"]
    same(as_torch(found), fs.load())


@pytest.mark.slow
def test_the_benchmark_runs() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/bench_loader.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout)["results"]["cases"]
    assert {"cls_warm", "patches_warm", "small_blocks_load_warm"} <= set(cases)
    assert all(reader["rows_per_second"]["median"] > 0 for case in cases.values() for reader in case.values())
