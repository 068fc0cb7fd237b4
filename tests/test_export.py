"""Exports read back by other libraries, and what must not be in one that is de-identified."""

import hashlib
import hmac
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
import torch
from safetensors.torch import load_file
from tiny_sets import CLS, make_spec_of, prepare, values_of, writer_of

from cli import exchange
from featstore.datasets import manifest as manifests
from featstore.datasets.manifest import Manifest
from featstore.errors import ConfigError, IncompleteError, StoreError, UnknownNameError
from featstore.store import export as exports
from featstore.store.catalog import Store
from featstore.store.commits import RowState
from featstore.store.export import ExportConfig, Exported, export_features, new_salt, pseudonym
from featstore.store.features import FeatureSet
from featstore.store.importer import import_features
from featstore.store.layout import ArraySpec
from featstore.store.shards import numpy_dtype

COUNT, FAILED = 37, (4, 20)
GOOD = np.array([row for row in range(COUNT) if row not in FAILED])
MEAN = ArraySpec(name="mean_patch", row_shape=(8,), dtype="float16")
PATCHES = ArraySpec(name="patches", row_shape=(3, 8), dtype="float16")
SALT = bytes(range(32))


def make_manifest(count: int = COUNT) -> Manifest:
    """Samples with telling ids, paths, patients, studies and columns."""
    rows = range(count)
    text = pa.string()
    table = pa.table(
        {
            "id": pa.array([f"scan-{row:03d}-Miller" for row in rows], text),
            "path": pa.array([f"images/Miller_{row:03d}.png" for row in rows], text),
            "size": pa.array([100 + row for row in rows], pa.int64()),
            "split": pa.array([("train", "val", "test")[row % 3] for row in rows], text),
            "group": pa.array([f"patient-{row // 2:04d}" if row % 5 else None for row in rows], text),
            "study": pa.array([f"study-{row // 3:04d}" for row in rows], text),
            "mask_path": pa.nulls(count, text),
            "content": pa.nulls(count, text),
            "mtime_ns": pa.array([1] * count, pa.int64()),
            "kind": pa.array([("a", "b", None)[row % 3] for row in rows], text),
            "age": pa.array([str(20 + row) for row in rows], text),
            "report": pa.array([f"finding number {row}" for row in rows], text),
            "person": pa.array([f"who: patient-{row // 2:04d}" for row in rows], text),
            "number": pa.array([f"scan-{row:03d}-Miller" for row in rows], text),
        }
    )
    meta = {"root": "/nowhere/else", "adapter": "table"}
    return Manifest(name="demo", table=table, digest=manifests.table_digest(table), meta=meta)


def make(
    root: Path, *, dtype: str = "float16", blocks: tuple[int, ...] = (0, 1, 2), failed: Any = FAILED
) -> FeatureSet:
    arrays = [ArraySpec(name=array.name, row_shape=array.row_shape, dtype=dtype) for array in (CLS, MEAN, PATCHES)]
    folder = prepare(root, make_spec_of(stored_dtype=dtype), make_manifest(), arrays)
    exact = [ArraySpec(name=array.name, row_shape=array.row_shape, dtype="float32") for array in arrays]
    for block in blocks:
        with writer_of(folder, "cls+mean_patch+patches", block) as writer:
            span = range(writer.start, writer.stop)
            rows = {a.name: values_of(a, span.start, span.stop, 1).astype(numpy_dtype(dtype)) for a in exact}
            states = [RowState("0" * 32, "bad" if row in failed else None) for row in span]
            for row in failed:
                if row in span:
                    for values in rows.values():
                        values[row - span.start] = np.nan
            writer.append(rows, states)
            assert writer.commit()
    return Store(root)["demo", "tiny"]


def wanted(fs: FeatureSet, rows: np.ndarray = GOOD) -> np.ndarray:
    """cls and mean_patch beside each other."""
    return np.concatenate([fs.load("cls"), fs.load("mean_patch")], axis=1)[rows]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "PIECE_BYTES", 5 * 4 * 16)  # five rows of cls+mean_patch


def check_rows(path: Path, rows: np.ndarray = GOOD, labels: tuple[str, ...] = ("kind",)) -> None:
    table, manifest = pq.read_table(path), make_manifest().table.take(rows)
    names = ["id", "split", "group", "study", *labels]
    assert table.column_names[: len(names)] == names
    for name in names:
        assert table.column(name).to_pylist() == manifest.column(name).to_pylist()


def export(fs: FeatureSet, file: Path, **options: Any) -> Exported:
    return export_features(fs, file, ExportConfig(**options))


def test_npy(tmp_path: Path) -> None:
    fs = make(tmp_path / "store")
    seen: list[int] = []
    done = export_features(fs, tmp_path / "f.npy", ExportConfig(labels=("kind",)), advance=seen.append)
    np.testing.assert_array_equal(np.load(tmp_path / "f.npy"), wanted(fs))
    assert np.load(tmp_path / "f.npy").dtype == np.float16
    assert done == Exported(35, 16, "float16", 2, (tmp_path / "f.npy.rows.parquet", tmp_path / "f.npy"))
    assert seen == [5] * 7
    check_rows(tmp_path / "f.npy.rows.parquet")
    assert sorted(path.name for path in tmp_path.glob("*f.npy*")) == ["f.npy", "f.npy.rows.parquet"]


def test_npz(tmp_path: Path) -> None:
    fs = make(tmp_path / "store")
    export(fs, tmp_path / "f.npz", labels=("kind", "age"), split="val")
    rows = GOOD[GOOD % 3 == 1]
    with np.load(tmp_path / "f.npz") as data:
        assert data.files == ["features", "id", "split", "patient_id", "study", "kind", "age"]
        np.testing.assert_array_equal(data["features"], wanted(fs, rows))
        picked = make_manifest().table.take(rows)
        assert data["id"].tolist() == picked.column("id").to_pylist()
        assert data["patient_id"].tolist() == [value or "" for value in picked.column("group").to_pylist()]
    export(fs, tmp_path / "again.npz", labels=("kind", "age"), split="val")
    assert (tmp_path / "f.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
    assert zipfile.ZipFile(tmp_path / "f.npz").testzip() is None


def test_parquet(tmp_path: Path) -> None:
    fs = make(tmp_path / "store")
    export(fs, tmp_path / "f.parquet", labels=("kind",))
    check_rows(tmp_path / "f.parquet")
    column = pq.read_table(tmp_path / "f.parquet").column("features").combine_chunks()
    assert column.type == pa.list_(pa.float16(), 16)
    np.testing.assert_array_equal(column.flatten().to_numpy().reshape(-1, 16), wanted(fs))
    assert pq.ParquetFile(tmp_path / "f.parquet").num_row_groups == 7
    facts = json.loads(pq.read_schema(tmp_path / "f.parquet").metadata[b"featstore"])
    assert facts == {
        "set": "demo/tiny@42",
        "fingerprint": fs.fingerprint,
        "features": "cls+mean_patch",
        "manifest": fs.manifest.digest,
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_safetensors(tmp_path: Path, dtype: str) -> None:
    fs = make(tmp_path / "store", dtype=dtype)
    done = export(fs, tmp_path / "f.safetensors", features="cls")
    found = load_file(tmp_path / "f.safetensors")["features"]
    assert (found.dtype, done.dtype) == (getattr(torch, dtype), dtype)
    np.testing.assert_array_equal(found.float().numpy(), fs.load("cls")[GOOD].astype(np.float32))
    with safetensors.safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert file.metadata()["set"] == "demo/tiny@42"
    check_rows(tmp_path / "f.safetensors.rows.parquet", labels=())


@pytest.mark.parametrize("suffix", ["npy", "npz", "parquet"])
def test_bfloat16_becomes_float32_where_few_know_it(tmp_path: Path, suffix: str) -> None:
    fs = make(tmp_path / "store", dtype="bfloat16")
    assert export(fs, tmp_path / f"f.{suffix}").dtype == "float32"
    _, _, count = import_features(
        tmp_path / "new",
        tmp_path / f"f.{suffix}",
        dataset="d",
        model="m",
        ids_file=(tmp_path / "f.npy.rows.parquet") if suffix == "npy" else None,
    )
    assert count == 35
    np.testing.assert_array_equal(Store(tmp_path / "new")["d/m"].load("cls"), wanted(fs).astype(np.float32))


def test_faiss(tmp_path: Path) -> None:
    fs = make(tmp_path / "store")
    export(fs, tmp_path / "f.faiss", features="cls")
    index = faiss.read_index(str(tmp_path / "f.faiss"))
    rows = fs.load("cls")[GOOD].astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(index.reconstruct_n(0, 35), unit, atol=1e-6)
    similar, found = index.search(unit[:4].astype(np.float32), 3)
    np.testing.assert_array_equal(found, np.argsort(-(unit[:4] @ unit.T), axis=1)[:, :3])
    assert similar[:, 0] == pytest.approx(1, abs=1e-6)
    check_rows(tmp_path / "f.faiss.rows.parquet", labels=())


def test_faiss_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = make(tmp_path / "store")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(StoreError, match=r"a FAISS index needs the package faiss: pip install 'featstore\[cpu\]'"):
        export(fs, tmp_path / "f.faiss")
    assert not (tmp_path / "f.faiss").exists()


def test_failed_rows_can_be_kept(tmp_path: Path) -> None:
    fs = make(tmp_path / "store")
    done = export(fs, tmp_path / "f.npy", features="patches", failed="nan")
    found = np.load(tmp_path / "f.npy")
    assert (found.shape, done.left_out) == ((37, 24), 0)
    assert np.flatnonzero(np.isnan(found).any(1)).tolist() == list(FAILED)
    np.testing.assert_array_equal(found, fs.load("patches").reshape(37, 24))


def test_the_mean_over_all_tokens(tmp_path: Path) -> None:
    fs = make(tmp_path / "store")
    export(fs, tmp_path / "f.npy", features="mean_all")
    tokens = np.concatenate([fs.load("cls")[:, None], fs.load("patches")], axis=1).astype(np.float64)
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), tokens.mean(1)[GOOD], atol=1e-6)


def test_an_export_can_be_imported_again(tmp_path: Path) -> None:
    fs = make(tmp_path / "store")
    for suffix in ("npy", "npz", "parquet", "safetensors"):
        file = tmp_path / f"f.{suffix}"
        export(fs, file, labels=("kind",))
        ids = file.with_name(f"{file.name}.rows.parquet")
        import_features(tmp_path / suffix, file, dataset="d", model="m", ids_file=ids if ids.exists() else None)
        back = Store(tmp_path / suffix)["d/m"]
        np.testing.assert_array_equal(back.load("cls"), wanted(fs))
        picked = make_manifest().table.take(GOOD)
        for name in ("id", "split", "group"):
            assert back.manifest.column(name) == picked.column(name).to_pylist()


def texts_of(path: Path) -> str:
    """Everything that can be read in a file: its raw bytes, and what its format decodes to."""
    found = path.read_bytes().decode("latin-1")
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        names = [name for name in table.column_names if name != "features"]
        found += json.dumps(table.select(names).to_pydict()) + str(table.schema.metadata)
    if path.suffix == ".npz":
        with np.load(path) as data:
            found += json.dumps({name: data[name].tolist() for name in data.files if name != "features"})
    return found


@pytest.mark.parametrize("suffix", ["npy", "npz", "parquet", "safetensors", "faiss"])
def test_nothing_that_names_people_is_in_a_deidentified_export(tmp_path: Path, suffix: str) -> None:
    fs = make(tmp_path / "store")
    done = export(fs, tmp_path / f"f.{suffix}", labels=("kind", "age"), salt=SALT)
    manifest = make_manifest().table
    originals = [
        value for name in ("id", "path", "group", "study", "report") for value in manifest.column(name).to_pylist()
    ]
    telling = [value for value in originals if value] + ["Miller", "patient-", "study-", "/nowhere", fs.manifest.digest]
    for path in done.files:
        text = texts_of(path)
        assert [value for value in telling if value in text] == []
        assert SALT.hex() not in text
        assert SALT not in path.read_bytes()


def test_pseudonyms_keep_rows_together(tmp_path: Path) -> None:
    fs = make(tmp_path / "store")
    export(fs, tmp_path / "f.parquet", labels=("kind",), salt=SALT)
    table = pq.read_table(tmp_path / "f.parquet")
    expected = [
        hmac.new(SALT, f"id\0{sample}".encode(), hashlib.sha256).hexdigest()[:24]
        for sample in make_manifest().table.take(GOOD).column("id").to_pylist()
    ]
    assert table.column("id").to_pylist() == sorted(expected)
    order = GOOD[np.argsort(expected)]
    features = table.column("features").combine_chunks().flatten().to_numpy().reshape(-1, 16)
    np.testing.assert_array_equal(features, wanted(fs, order))
    picked = make_manifest().table.take(order)
    assert table.column("kind").to_pylist() == picked.column("kind").to_pylist()
    groups = picked.column("group").to_pylist()
    renamed = [None if group is None else pseudonym(group, "group", SALT) for group in groups]
    assert table.column("group").to_pylist() == renamed
    assert len(set(renamed)) == len(set(groups))
    assert pseudonym("x", "id", SALT) != pseudonym("x", "group", SALT) != pseudonym("x", "group", new_salt())


BAD_LABELS = {
    "id": "it is no label",
    "path": "it is no label",
    "group": "it is no label",
    "number": "it repeats the column 'id'",
    "person": "it repeats the column 'group'",
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_labels_that_name_people_are_refused(tmp_path: Path, name: str) -> None:
    fs = make(tmp_path / "store")
    with pytest.raises(ConfigError, match=rf"column '{name}' may name people \({BAD_LABELS[name]}\); leave it out"):
        export(fs, tmp_path / "f.npy", labels=(name,), salt=SALT)
    assert not list(tmp_path.glob("*f.npy*"))


def test_free_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = make(tmp_path / "store")
    monkeypatch.setattr(exports, "MAX_LABEL_TEXTS", 30)
    with pytest.raises(
        ConfigError, match=r"'report' may name people \(it holds 37 different texts or whole numbers, more than 30\)"
    ):
        export(fs, tmp_path / "f.npy", labels=("report",), salt=SALT)
    with pytest.raises(ConfigError, match=r"'age' may name people \(it holds 37 different .* more than 30\)"):
        export(fs, tmp_path / "f.npy", labels=("age",), salt=SALT)


ROWS = range(30)
PEOPLE: dict[str, tuple[list[Any], str | None]] = {
    "record": ([70_000_000 + 13 * (row // 2) for row in ROWS], "15 different long numbers, like those of records"),
    "born": ([f"1950{1 + row // 3:02d}{10 + row // 3:02d}" for row in ROWS], "10 different long numbers"),
    "birthday": ([f"19{50 + row // 10}-10-01" for row in ROWS], "3 different long numbers"),
    "floats": ([70_000_000.0 + row // 2 for row in ROWS], "15 different long numbers"),
    "inside": ([f"{row // 2:05d}" for row in ROWS], "repeats the column 'group'"),
    "counted": ([row // 2 for row in ROWS], "repeats the column 'group'"),
    "prefixed": ([f"P-{row // 2:05d}" for row in ROWS], "repeats the column 'group'"),
    "surname": ([f"Smith{chr(97 + row)}" for row in ROWS], "repeats the column 'id'"),
    "many": ([*range(100, 130)], "30 different texts or whole numbers, more than 20"),
    "binary": ([row % 2 for row in ROWS], None),
    "flags": ([bool(row % 3) for row in ROWS], None),
    "grade": ([float(row % 5) for row in ROWS], None),
    "folder": ([("Edema", "Normal")[row % 2] for row in ROWS], None),
    "third": ([("Edema", "Normal", "Other")[row % 3] for row in ROWS], None),
    "blank": ([None if row % 2 else "yes" for row in ROWS], None),
    "measured": ([1234.5678 + row for row in ROWS], None),
    "split": ([("train", "test")[row % 2] for row in ROWS], None),
}


@pytest.mark.parametrize("name", PEOPLE)
def test_numbers_that_name_people_are_refused_and_classes_are_not(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(exports, "MAX_LABEL_TEXTS", 20)
    values, why = PEOPLE[name]
    table = pa.table(
        {
            "id": [f"{('Edema', 'Normal')[row % 2]}/Smith{chr(97 + row)}{row}.png" for row in ROWS],
            "path": [f"{('train', 'test')[row % 2]}/{row}.png" for row in ROWS],
            "group": [f"patient{row // 2:05d}" for row in ROWS],
            "study": pa.nulls(30, pa.string()),
            "split": [("train", "test")[row % 2] for row in ROWS],
            name: values,
        }
    )
    manifest = Manifest(name="demo", table=table, digest="", meta={})
    if why is None:
        exports._check_label(manifest, name)
        return
    with pytest.raises(ConfigError, match=rf"column '{name}' may name people \(.*{why}.*\); leave it out of --labels"):
        exports._check_label(manifest, name)


def test_files_are_never_replaced_unasked(tmp_path: Path) -> None:
    fs = make(tmp_path / "store")
    export(fs, tmp_path / "f.npy")
    before = (tmp_path / "f.npy").read_bytes()
    for path in (tmp_path / "f.npy.rows.parquet", tmp_path / "f.npy"):
        with pytest.raises(ConfigError, match=f"{path.name} exists; --force replaces it, or name another file"):
            export(fs, tmp_path / "f.npy", features="cls")
        path.unlink()
        if path.name.endswith("parquet"):
            assert (tmp_path / "f.npy").read_bytes() == before
    export(fs, tmp_path / "f.npy")
    export(fs, tmp_path / "f.npy", features="cls", force=True)
    assert np.load(tmp_path / "f.npy").shape == (35, 8)


def test_a_file_written_meanwhile_is_kept(tmp_path: Path) -> None:
    fs = make(tmp_path / "store")

    def intrude(_: int) -> None:
        (tmp_path / "f.parquet").write_text("mine")

    with pytest.raises(ConfigError, match=r"f.parquet was written by somebody else meanwhile; name another file"):
        export_features(fs, tmp_path / "f.parquet", ExportConfig(), advance=intrude)
    assert (tmp_path / "f.parquet").read_text() == "mine"
    assert len(list(tmp_path.glob("*.partial"))) + len(list(tmp_path.glob(".*.partial"))) == 0


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    fs = make(tmp_path / "store")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match=r"f.npz: cannot write \(No space left on device\)"):
        export_features(fs, tmp_path / "f.npz", ExportConfig(), advance=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_what_cannot_be_exported_is_told(tmp_path: Path) -> None:
    fs = make(tmp_path / "store", blocks=(0, 2))
    with pytest.raises(IncompleteError, match="16 of 37 rows are not extracted yet; run the same `featstore extract`"):
        export(fs, tmp_path / "f.npy")
    with pytest.raises(ConfigError, match=r"f.csv: the ending says the format and must be one of \.npy, \.npz"):
        export(fs, tmp_path / "f.csv")
    with pytest.raises(ConfigError, match="an index cannot hold NaN rows; leave --failed nan out"):
        export(fs, tmp_path / "f.faiss", failed="nan")
    with pytest.raises(UnknownNameError, match="data set 'demo' has no split 'dev'; its splits: test, train, val"):
        export(fs, tmp_path / "f.npy", split="dev")
    with pytest.raises(UnknownNameError, match="has no column 'Edema'; its columns: id, path"):
        export(fs, tmp_path / "f.npy", labels=("Edema",))
    with pytest.raises(ConfigError, match="a salt needs at least 16 bytes, got 3;"):
        ExportConfig(salt=b"abc")
    every = make(tmp_path / "none", failed=range(COUNT))
    with pytest.raises(ConfigError, match="all 37 rows failed, nothing is left to export; see --failed nan"):
        export(every, tmp_path / "f.npy")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "store")
    store = str(tmp_path / "store")
    exchange.export("demo/tiny", tmp_path / "f.npy", labels="kind, age", store=store)
    assert "35 rows of 16 float16 to " in capsys.readouterr().out
    exchange.export("demo/tiny", tmp_path / "g.npz", deidentify=True, store=store)
    assert "pseudonyms by a random salt that is kept nowhere" in capsys.readouterr().out
    salt = tmp_path / "salt"
    salt.write_bytes(SALT)
    for name in ("h.parquet", "i.parquet"):
        exchange.export("demo/tiny", tmp_path / name, deidentify=True, salt=salt, store=store, json=True)
        found = json.loads(capsys.readouterr().out)
        assert (found["rows"], found["left_out"], found["deidentified"]) == (35, 2, True)
    assert (tmp_path / "h.parquet").read_bytes() == (tmp_path / "i.parquet").read_bytes()
    with pytest.raises(ConfigError, match="--salt makes pseudonyms, which only --deidentify asks for; add it or leave"):
        exchange.export("demo/tiny", tmp_path / "j.npz", salt=salt, store=store)
