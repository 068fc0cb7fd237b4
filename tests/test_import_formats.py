"""Every format that features come in, written by its own library; and files that lie about what they hold."""

import io
import json
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from tiny_sets import make_manifest, named

from cli import exchange
from featstore.datasets import manifest as manifests
from featstore.errors import ManifestError, StoreError
from featstore.store import import_formats, importer
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from featstore.store.import_formats import read_arrays, read_ids, spool
from featstore.store.importer import import_features
from featstore.store.verify import verify_set

RNG = np.random.default_rng(0)
COUNT = 23
FEATURES = RNG.standard_normal((COUNT, 6)).astype(np.float32)
IDS = named(COUNT)


def bring(tmp_path: Path, file: Path, **options: Any) -> FeatureSet:
    store, folder, count = import_features(tmp_path / "store", file, dataset="demo", model="lab", **options)
    assert count == COUNT
    entry = next(entry for entry in store.entries() if entry.folder == folder)
    assert verify_set(store, entry, deep=True).ok
    return store.open(entry)


def save_ids(path: Path) -> Path:
    path.write_text("\n".join(IDS) + "\n")
    return path


def write_npy(path: Path, features: np.ndarray) -> None:
    np.save(path, features)


def write_fortran(path: Path, features: np.ndarray) -> None:
    np.save(path, np.asfortranarray(features))


def write_npz(path: Path, features: np.ndarray) -> None:
    np.savez_compressed(path, features=features, id=np.array(IDS))


def write_fixed(path: Path, features: np.ndarray) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    pq.write_table(pa.table({"id": IDS, "features": column}), path, row_group_size=5)


def write_lists(path: Path, features: np.ndarray) -> None:
    column = pa.array(features.tolist(), pa.list_(pa.from_numpy_dtype(features.dtype)))
    pq.write_table(pa.table({"features": column, "id": IDS, "grade": list(range(COUNT))}), path, row_group_size=7)


def write_columns(path: Path, features: np.ndarray) -> None:
    columns = {f"features{number}": features[:, number] for number in reversed(range(features.shape[1]))}
    pq.write_table(pa.table({"id": IDS, **columns}), path)


def write_hdf5(path: Path, features: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features, chunks=(4, features.shape[1]), compression="gzip")
        file["id"] = IDS


def write_safetensors(path: Path, features: np.ndarray) -> None:
    kind = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}[features.dtype.name]
    save_file({"other": torch.zeros(3), "features": torch.from_numpy(features).to(kind)}, path)


FORMATS: dict[str, tuple[str, Callable[[Path, np.ndarray], None], bool]] = {
    "npy": ("f.npy", write_npy, False),
    "fortran": ("f.npy", write_fortran, False),
    "npz": ("f.npz", write_npz, True),
    "fixed lists": ("f.parquet", write_fixed, True),
    "lists": ("f.parquet", write_lists, True),
    "columns": ("f.parquet", write_columns, True),
    "hdf5": ("f.h5", write_hdf5, True),
    "upper case": ("F.HDF5", write_hdf5, True),
    "safetensors": ("f.safetensors", write_safetensors, False),
}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_brings_the_same_set(
    tmp_path: Path, kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_formats, "PIECE_ROWS", 4)
    monkeypatch.setattr(importer, "PIECE_BYTES", 100)
    name, write, has_ids = FORMATS[kind]
    features = FEATURES.astype(dtype)
    write(tmp_path / name, features)
    fs = bring(tmp_path, tmp_path / name, ids_file=None if has_ids else save_ids(tmp_path / "ids.txt"))
    assert fs.cls.dtype == ("float16" if dtype == "float16" else "float32")
    np.testing.assert_array_equal(fs.load("cls"), features.astype(fs.cls.dtype))
    assert fs.manifest.column("id") == IDS
    np.savez(tmp_path / "same.npz", features=features, id=np.array(IDS))
    assert bring(tmp_path, tmp_path / "same.npz").folder == fs.folder


def test_bfloat16_stays(tmp_path: Path) -> None:
    save_file({"features": torch.from_numpy(FEATURES).bfloat16()}, tmp_path / "f.safetensors")
    fs = bring(tmp_path, tmp_path / "f.safetensors", ids_file=save_ids(tmp_path / "ids.txt"))
    assert fs.cls.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(fs.load("cls"), torch.from_numpy(FEATURES).bfloat16().float().numpy())


def test_ids_of_a_safetensors_file_may_be_integers(tmp_path: Path) -> None:
    save_file({"x": torch.from_numpy(FEATURES), "ids": torch.arange(COUNT)}, tmp_path / "f.safetensors")
    fs = bring(tmp_path, tmp_path / "f.safetensors", features_key="x")
    assert fs.manifest.column("id") == [str(number) for number in range(COUNT)]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "txt", "one.csv"])
def test_ids_beside_the_features(tmp_path: Path, suffix: str) -> None:
    np.save(tmp_path / "f.npy", FEATURES)
    path = tmp_path / f"ids.{suffix}"
    table = pa.table({"id": IDS, "split": ["train", "val", "test", "train"] * 5 + ["val"] * 3, "age": [*range(COUNT)]})
    if suffix == "txt":
        save_ids(path)
    elif suffix == "parquet":
        pq.write_table(table, path)
    elif suffix == "one.csv":
        path.write_text("whatever\n" + "\n".join(IDS) + "\n")
    else:
        separator = "," if suffix == "csv" else "\t"
        rows = zip(*(column.to_pylist() for column in table.columns))
        path.write_text("\n".join(separator.join(map(str, row)) for row in [table.column_names, *rows]) + "\n")
    fs = bring(tmp_path, tmp_path / "f.npy", ids_file=path)
    assert fs.manifest.column("id") == IDS
    if suffix in ("csv", "tsv", "parquet"):
        assert fs.manifest.column("split") == table.column("split").to_pylist()
        assert fs.manifest.column("age") == [str(number) for number in range(COUNT)]


def test_ids_beside_replace_those_in_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", features=FEATURES, path=np.array(IDS[::-1]))
    fs = bring(tmp_path, tmp_path / "f.npz", ids_file=save_ids(tmp_path / "ids.txt"))
    np.testing.assert_array_equal(fs.load("cls"), FEATURES)


def test_rows_find_their_samples(tmp_path: Path) -> None:
    manifests.save(tmp_path / "store" / "datasets", make_manifest(IDS))
    order = RNG.permutation(COUNT)
    np.save(tmp_path / "f.npy", FEATURES[order])
    (tmp_path / "ids.txt").write_text("\n".join(IDS[row] for row in order))
    fs = bring(tmp_path, tmp_path / "f.npy", ids_file=tmp_path / "ids.txt")
    np.testing.assert_array_equal(fs.load("cls"), FEATURES)


def test_features_stay_on_disk(tmp_path: Path) -> None:
    for kind in ("npy", "fortran", "fixed lists", "hdf5", "safetensors"):
        name, write, _ = FORMATS[kind]
        write(tmp_path / name, FEATURES)
        found = read_arrays(tmp_path / name, "features", None)["features"]
        assert isinstance(found, np.memmap), kind
        np.testing.assert_array_equal(found, FEATURES)
    spooled = spool((3, 2), np.dtype(np.float32), iter([np.ones((2, 2)), np.zeros((1, 2))]))
    assert spooled.tolist() == [[1, 1], [1, 1], [0, 0]]


def header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def tensors(path: Path, facts: Any, data: bytes = b"") -> None:
    text = json.dumps(facts).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_objects(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def hdf5(write: Callable[[Any], None]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with h5py.File(path, "w") as file:
            write(file)

    return make


def external(file: Any) -> None:
    with h5py.File(Path(file.filename).with_name("other.h5"), "w") as other:
        other["features"] = FEATURES
    file["features"] = h5py.ExternalLink("other.h5", "features")


def parquet(**columns: Any) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


def zeros(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("features", shape=(10**9, 1000), dtype="f4", chunks=(1000, 1000))


def npz_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("features.npy", "w") as file:
        file.write(header((70 * 2**18, 1)))
        for _ in range(70):
            file.write(bytes(2**20))


def npz_parts(path: Path) -> None:
    np.savez_compressed(path, x0=np.zeros(10 * 2**19), x1=np.zeros(10 * 2**19))


def npz_file(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def text_bomb(path: Path) -> None:
    # Different texts that compress well.
    pq.write_table(pa.table({"id": ["a" * 2**20 + str(row) for row in range(80)]}), path, compression="zstd")


def rows_bomb(path: Path) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(9 * 2**20, np.int8)), ["a" * 2**16])
    pq.write_table(pa.table({"id": column}), path)


def npz_liar(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("features.npy", header((10**12, 10)))


def dictionary_bomb(path: Path) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2**24, np.float64)), 2**12)
    pq.write_table(pa.table({"features": column}), path)


NOT_NPY = r"not an \.npy of a plain array \(.*{}.*\); objects are never unpickled"
LIES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "npy objects": ("f.npy", write_objects, NOT_NPY.format("holds Python objects")),
    "npy too short": (
        "f.npy",
        lambda p: p.write_bytes(header((10**12, 10))),
        NOT_NPY.format("declares 4000000"),
    ),
    "npy too long": ("f.npy", lambda p: p.write_bytes(header((1, 1)) + b"12345"), NOT_NPY.format("the file has 5")),
    "npy negative": ("f.npy", lambda p: p.write_bytes(header((-1, 4))), NOT_NPY.format("declares -16")),
    "npy text": ("f.npy", lambda p: p.write_text("hello"), NOT_NPY.format("does not begin like one")),
    "npy version": ("f.npy", lambda p: p.write_bytes(b"\x93NUMPY\x09\x00"), NOT_NPY.format("version")),
    "npy cut": ("f.npy", lambda p: p.write_bytes(header((1, 1))[:30]), NOT_NPY.format("")),
    "npz liar": ("f.npz", npz_liar, r"not an \.npz of plain arrays \(its header declares .* the file has 0\)"),
    "npz bomb": (
        "f.npz",
        npz_bomb,
        r"with 'features', 734\d+ bytes would be read from the \d+ of the file; features do",
    ),
    "safetensors length": (
        "f.safetensors",
        lambda p: p.write_bytes((10**15).to_bytes(8, "little") + b"{}"),
        "not a safetensors file .its header declares 1000000000000000 bytes, the file has 10",
    ),
    "safetensors short": ("f.safetensors", lambda p: p.write_bytes(b"abc"), "not a safetensors file"),
    "safetensors shape": (
        "f.safetensors",
        lambda p: tensors(p, {"features": {"dtype": "F32", "shape": [10**9, 9], "data_offsets": [0, 8]}}, bytes(8)),
        r"a tensor of shape \(1000000000, 9\) takes 36000000000 bytes, its place has 8 of 8",
    ),
    "safetensors outside": (
        "f.safetensors",
        lambda p: tensors(p, {"features": {"dtype": "F32", "shape": [2, 1], "data_offsets": [4, 12]}}, bytes(8)),
        r"takes 8 bytes, its place has 8 of 8",
    ),
    "safetensors list": ("f.safetensors", lambda p: tensors(p, [1, 2]), "not a safetensors file"),
    "parquet text": ("f.parquet", lambda p: p.write_text("hello"), "not a parquet file that can be read"),
    "parquet ragged": (
        "f.parquet",
        parquet(id=["a", "b"], features=[[1.0, 2.0], [1.0]]),
        "every row of the features must hold 2 numbers, and no null; some do not",
    ),
    "parquet null row": (
        "f.parquet",
        parquet(id=["a", "b"], features=[[1.0, 2.0], None]),
        "rows of the features are null; leave such samples out of the file",
    ),
    "parquet null number": (
        "f.parquet",
        parquet(id=["a", "b"], features=[[1.0, 2.0], [None, 1.0]]),
        "every row of the features must hold 2 numbers, and no null",
    ),
    "parquet bomb": ("f.parquet", dictionary_bomb, "with 'features', 134217728 bytes would be read from the"),
    "parquet none": ("f.parquet", parquet(id=["a"]), "needs an array 'features' .*; it has id"),
    "hdf5 text": ("f.h5", lambda p: p.write_text("hello"), "not an HDF5 file that can be read"),
    "hdf5 external": (
        "f.h5",
        hdf5(external),
        "'features' lies in another file, which is not followed; copy its",
    ),
    "hdf5 bomb": ("f.h5", zeros, "with 'features', 4000000000000 bytes would be read from the"),
    "hdf5 objects": (
        "f.h5",
        hdf5(lambda f: f.create_dataset("features", (3,), dtype=h5py.vlen_dtype(np.float32))),
        "'features' holds objects, which are never read; store plain numbers or text",
    ),
    "npz bomb in parts": ("f.npz", npz_parts, r"with 'x1', 838\d+ bytes would be read from the"),
    "npz file": ("f.npz", npz_file, r"not an \.npz of plain arrays \(it holds the file 'readme.txt'\)"),
    "parquet text bomb": ("f.parquet", text_bomb, "with 'id', .* bytes would be read from the"),
    "parquet rows bomb": ("f.parquet", rows_bomb, "with 'id', .* bytes would be read from the"),
    "parquet features of text": (
        "f.parquet",
        parquet(id=["a"], features=[["b"]]),
        "features must be numbers, 'features' holds string; convert them",
    ),
    "hdf5 text bomb": (
        "f.h5",
        hdf5(lambda f: f.create_dataset("id", (10**7,), "S16", chunks=True)),
        "with 'id', .* bytes would be read from the",
    ),
    "hdf5 chunk bomb": (
        "f.h5",
        hdf5(lambda f: f.create_dataset("features", (3, 2), "f4", chunks=(10**8, 2), maxshape=(None, 2))),
        "with 'features', 800000000 bytes would be read from the",
    ),
    "hdf5 none": ("f.h5", hdf5(lambda f: f.create_dataset("id", data=IDS)), "needs an array 'features' .*; it has id"),
}


@pytest.mark.parametrize("make", [text_bomb, rows_bomb])
def test_tables_of_ids_that_grow_are_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "ids.parquet")
    with pytest.raises(
        ManifestError, match=r"ids.parquet: with 'id', \d+ bytes would be read from the \d+ of the file"
    ):
        read_ids(tmp_path / "ids.parquet")


def test_no_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("npz", "lists", "hdf5"):
        name, write, _ = FORMATS[kind]
        write(tmp_path / name, FEATURES)

        def refuse(*_: Any) -> None:
            raise MemoryError("no more")

        with monkeypatch.context() as patch:
            patch.setattr(import_formats._Texts, "append", refuse)
            with pytest.raises(ManifestError, match=r"does not fit into memory \(no more\)"):
                read_arrays(tmp_path / name, "features", None)


REPORTS = ["no finding"] * COUNT
REPORTS[5] = "é" * 50_000


@pytest.mark.parametrize("suffix", ["npz", "parquet", "h5", "ids.parquet", "ids.csv"])
def test_one_long_text_does_not_widen_all_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / (suffix if suffix.startswith("ids") else f"f.{suffix}")
    table = pa.table({"id": IDS, "report": REPORTS, "age": [float(row % 3) for row in range(COUNT)]})
    if suffix == "npz":
        np.savez(path, features=FEATURES, id=np.array(IDS), report=np.array(REPORTS), note=np.zeros((COUNT, 2)))
    elif suffix == "h5":
        with h5py.File(path, "w") as file:
            file["features"], file["id"], file["report"], file["note"] = FEATURES, IDS, REPORTS, np.zeros((COUNT, 2))
    elif suffix == "ids.csv":
        csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    arrays = read_ids(path) if suffix.startswith("ids") else read_arrays(path, "features", None)
    assert arrays["id"].tolist() == IDS
    report = arrays["report"]
    assert (report.tolist(), report.dtype, report.nbytes) == (REPORTS, np.dtype(object), 8 * COUNT)
    assert len({id(text) for text in report}) == 2  # equal texts are one
    if suffix in ("npz", "h5"):
        assert (arrays["note"].shape, arrays["note"].strides) == ((COUNT, 2), (0, 0))
    elif suffix != "ids.csv":
        assert arrays["age"].tolist() == [str(float(row % 3)) for row in range(COUNT)]


def test_bytes_nulls_and_pieces_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_formats, "PIECE_BYTES", 7)
    monkeypatch.setattr(import_formats, "PIECE_ROWS", 4)
    np.savez(tmp_path / "f.npz", features=FEATURES, id=np.array(IDS).astype("S"))
    assert read_arrays(tmp_path / "f.npz", "features", None)["id"].tolist() == IDS
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["id"], file["none"] = np.array(IDS).astype("S"), np.array([], "S3")
    found = read_arrays(tmp_path / "f.h5", "features", None)
    assert (found["id"].tolist(), found["none"].tolist()) == (IDS, [])
    names = [None if row % 3 else name for row, name in enumerate(IDS)]
    flags = [None if row % 2 else row % 4 == 0 for row in range(COUNT)]
    table = pa.table({"name": names, "flag": flags, "none": pa.nulls(COUNT), "list": [[1]] * COUNT})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=5)
    found = read_ids(tmp_path / "t.parquet")
    assert {key: value.tolist() for key, value in found.items()} == {
        "name": [name or "" for name in names],
        "flag": ["" if flag is None else str(flag) for flag in flags],
        "none": [""] * COUNT,
    }


@pytest.mark.parametrize("kind", ["lists", "hdf5"])
def test_a_full_temporary_folder_is_told_as_such(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, write, _ = FORMATS[kind]
    write(tmp_path / name, FEATURES)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: Path("/dev/full").open("wb", 0))  # noqa: SIM115
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/scratch")
    with pytest.raises(StoreError, match=r"^/scratch: cannot keep decoded features there \(No space left.*TMPDIR"):
        read_arrays(tmp_path / name, "features", None)


@pytest.mark.parametrize("case", LIES)
def test_files_that_lie_are_refused(tmp_path: Path, case: str) -> None:
    name, write, message = LIES[case]
    write(tmp_path / name)
    with pytest.raises(ManifestError, match=message):
        import_features(tmp_path / "store", tmp_path / name, dataset="demo", model="lab")
    assert not (tmp_path / "store").exists()


def test_numbers_alone_need_ids(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", FEATURES)
    with pytest.raises(ManifestError, match=r"one of id, ids, path, paths \(--ids-key\); it has features"):
        import_features(tmp_path / "store", tmp_path / "f.npy", dataset="demo", model="lab")
    np.save(tmp_path / "f.npy", FEATURES[:0])
    with pytest.raises(ManifestError, match=r"got float32 \(0, 6\) and 23 ids"):
        import_features(
            tmp_path / "store", tmp_path / "f.npy", dataset="d", model="m", ids_file=save_ids(tmp_path / "ids.txt")
        )


@pytest.mark.parametrize("suffix", ["npy", "parquet", "safetensors", "h5"])
def test_absent_files_are_told(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ManifestError, match=rf"f.{suffix}: no such file; import takes an .{suffix} with features"):
        read_arrays(tmp_path / f"f.{suffix}", "features", None)


def test_tables_of_ids_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such file; --ids takes a csv, tsv, txt or parquet file"):
        read_ids(tmp_path / "ids.csv")
    (tmp_path / "ids.json").write_text("[]")
    with pytest.raises(ManifestError, match="--ids takes a csv, tsv, txt or parquet file, by its ending; rename"):
        read_ids(tmp_path / "ids.json")
    (tmp_path / "ids.parquet").write_text("no")
    with pytest.raises(ManifestError, match=r"ids.parquet: not a parquet file \(.*\); write it again"):
        read_ids(tmp_path / "ids.parquet")
    (tmp_path / "ids.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match=r"ids.txt: not UTF-8 text \(.*\); save it as UTF-8, one id a line"):
        read_ids(tmp_path / "ids.txt")


def test_hdf5_without_its_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hdf5(tmp_path / "f.h5", FEATURES)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(StoreError, match=r"HDF5 files need the package h5py: pip install 'featstore\[medical\]'"):
        read_arrays(tmp_path / "f.h5", "features", None)


def test_sets_of_every_format_stand_beside_each_other(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", features=FEATURES, id=np.array(IDS))
    bring(tmp_path, tmp_path / "f.npz")
    save_file({"features": torch.from_numpy(FEATURES).bfloat16()}, tmp_path / "f.safetensors")
    bring(tmp_path, tmp_path / "f.safetensors", ids_file=save_ids(tmp_path / "ids.txt"))
    assert len(Store(tmp_path / "store").sets()) == 2


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "f.npy", FEATURES)
    ids, store = save_ids(tmp_path / "ids.txt"), str(tmp_path / "store")
    exchange.import_(tmp_path / "f.npy", dataset="demo", name="lab", ids=ids, store=store)
    assert "demo/lab: 23 rows imported into lab-" in capsys.readouterr().out
    exchange.import_(tmp_path / "f.npy", dataset="demo", name="lab", ids=ids, store=store, json=True)
    assert json.loads(capsys.readouterr().out)["rows"] == 23
