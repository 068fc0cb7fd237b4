"""Registration: tables, folders, adapters by name, growth and edits of a registered data set, hashes, speed."""

import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import standins

from cli.main import featstore
from featstore.configs import RegisterConfig
from featstore.datasets import DATASETS, choose_adapter, folder, read_source, table
from featstore.datasets.contents import hashing_cost
from featstore.datasets.manifest import Manifest, build, table_digest
from featstore.datasets.source import Source, build_table
from featstore.datasets.splits import split_by_group
from featstore.datasets.walk import find_files
from featstore.errors import ConfigError, ManifestError, UnknownNameError
from featstore.inputs import Inputs
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
        find_files(tmp_path / "gone")
    with pytest.raises(ManifestError, match=r"no images \(.bmp, .*\) in this folder or below"):
        folder.read(tmp_path)
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"")
    with pytest.raises(ManifestError, match=r"1 file names are not UTF-8, such as .*; rename them"):
        folder.read(tmp_path)


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


def test_moved_data_is_the_same_manifest_at_another_root(root: Path, store_path: Path) -> None:
    first = again(store_path, root)
    moved = root.rename(root.with_name("moved"))
    second = again(store_path, moved)
    assert second.digest == first.digest
    assert Store(store_path).manifest("mine").root == moved


def test_registering_mends_a_damaged_manifest(root: Path, store_path: Path) -> None:
    first = again(store_path, root)
    (store_path / "datasets" / "mine" / first.short / "manifest.parquet").write_bytes(b"")
    with pytest.raises(ManifestError, match="damaged"):
        Store(store_path).manifest("mine")
    second = again(store_path, root)
    assert second.digest == first.digest, "nothing was computed from files of which nothing is known now"
    assert Store(store_path).manifest("mine").digest == second.digest


def test_hashing_at_registration_reads_every_file_once(
    root: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_table(root, csv_text("key,path", "1,a.png", "2,b.png", "3,a.png", "4,gone.png"))
    config = RegisterConfig(table=Path("labels.csv"), id_column="key", allow_missing=True)
    plain, _ = register(store_path, "mine", root, config)
    assert plain.hashes() == [None] * 4
    cost = hashing_cost(plain)
    assert (cost.files, cost.bytes) == (2, 10)
    read: list[str] = []
    real = Inputs.hash

    def note(self: Inputs, path: str) -> str:
        read.append(path)
        return real(self, path)

    monkeypatch.setattr(Inputs, "hash", note)
    told: list[tuple[int, int]] = []
    for _ in range(2):
        hashed, _ = register(
            store_path, "mine", root, replace(config, hash=True), advance=lambda *done: told.append(done)
        )
    assert sorted(read) == ["a.png"] * 2 + ["b.png"] * 2, "each time what is there is read, once"
    assert told == [(1, 2)] * 4
    assert hashed.digest == plain.digest
    first, second = (hashlib.sha256((root / name).read_bytes()).hexdigest()[:32] for name in ("a.png", "b.png"))
    assert hashed.hashes() == [first, second, first, None]
    assert register(store_path, "mine", root, config)[0].hashes() == hashed.hashes()
    assert hashing_cost(hashed).files == 0


def test_one_slow_file_does_not_decide_what_hashing_costs(
    root: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, _ = register(store_path, "mine", root, RegisterConfig())
    plain, count = hashing_cost(manifest).seconds, 0
    real = Inputs.read

    def slow(self: Inputs, path: str, *, first: int = -1) -> bytes:
        nonlocal count
        count += 1
        if count == 1:
            time.sleep(0.2)
        return real(self, path, first=first)

    monkeypatch.setattr(Inputs, "read", slow)
    assert hashing_cost(manifest).seconds < plain + 0.1
    assert count == 3


def test_the_command_says_what_hashing_would_cost(
    root: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*flags: str) -> str:
        monkeypatch.setattr("sys.argv", ["featstore", "register", "mine", str(root), *flags])
        with pytest.raises(SystemExit, match="0"):
            featstore()
        return capsys.readouterr().out

    assert "  hashing all 3 files would read 17 B, about 1 s (--hash)" in run()
    assert json.loads(run("--json"))["to_hash"] == {"files": 3, "bytes": 17, "seconds": 0.0}
    assert "would read" not in run("--hash")


def test_columns_of_a_table_that_are_called_like_places_stay_columns(root: Path, store_path: Path) -> None:
    add_table(root, csv_text("path,part,volume,x,y,z", "a.png,left,2 ml,1,2,3", "b.png,right,,,,"))
    result, _ = register(store_path, "mine", root, RegisterConfig(table=Path("labels.csv"), label_columns="part"))
    assert result.column("part") == ["left", "right"]
    assert result.column("volume") == ["2 ml", None]
    assert result.place("part") == result.place("z") == [None, None]
    assert result.meta["label_columns"] == ["part"]
    second, _ = register(store_path, "mine", root, RegisterConfig(table=Path("labels.csv"), label_columns="part"))
    assert second.digest == result.digest


def write_files(root: Path) -> int:
    """A tiny file for every row of the tables of `standins.write_chexpert_tables`."""
    count = 0
    for table_name in ("train.csv", "valid.csv"):
        for row in standins.read_rows(root / table_name):
            path = root / row["Path"].removeprefix("CheXpert-v1.0/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"tiny")
            count += 1
    return count


def seconds_to_register(store_path: Path, name: str, root: Path, config: RegisterConfig) -> float:
    started = time.perf_counter()
    register(store_path, name, root, config)
    return time.perf_counter() - started


def check_speed(tmp_path: Path, store_path: Path, num_rows: int, limit: float) -> None:
    root = tmp_path / "CheXpert-v1.0"
    standins.write_chexpert_tables(root, num_rows)
    absent = seconds_to_register(store_path, "chexpert", root, RegisterConfig(allow_missing=True))
    assert write_files(root) == num_rows + 234
    present = seconds_to_register(store_path, "other", root, RegisterConfig(adapter="chexpert"))
    again = seconds_to_register(store_path, "other", root, RegisterConfig(adapter="chexpert"))
    assert max(absent, present, again) < limit, (absent, present, again)


def test_a_large_table_registers_in_little_time(tmp_path: Path, store_path: Path) -> None:
    check_speed(tmp_path, store_path, 5000, 3.0)  # the full one: 45 times as many in 10 s


@pytest.mark.slow
def test_a_table_as_large_as_chexpert_registers_within_ten_seconds(tmp_path: Path, store_path: Path) -> None:
    check_speed(tmp_path, store_path, 223_414, 10.0)


@pytest.mark.slow
def test_a_million_slices_of_ten_thousand_volumes_register_in_proportion(tmp_path: Path, store_path: Path) -> None:
    del store_path
    (tmp_path / "data").mkdir()
    for number in range(10_000):
        (tmp_path / "data" / f"{number}.nii").write_bytes(b"tiny")
    volumes = np.repeat(np.arange(10_000), 100)
    slices = np.tile(np.arange(100), 10_000)
    names = pa.array(np.char.add(volumes.astype(str), ".nii").tolist())
    parts = pa.array([f"axis=axial&index={index}" for index in slices.tolist()])
    ids = pa.array([f"{volume}/{index}" for volume, index in zip(volumes.tolist(), slices.tolist())])
    reserved = {"id": ids, "path": names, "part": parts, "volume": names, "z": pa.array(slices)}
    source = Source(
        table=build_table(pa.table({"label": pa.array(slices)}), reserved),
        root=tmp_path / "data",
        adapter="table",
        default_task=None,
        tasks=(),
        label_columns=("label",),
        split_origin="none",
        groups_known=False,
        notes=(),
    )
    started = time.perf_counter()
    first = build("x", source)
    assert build("x", source, before=first).digest == first.digest
    assert time.perf_counter() - started < 60.0
