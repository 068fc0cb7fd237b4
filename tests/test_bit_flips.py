"""Single flipped bits anywhere in a store: a deep check finds every one, no verified read returns a wrong value."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny_sets import CLS, PATCHES, check_blocks, make_manifest, make_spec_of, named, prepare, values_of, write_missing

from featstore import files
from featstore.errors import FeatstoreError, IncompleteError
from featstore.store import commits
from featstore.store.catalog import Store
from featstore.store.verify import repair_set, verify_store

GROUP = "cls+patches"
MANIFEST = make_manifest(named(40))
# Kind of file -> pattern; every kind gets its share of the flips.
KINDS = {
    "shard of rows": "sets/*/*/data.zarr/cls/c/*/*",
    "shard of grids": "sets/*/*/data.zarr/patches/c/*/*/*",
    "marker": "sets/*/*/commits/*/*.json",
    "mapping": "sets/*/*/rows/*.parquet",
    "seal of the mapping": "sets/*/*/rows/*.json",
    "manifest": "datasets/*/*/manifest.parquet",
    "source": "datasets/*/*/source.toml",
    "current": "datasets/*/current",
    "spec": "sets/*/*/spec.json",
    "ledger": "sets/*/*/ledger/*.json",
    "zarr.json": "sets/*/*/data.zarr/**/zarr.json",
    "store.json": "store.json",
    "run": "sets/*/*/runs/*.json",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = prepare(tmp_path, make_spec_of(eps=1e-06), MANIFEST, [CLS, PATCHES])
    write_missing(folder, 1, block_rows=16)
    files.write_atomic(folder / "runs" / "a.json", files.sealed({"time": "now", "run": {"seconds": 1e-05}}))
    return tmp_path


def is_found(root: Path) -> bool:
    """Whether a deep check reports something, or the store refuses to open."""
    try:
        return not all(verdict.ok for verdict in verify_store(Store(root), deep=True))
    except FeatstoreError:
        return True


def read_is_true_or_refused(root: Path) -> bool:
    """True if all that verified reads return is what was written; False if they refuse. Asserts otherwise."""
    refused = 0
    for array in (CLS, PATCHES):
        truth = values_of(array, 0, 40, 1)
        order = np.random.default_rng(0).permutation(40)
        reads: list[tuple[Callable[[], np.ndarray], np.ndarray]] = [
            (partial(loaded, root, array.name), truth),
            (partial(gathered, root, array.name, order), truth[order]),
        ]
        for read, wanted in reads:
            try:
                values = read()
            except (FeatstoreError, OSError, ValueError, IndexError):
                refused += 1
            else:
                assert values.dtype == wanted.dtype
                np.testing.assert_array_equal(values, wanted)
    return refused == 0


def loaded(root: Path, name: str) -> np.ndarray:
    return Store(root)["demo", "tiny"].load(name, verify=True)


def gathered(root: Path, name: str, order: np.ndarray) -> np.ndarray:
    """Rows in any order through the array below, after the set itself has looked at its files."""
    fs = Store(root)["demo", "tiny"]
    rows = fs.array(name)
    return np.asarray(rows.array.gather(rows.rows[order], verify=True))


def flip(path: Path, bit: int) -> bytes:
    """Flip one bit; returns the bytes before."""
    held = path.read_bytes()
    raw = bytearray(held)
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    return held


@pytest.mark.parametrize(
    "count", [26, pytest.param(100, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.slow)]
)
def test_every_flipped_bit_is_found_and_none_is_read(root: Path, count: int) -> None:
    rng = np.random.default_rng(count)
    paths = {kind: sorted(root.glob(pattern)) for kind, pattern in KINDS.items()}
    assert all(paths.values())
    assert not is_found(root)
    assert read_is_true_or_refused(root)
    missed = []
    refused = dict.fromkeys(KINDS, 0)
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        path = paths[kind][rng.integers(len(paths[kind]))]
        bit = int(rng.integers(path.stat().st_size * 8))
        held = flip(path, bit)
        if not is_found(root):
            missed.append((path.relative_to(root).as_posix(), bit))
        refused[kind] += not read_is_true_or_refused(root)
        path.write_bytes(held)
    assert missed == []
    assert refused["shard of rows"]
    assert refused["shard of grids"]
    assert refused["store.json"]
    assert not is_found(root)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zarr.json", "current", "store.json", "source"])
def test_every_bit_of_the_small_files(root: Path, kind: str) -> None:
    path = sorted(root.glob(KINDS[kind]))[-1]
    for bit in range(0, path.stat().st_size * 8, 3 if kind == "zarr.json" else 1):
        held = flip(path, bit)
        assert is_found(root), bit
        read_is_true_or_refused(root)
        path.write_bytes(held)


@pytest.mark.parametrize("place", ["payload", "checksum", "padding", "index", "index checksum"])
def test_each_part_of_a_shard(root: Path, place: str) -> None:
    """The last shard of cls: 8 rows of a chunk of 16, so half of it is padding."""
    path = sorted(root.glob(KINDS["shard of rows"]))[-1]
    size = path.stat().st_size
    assert size == 16 * 16 + 4 + 16 + 4
    byte = {"payload": 20, "padding": 200, "checksum": 257, "index": 262, "index checksum": 278}[place]
    held = flip(path, 8 * byte + 3)
    assert is_found(root)
    assert not read_is_true_or_refused(root)
    path.write_bytes(held)
    assert not is_found(root)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("run", "marker")])
@pytest.mark.parametrize(
    "harm", [Path.unlink, truncate, lambda path: path.write_bytes(b"")], ids=["gone", "cut", "empty"]
)
def test_missing_and_truncated_files_are_found(root: Path, kind: str, harm: Callable[[Path], None]) -> None:
    harm(sorted(root.glob(KINDS[kind]))[-1])
    assert is_found(root)
    read_is_true_or_refused(root)


@pytest.mark.parametrize("number", [0, 1])
def test_a_lost_ledger_entry_is_found_though_the_others_are_whole(root: Path, number: int) -> None:
    sorted(root.glob(KINDS["ledger"]))[number].unlink()
    assert is_found(root)
    read_is_true_or_refused(root)


def test_a_lost_marker_is_a_block_to_compute_and_a_cut_one_is_found(root: Path) -> None:
    path = sorted(root.glob(KINDS["marker"]))[1]
    truncate(path)
    assert is_found(root)
    path.unlink()
    with pytest.raises(IncompleteError, match="not extracted yet"):
        Store(root)["demo", "tiny"].load("cls", verify=True)
    (verdict,) = [verdict for verdict in verify_store(Store(root), deep=True) if verdict.notes]
    assert verdict.notes == ["2 shards that no commit names"]


def test_damage_to_blocks_is_mended_by_repair_and_computing_again(root: Path) -> None:
    rng = np.random.default_rng(3)
    folder = next((root / "sets" / "demo").iterdir())
    for kind in ("shard of rows", "shard of grids", "marker", "zarr.json"):
        path = sorted(root.glob(KINDS[kind]))[0]
        flip(path, int(rng.integers(path.stat().st_size * 8)))
        for verdict in verify_store(Store(root), deep=True):
            assert repair_set(verdict).left == []
        write_missing(folder, 1, block_rows=16)
        assert len(check_blocks(folder, {1})) == 3
        assert not is_found(root)
        assert read_is_true_or_refused(root)
    assert commits.committed_blocks(folder, GROUP) == {0, 1, 2}
