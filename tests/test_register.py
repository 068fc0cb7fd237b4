"""Registration: tables, folders, adapters by name, growth of a registered data set."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featstore.configs import RegisterConfig
from featstore.datasets import DATASETS, choose_adapter, folder, read_source, table
from featstore.datasets.manifest import Manifest, table_digest
from featstore.datasets.source import Source
from featstore.datasets.splits import split_by_group
from featstore.errors import ConfigError, ManifestError, UnknownNameError
from featstore.register import register
from featstore.store.catalog import Store


def images(root: Path, *names: str) -> Path:
    """Files of a few bytes: registration opens no image."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def csv_text(header: str, *rows: str) -> str:
    return "\n".join([header, *rows]) + "\n"


def add_table(root: Path, text: str, name: str = "labels.csv") -> Path:
    (root / name).write_text(text)
    return Path(name)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return images(tmp_path / "data", "a.png", "b.png", "c/d.png")


# --- tables


def test_table_keeps_every_cell_and_fills_the_reserved_columns(root: Path, store_path: Path) -> None:
    add_table(
        root,
        csv_text(
            "file,pid,visit,part,seg,Edema,age",
            "./a.png,7,1,Train,a.png,1.0,50",
            "b.png,,,VALIDATE,,-1.0,",
            "c//d.png,8,2,,c/d.png,,61",
        ),
    )
    config = RegisterConfig(
        table=Path("labels.csv"),
        path_column="file",
        group_column="pid",
        study_column="visit",
        split_column="part",
        mask_column="seg",
        label_columns="Edema, age",
    )
    result, before = register(store_path, "mine", root, config)
    assert before is None
    assert result.column("id") == ["a.png", "b.png", "c/d.png"]
    assert result.column("path") == ["a.png", "b.png", "c/d.png"]
    assert result.column("group") == ["7", None, "8"]
    assert result.column("study") == ["1", None, "2"]
    assert result.column("split") == ["train", "val", ""]
    assert result.column("mask_path") == ["a.png", None, "c/d.png"]
    assert result.column("file") == ["./a.png", "b.png", "c//d.png"]
    assert result.column("Edema") == ["1.0", "-1.0", None]
    assert result.column("age") == ["50", None, "61"]
    assert result.meta["label_columns"] == ["Edema", "age"]
    assert result.meta["split_origin"] == "column part"
    assert result.meta["groups_known"] is True
    assert Store(store_path).manifest("mine").digest == result.digest


def test_table_without_split_is_split_by_group(root: Path, store_path: Path) -> None:
    add_table(root, csv_text("path,pid", "a.png,p", "b.png,", "c/d.png,p"))
    config = RegisterConfig(table=Path("labels.csv"), group_column="pid", split_seed=5)
    result, _ = register(store_path, "mine", root, config)
    assert result.column("split") == split_by_group(["p", "id:b.png", "p"], seed=5)
    assert result.meta["split_origin"] == "seeded by group, 70/10/20, seed 5"


def test_tsv_gz_and_own_ids(root: Path) -> None:
    import gzip

    (root / "labels.tsv.gz").write_bytes(gzip.compress(b"path\tkey\na.png\t01\nb.png\t1\n"))
    source = table.read(root, table=Path("labels.tsv.gz"), id_column="key")
    assert source.table.column("id").to_pylist() == ["01", "1"]


def test_parquet_keeps_types_and_reads_any_column_as_text(root: Path, store_path: Path) -> None:
    data = pa.table(
        {
            "path": pa.array(["a.png", "b.png", "c/d.png"]).dictionary_encode(),
            "pid": pa.array([7, 7, None], pa.int32()),
            "study": pa.array([1.5, np.nan, None]),
            "split": pa.array(["train", "test", None]).dictionary_encode(),
            "Edema": pa.array([1, None, -1], pa.int8()),
            "age": pa.array([50.5, np.nan, None]),
            "box": pa.array([[1, 2], None, []]),
        }
    )
    hive = images(root, "split=val/labels.parquet") / "split=val" / "labels.parquet"
    pq.write_table(data, hive)
    config = RegisterConfig(
        table=hive, group_column="pid", study_column="study", split_column="split", label_columns="Edema,study"
    )
    result, _ = register(store_path, "mine", root, config)
    assert result.column("group") == ["7", "7", None]
    assert result.column("study") == ["1.5", None, None]
    assert result.column("split") == ["train", "test", ""]
    assert result.column("Edema") == [1, None, -1]
    assert result.column("box") == [[1, 2], None, []]
    assert result.table.schema.field("Edema").type == pa.int8()
    assert result.meta["label_columns"] == ["Edema", "source_study"], "study is a reserved column; the label is not"
    assert result.column("source_study")[0] == 1.5
    assert table_digest(Store(store_path).manifest("mine").table) == result.digest
    changed = data.set_column(data.column_names.index("Edema"), "Edema", pa.array([1, 0, -1], pa.int8()))
    pq.write_table(changed, hive)
    assert register(store_path, "mine", root, config)[0].digest != result.digest


def test_table_is_relative_to_the_root_or_to_here(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    name = add_table(root, csv_text("path", "a.png"))
    assert table.read(root, table=name).table.num_rows == 1
    add_table(here, csv_text("path", "a.png", "b.png"), "local.csv")
    assert table.read(root, table=Path("local.csv")).table.num_rows == 2
    assert table.read(root, table=root / name).table.num_rows == 1
    add_table(here, csv_text("path", "a.png", "b.png"))
    with pytest.raises(
        ManifestError, match=r"--table labels.csv is here and in .*, and they are two files; give the full"
    ):
        table.read(root, table=name)
    monkeypatch.chdir(root)
    assert table.read(root, table=name).table.num_rows == 1


TABLE_FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("path\n", {}, "no samples found"),
    ("", {}, "is empty; its first line must name the columns"),
    ("file\na.png\n", {}, "--path-column 'path': the table has no such column; it has file"),
    ("path\na.png\n", {"id_column": "key"}, "--id-column 'key': the table has no such column"),
    ("path\na.png\n", {"label_columns": "path,Edema"}, "--label-columns 'Edema': the table has no such column"),
    ("path\na.png\n", {"group_column": "pid"}, "--group-column 'pid': the table has no such column"),
    ("path\na.png\n", {"study_column": "s"}, "--study-column 's': the table has no such column"),
    ("path\na.png\n", {"mask_column": "m"}, "--mask-column 'm': the table has no such column"),
    ("path\na.png\n", {"split_column": "part"}, "--split-column 'part': the table has no such column"),
    ("path,n\na.png,1\n,2\n,3\n", {}, "--path-column 'path': 2 rows have no path, the first is row 2"),
    (
        "path,part\na.png,train\nb.png,fold1\n",
        {"split_column": "part"},
        "split column 'part': row 2 says 'fold1'; it must be",
    ),
    ("path\na.png\na.png\n", {}, "ids must be unique; 1 occur more than once, such as a.png; name a unique column"),
    ("path\na.png\n./a.png\n", {}, "ids must be unique; 1 occur more than once, such as a.png"),
    ("path,key\na.png,1\nb.png,\n", {"id_column": "key"}, "every sample needs an id; row 2 has none"),
    ("path\na.png\nz.png\n", {}, r"1 of 2 files are missing under .*, such as z.png; .*--allow-missing"),
    ("path\n../a.png\n", {}, r"climbs with '\.\.'"),
    ("path\n/a.png\n", {}, "is absolute"),
    ("path,m\na.png,../m.png\n", {"mask_column": "m"}, r"climbs with '\.\.'"),
    ("path,source_id,id\na.png,1,2\n", {}, "columns must have different names"),
]


@pytest.mark.parametrize(("text", "options", "message"), TABLE_FAULTS)
def test_faults_of_tables(root: Path, store_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    add_table(root, text)
    with pytest.raises(ManifestError, match=message):
        register(store_path, "mine", root, RegisterConfig(table=Path("labels.csv"), **options))
    assert Store(store_path).datasets() == []


def test_unreadable_tables(root: Path) -> None:
    with pytest.raises(
        ManifestError, match="no such table; --table takes a CSV, TSV or Parquet file, relative to ROOT"
    ):
        table.read(root, table=Path("gone.csv"))
    (root / "t.parquet").write_bytes(b"path\na.png\n")
    with pytest.raises(ManifestError, match=r"t.parquet: not a readable Parquet file \(\w+\)"):
        table.read(root, table=Path("t.parquet"))
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["path", "path"]), root / "t.parquet")
    with pytest.raises(ManifestError, match="not a readable Parquet file"):
        table.read(root, table=Path("t.parquet"))


def test_allow_missing_keeps_the_rows(root: Path, store_path: Path) -> None:
    add_table(root, csv_text("path", "z.png", "a.png"))
    result, _ = register(store_path, "m", root, RegisterConfig(table=Path("labels.csv"), allow_missing=True))
    assert result.column("size") == [-1, 5]
    assert result.meta["missing"] == 1


# --- folders


def test_folder_of_classes(tmp_path: Path, store_path: Path) -> None:
    names = ["cat/1.png", "cat/2.JPG", "dog/old/3.tif", "top.webp", "dog/notes.txt", ".trash/4.png", "cat/.5.png"]
    result, _ = register(store_path, "pets", images(tmp_path / "pets", *names), RegisterConfig(split_seed=2))
    paths = ["cat/1.png", "cat/2.JPG", "dog/old/3.tif", "top.webp"]
    assert result.column("path") == paths
    assert result.column("label") == ["cat", "cat", "dog/old", None]
    assert result.column("split") == split_by_group([f"id:{path}" for path in paths], seed=2)
    assert result.meta["label_columns"] == ["label"]
    assert result.meta["groups_known"] is False


def test_folder_with_splits(tmp_path: Path) -> None:
    root = images(tmp_path, "Train/cat/1.png", "train/dog/2.png", "valid/cat/3.png", "test/dog/4.png")
    source = folder.read(root)
    rows = {row["path"]: (row["split"], row["label"]) for row in source.table.to_pylist()}
    assert rows == {
        "Train/cat/1.png": ("train", "cat"),
        "train/dog/2.png": ("train", "dog"),
        "valid/cat/3.png": ("val", "cat"),
        "test/dog/4.png": ("test", "dog"),
    }
    assert source.split_origin == "folders"
    with pytest.raises(ConfigError, match=r"--split-seed 1: .* has split folders, so no split is drawn"):
        folder.read(root, seed=1)
    images(root, "logo.png")
    with pytest.raises(
        ManifestError, match=r"has folders test, train, val, and 1 images lie outside .* such as logo.png"
    ):
        folder.read(root)


def test_folder_without_classes_has_no_labels(tmp_path: Path) -> None:
    assert folder.read(images(tmp_path, "1.png", "2.png")).label_columns == ()
    assert folder.read(images(tmp_path / "one", "a/1.png")).label_columns == ()


def test_folder_follows_links_once(tmp_path: Path) -> None:
    images(tmp_path / "elsewhere", "1.png")
    root = images(tmp_path / "data", "a/2.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "circle").symlink_to(root)
    assert folder.find_images(root) == ["a/2.png", "linked/1.png"]


def test_faults_of_folders(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="gone: no such folder"):
        folder.read(tmp_path / "gone")
    with pytest.raises(ManifestError, match=r"gone: cannot be read .*every folder below the root must be"):
        folder.find_images(tmp_path / "gone")
    with pytest.raises(ManifestError, match=r"no images \(.bmp, .*\) in this folder or below"):
        folder.read(tmp_path)
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"")
    with pytest.raises(ManifestError, match=r"1 file names are not UTF-8, such as .*; rename them"):
        folder.read(tmp_path)


# --- adapters and roots


def test_adapter_follows_the_name_unless_asked() -> None:
    assert choose_adapter("mine", None, None) == "folder"
    assert choose_adapter("mine", None, Path("t.csv")) == "table"
    assert choose_adapter("chexpert", None, None) == "chexpert"
    assert choose_adapter("chexpert", None, Path("t.csv")) == "table"
    assert choose_adapter("chexpert", "folder", None) == "folder"
    with pytest.raises(UnknownNameError, match=f"unknown adapter 'mimic'; known: {', '.join(sorted(DATASETS))}"):
        choose_adapter("mine", "mimic", None)


def test_roots(tmp_path: Path, store_path: Path) -> None:
    with pytest.raises(
        ManifestError, match="gone: no such folder; ROOT is the folder that holds the data set's images"
    ):
        register(store_path, "mine", tmp_path / "gone", RegisterConfig())
    with pytest.raises(ManifestError, match="no such folder"):
        read_source("folder", images(tmp_path, "file.png") / "file.png")
    with pytest.raises(
        ConfigError, match="`featstore register mine` needs the folder of its images: featstore register mine"
    ):
        register(store_path, "mine", None, RegisterConfig())
    with pytest.raises(ConfigError, match=r"the table adapter needs --table FILE"):
        register(store_path, "table", tmp_path, RegisterConfig())


def test_bad_names_write_nothing(tmp_path: Path, store_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"a data set name is letters, .* got '\.\./\.\./out'"):
        register(store_path, "../../out", None, RegisterConfig(adapter="digits"))
    assert list(tmp_path.iterdir()) == []


def generate(root: Path) -> Source:
    return folder.read(images(root, "1.png"))


def test_generated_data_needs_no_root(store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "digits", f"{__name__}:generate")
    assert register(store_path, "digits", None, RegisterConfig())[0].root == store_path / "generated" / "digits"
    mine, _ = register(store_path, "mine", tmp_path / "new", RegisterConfig(adapter="digits"))
    assert mine.root == tmp_path / "new"


# --- growth


def again(store_path: Path, root: Path) -> Manifest:
    return register(store_path, "mine", root, RegisterConfig())[0]


def test_growth_keeps_the_old_manifest_readable(root: Path, store_path: Path) -> None:
    first = again(store_path, root)
    images(root, "e.png")
    second, before = register(store_path, "mine", root, RegisterConfig())
    assert before is not None
    assert before.digest == first.digest
    store = Store(store_path)
    assert store.manifest("mine").digest == second.digest
    assert store.manifest("mine", first.short).table.equals(first.table)
    old = dict(zip(first.column("id"), first.column("split")))
    new = dict(zip(second.column("id"), second.column("split")))
    assert new.keys() - old.keys() == {"e.png"}
    assert {name: new[name] for name in old} == old
    (root / "e.png").unlink()
    assert again(store_path, root).digest == first.digest, "back to the first samples is back to the first manifest"


def test_a_sample_that_went_and_came_back_changed_is_a_new_one(root: Path, store_path: Path) -> None:
    first = again(store_path, root)
    (root / "a.png").unlink()
    again(store_path, root)
    (root / "a.png").write_bytes(b"A.PNG")
    third = again(store_path, root)
    assert third.column("size") == first.column("size")
    assert third.digest != first.digest
    assert third.column("content")[0] is not None


def test_moved_data_is_the_same_manifest_at_another_root(root: Path, store_path: Path) -> None:
    first = again(store_path, root)
    moved = root.rename(root.with_name("moved"))
    second = again(store_path, moved)
    assert second.digest == first.digest
    assert Store(store_path).manifest("mine").root == moved


def test_registering_mends_a_damaged_manifest_and_trusts_no_file(root: Path, store_path: Path) -> None:
    first = again(store_path, root)
    (store_path / "datasets" / "mine" / first.short / "manifest.parquet").write_bytes(b"")
    with pytest.raises(ManifestError, match="damaged"):
        Store(store_path).manifest("mine")
    second = again(store_path, root)
    assert None not in second.column("content")
    assert Store(store_path).manifest("mine").digest == second.digest
