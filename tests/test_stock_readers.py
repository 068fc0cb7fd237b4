"""zarr-python, tensorstore and xarray open a set's arrays without this package's reader: equal bits everywhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - gives numpy the type bfloat16
import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorstore
import zarr
from tiny_sets import CLS, PATCHES, make_manifest, make_spec_of, named, prepare, values_of, write_missing

from featstore.store.bfloat16 import register
from featstore.store.features import FeatureSet
from featstore.store.layout import ArraySpec

BLOCK = 16
SHAPES = {
    "cls": (8,),
    "registers": (2, 8),
    "patches": (3, 8),
    "layers/3/cls": (8,),
    "layers/3/patches": (3, 8),
}
AXES = {"cls": ("row", "dim"), "registers": ("row", "register", "dim"), "patches": ("row", "patch", "dim")}


def arrays_of(dtype: str) -> list[ArraySpec]:
    return [ArraySpec(name=name, row_shape=shape, dtype=dtype) for name, shape in SHAPES.items()]


def make_set(root: Path, dtype: str, count: int) -> Path:
    spec = make_spec_of(block_rows=BLOCK, stored_dtype=dtype)
    folder = prepare(root, spec, make_manifest(named(count)), arrays_of(dtype))
    write_missing(folder, 1, block_rows=BLOCK)
    return folder


@pytest.fixture(scope="module", params=["float16", "float32", "bfloat16", "int8"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[1, 16, 37])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, dtype: str) -> tuple[Path, str, int]:
    """One row, one whole block, and two with a partial third, whose last chunk is padded on disk."""
    return make_set(tmp_path_factory.mktemp("set"), dtype, request.param), dtype, request.param


@pytest.fixture(autouse=True)
def known_types() -> Iterator[None]:
    """zarr as others have it, but for bfloat16 where a test registers it."""
    before = dict(zarr.dtype.data_type_registry.contents)
    yield
    zarr.dtype.data_type_registry.contents.clear()
    zarr.dtype.data_type_registry.contents.update(before)


def same(found: Any, wanted: np.ndarray) -> None:
    """Equal shape, type and bits; NaN too."""
    found = np.asarray(found)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert found.tobytes() == wanted.tobytes()


def by_tensorstore(path: Path) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result())


def test_tensorstore_reads_every_type(case: tuple[Path, str, int]) -> None:
    folder, dtype, count = case
    for array in arrays_of(dtype):
        same(by_tensorstore(folder / "data.zarr" / array.name), values_of(array, 0, count, 1))


def test_tensorstore_reads_rows_in_any_order(case: tuple[Path, str, int]) -> None:
    folder, dtype, count = case
    array = arrays_of(dtype)[2]
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/data.zarr/{array.name}/"}}
    rows = np.array([count - 1, 0, count // 2, 0])
    same(tensorstore.open(spec).result()[rows, 1].read().result(), values_of(array, 0, count, 1)[rows, 1])


def test_zarr_walks_the_group(case: tuple[Path, str, int]) -> None:
    folder, dtype, count = case
    if dtype == "bfloat16":
        register()
    group: Any = zarr.open_group(folder / "data.zarr", mode="r")
    assert sorted(group) == ["cls", "layers", "patches", "registers"]
    assert sorted(group["layers/3"]) == ["cls", "patches"]
    assert group.attrs["featstore"]["fingerprint"][:8] == folder.name[-8:]
    for array in arrays_of(dtype):
        held = group[array.name]
        wanted = values_of(array, 0, count, 1)
        assert held.metadata.dimension_names == AXES[array.name.rsplit("/")[-1]]
        same(held[:], wanted)
        same(held.oindex[[count - 1, 0]], wanted[[count - 1, 0]])
        same(held[count - 1], wanted[-1])


def test_zarr_needs_the_registration_for_bfloat16(tmp_path: Path) -> None:
    folder = make_set(tmp_path, "bfloat16", 3)
    zarr.dtype.data_type_registry.contents.pop("bfloat16", None)
    with pytest.raises(ValueError, match="bfloat16"):
        zarr.open_array(folder / "data.zarr/cls", mode="r")
    register()
    same(zarr.open_array(folder / "data.zarr/cls", mode="r")[:], values_of(arrays_of("bfloat16")[0], 0, 3, 1))


@pytest.mark.parametrize("group", [None, "layers/3"])
def test_xarray_knows_the_axes(case: tuple[Path, str, int], group: str | None) -> None:
    xarray = pytest.importorskip("xarray")
    folder, dtype, count = case
    if dtype == "bfloat16":
        register()
    # Without mask_and_scale a fill value of NaN would turn float16 into float32 and integers into floats.
    found = xarray.open_zarr(folder / "data.zarr", group=group, consolidated=False, mask_and_scale=False, chunks=None)
    wanted = {"row": count, "patch": 3, "dim": 8}
    assert dict(found.sizes) == (wanted if group else {**wanted, "register": 2})
    for array in arrays_of(dtype):
        parent, _, name = array.name.rpartition("/")
        if parent == (group or ""):
            assert found[name].dims == AXES[name]
            same(found[name].values, values_of(array, 0, count, 1))
            same(found[name].isel(row=count - 1, dim=2).values, values_of(array, 0, count, 1)[-1, ..., 2])


def test_a_grown_set_is_one_array_with_a_gap_of_fill_values(tmp_path: Path) -> None:
    """37 rows, then 5 more, which begin at the next block; the mapping says where each sample lies."""
    spec = make_spec_of(block_rows=BLOCK)
    folder = prepare(tmp_path, spec, make_manifest(named(37)), [CLS, PATCHES])
    write_missing(folder, 1, block_rows=BLOCK)
    grown = make_manifest([*named(5, 37), *named(36)], sizes=[*range(500, 505), *range(100, 136)])
    prepare(tmp_path, spec, grown, [CLS, PATCHES])
    write_missing(folder, 1, block_rows=BLOCK)
    rows = pq.ParquetFile(folder / "rows" / f"{grown.short}.parquet").read().column("row").to_numpy()
    np.testing.assert_array_equal(rows, [*range(48, 53), *range(36)])
    fs = FeatureSet(folder, grown)
    for array in (CLS, PATCHES):
        path = folder / "data.zarr" / array.name
        whole = np.asarray(zarr.open_array(path, mode="r")[:])
        same(by_tensorstore(path), whole)
        same(whole[rows], values_of(array, 0, 53, 1)[rows])
        same(whole[rows], fs.array(array.name).load())
        assert whole.shape == (53, *array.row_shape)
        assert np.isnan(whole[37:48]).all()


def test_rows_that_are_not_written_yet_are_fill_values(tmp_path: Path) -> None:
    """Stock readers know nothing of commits, so an unfinished set must look unfinished to them."""
    spec = make_spec_of(block_rows=BLOCK)
    folder = prepare(tmp_path, spec, make_manifest(named(20)), [CLS])
    assert np.isnan(np.asarray(zarr.open_array(folder / "data.zarr/cls", mode="r")[:])).all()
    assert np.isnan(by_tensorstore(folder / "data.zarr/cls").astype(np.float32)).all()
