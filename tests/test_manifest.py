"""The manifest: what its digest covers, what a source must be, what a saved one gives back, and changed files."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.datasets import manifest as manifests
from featstore.datasets.manifest import (
    build,
    check_ids,
    load,
    save,
    stat_files,
    table_digest,
)
from featstore.datasets.source import RESERVED, Source
from featstore.errors import ManifestError, UnknownNameError


def make_source(root: Path, names: list[str], *, write: bool = True, **columns: Any) -> Source:
    """A source of `names` as ids and paths below `root`; `columns` replace or follow the reserved ones."""
    if write:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(f"image {name}".encode())
    nothing = pa.nulls(len(names), pa.string())
    given: dict[str, Any] = {"id": names, "path": names, "split": ["train"] * len(names)} | columns
    data = {name: pa.array(given.pop(name), pa.string()) if name in given else nothing for name in RESERVED}
    return Source(
        table=pa.table({**data, **given}),
        root=root,
        adapter="table",
        default_task=None,
        tasks=(),
        label_columns=tuple(name for name in columns if name not in RESERVED),
        split_origin="table",
        groups_known=False,
        notes=("a note",),
    )


def test_digest_ignores_times_and_the_root(tmp_path: Path) -> None:
    digests = set()
    for name, time in (("one", 1), ("two", 2)):
        source = make_source(tmp_path / name, ["a", "b"])
        os.utime(tmp_path / name / "a", ns=(time, time))
        digests.add(build("x", source).digest)
    assert len(digests) == 1


TABLE: dict[str, Any] = {
    "id": pa.array(["a", "b", "c"]),
    "size": pa.array([1, 2, None], pa.int64()),
    "age": pa.array([1.0, None, np.nan]),
    "flag": pa.array([True, None, False]),
    "sex": pa.array(["F", None, ""]).dictionary_encode(),
    "box": pa.array([[1, 2], None, []]),
    "raw": pa.array([b"\xff", None, b""]),
    "half": pa.array([1.0, None, 2.0], pa.float16()),
    "day": pa.array([1, None, 3], pa.timestamp("s")),
}


VARIANTS: dict[str, tuple[str, Any]] = {
    "text": ("id", pa.array(["a", "b", "d"])),
    "text moved between cells": ("id", pa.array(["ab", "", "c"])),
    "null text": ("id", pa.array(["a", "b", None])),
    "integer": ("size", pa.array([1, 3, None], pa.int64())),
    "null integer is not 0": ("size", pa.array([1, 2, 0], pa.int64())),
    "integer type": ("size", pa.array([1, 2, None], pa.int32())),
    "float": ("age", pa.array([1.5, None, np.nan])),
    "null float is not NaN": ("age", pa.array([1.0, np.nan, np.nan])),
    "null float is not 0": ("age", pa.array([1.0, 0.0, np.nan])),
    "boolean": ("flag", pa.array([True, None, True])),
    "boolean is not its text": ("flag", pa.array(["true", None, "false"])),
    "dictionary value": ("sex", pa.array(["M", None, ""]).dictionary_encode()),
    "dictionary null is not blank": ("sex", pa.array(["F", "", None]).dictionary_encode()),
    "list": ("box", pa.array([[1, 3], None, []])),
    "list null is not empty": ("box", pa.array([[1, 2], [], None])),
    "bytes": ("raw", pa.array([b"\xfe", None, b""])),
    "half": ("half", pa.array([1.0, None, 3.0], pa.float16())),
    "day": ("day", pa.array([1, None, 4], pa.timestamp("s"))),
    "unit of time": ("day", pa.array([1, None, 3], pa.timestamp("ms"))),
}


@pytest.mark.parametrize(("column", "values"), VARIANTS.values(), ids=list(VARIANTS))
def test_digest_sees_every_cell_and_type(column: str, values: Any) -> None:
    assert table_digest(pa.table(TABLE)) != table_digest(pa.table({**TABLE, column: values}))


def test_digest_sees_names_order_of_rows_and_order_of_columns() -> None:
    table = pa.table({"id": ["a", "b"], "other": ["a", "b"]})
    variants = [
        table,
        table.rename_columns(["id", "another"]),
        table.rename_columns(["other", "id"]),
        table.take([1, 0]),
        table.slice(0, 1),
        table.select(["id"]),
        table.append_column("more", pa.array(["", ""])),
    ]
    assert len({table_digest(variant) for variant in variants}) == len(variants)


def test_digest_is_of_the_data_and_not_of_how_memory_holds_it() -> None:
    plain = pa.table({"id": ["a", None, "b", ""], "n": [1, None, 3, 4]})
    chunked = pa.concat_tables([plain.slice(0, 1), plain.slice(1, 0), plain.slice(1, 3)])
    encoded = plain.set_column(0, "id", plain.column("id").dictionary_encode())
    large = plain.set_column(0, "id", plain.column("id").cast(pa.large_string()))
    timed = plain.append_column("mtime_ns", pa.array([1, 2, 3, 4]))
    sliced = pa.concat_tables([plain, plain]).slice(4, 4)
    same = [plain, chunked, encoded, large, timed, sliced]
    assert len({table_digest(table) for table in same}) == 1


cells = st.lists(
    st.tuples(st.one_of(st.none(), st.text(max_size=3)), st.one_of(st.none(), st.integers(-3, 3))), max_size=5
)


@settings(max_examples=100, deadline=None)
@given(cells, cells)
def test_digests_are_equal_exactly_where_tables_are(left: list[Any], right: list[Any]) -> None:
    def digest(rows: list[Any]) -> str:
        return table_digest(
            pa.table(
                {"a": pa.array([a for a, _ in rows], pa.string()), "b": pa.array([b for _, b in rows], pa.int64())}
            )
        )

    assert (digest(left) == digest(right)) == (left == right)


def test_build_keeps_order_and_columns_and_says_where_they_come_from(tmp_path: Path) -> None:
    source = make_source(tmp_path, ["b.png", "a.png"], Edema=["1.0", None], group=["p1", None])
    result = build("x", source)
    assert len(result) == 2
    assert result.column("id") == ["b.png", "a.png"]
    assert result.column("size") == [11, 11]
    assert result.column("Edema") == ["1.0", None]
    assert result.column("content") == [None, None]
    assert result.table.column_names == [*manifests.COLUMNS, "Edema"]
    assert result.root == tmp_path
    assert result.short == result.digest[:8]
    assert result.meta["label_columns"] == ["Edema"]
    assert result.meta["notes"] == ["a note"]
    assert result.meta["missing"] == 0


def test_digest_of_a_build_changes_with_path_and_size(tmp_path: Path) -> None:
    source = make_source(tmp_path, ["a", "b"])
    digests = [build("x", source).digest, build("x", make_source(tmp_path, ["a", "c"], id=["a", "b"])).digest]
    (tmp_path / "b").write_bytes(b"longer than before")
    digests.append(build("x", source).digest)
    assert len(set(digests)) == 3


def test_columns_named_like_ours_are_renamed_with_their_label(tmp_path: Path) -> None:
    result = build("x", make_source(tmp_path, ["a"], size=["L"], content=["chest"], mtime_ns=["noon"]))
    assert result.column("size") == [7]
    assert result.column("source_size") == ["L"]
    assert result.column("source_content") == ["chest"]
    assert result.meta["label_columns"] == ["source_size", "source_content", "source_mtime_ns"]
    with pytest.raises(ManifestError, match="columns must have different names, but 'source_size' would appear twice"):
        build("x", make_source(tmp_path, ["a"], source_size=["M"], size=["L"]))


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "-x", "a b", "a\n", "ä"])
def test_names_that_cannot_be_folders(tmp_path: Path, name: str) -> None:
    with pytest.raises(ManifestError, match=r"a data set name is letters, digits, '\.', '_' and '-'"):
        build(name, make_source(tmp_path, ["a"]))


def test_a_source_without_rows_or_root(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no samples found; check the folder and the adapter \(table\)"):
        build("x", make_source(tmp_path, []))
    with pytest.raises(ManifestError, match="the root folder of data set 'x' does not exist"):
        build("x", make_source(tmp_path / "gone", ["a"], write=False))


OUTSIDE = [
    ("/etc/passwd", "is absolute; write it relative to"),
    ("C:/a.png", "is absolute; write it relative to"),
    ("../a.png", r"climbs with '\.\.'"),
    ("a/../../b.png", r"climbs with '\.\.'"),
    ("a\\b.png", "holds a backslash"),
    ("", "must name a file below"),
    ("a\x00", "must name a file below"),
]


@pytest.mark.parametrize(("path", "message"), OUTSIDE)
@pytest.mark.parametrize("column", ["path", "mask_path"])
def test_image_and_mask_paths_stay_below_the_root(tmp_path: Path, column: str, path: str, message: str) -> None:
    names = ["first.png", "second.png"]
    columns: dict[str, Any] = {column: [None if column == "mask_path" else names[0], path]}
    source = make_source(tmp_path, names, **columns)
    with pytest.raises(ManifestError, match=message):
        build("x", source, allow_missing=True)


def test_ids_must_be_there_and_differ() -> None:
    check_ids(["a", "b"])
    for blank in ("", None):
        with pytest.raises(ManifestError, match="every sample needs an id; row 2 has none"):
            check_ids(["a", blank])
    with pytest.raises(ManifestError, match="ids must be unique; 2 occur more than once, such as a, b; name a unique"):
        check_ids(["a", "b", "a", "c", "b", "a"])


def test_missing_files_and_folders_in_their_place(tmp_path: Path) -> None:
    source = make_source(tmp_path, ["a", "b", "c", "d"])
    (tmp_path / "b").unlink()
    (tmp_path / "c").unlink()
    (tmp_path / "c").mkdir()
    with pytest.raises(ManifestError, match=r"2 of 4 files are missing under .*, such as b, c; .*--allow-missing"):
        build("x", source)
    result = build("x", source, allow_missing=True)
    assert result.column("size") == [7, manifests.MISSING, manifests.MISSING, 7]
    assert result.meta["missing"] == 2
    assert stat_files(tmp_path, ["a/below-a-file"]) == ([manifests.MISSING], [0])


def test_load_gives_back_what_was_saved(tmp_path: Path) -> None:
    source = make_source(tmp_path / 'röntgen "\U0001fa7b"\\ \x7f', ["a", "b"], age=pa.array([1.5, None]), n=[3, 4])
    saved = build("x", source)
    save(tmp_path / "datasets", saved)
    loaded = load(tmp_path / "datasets", "x")
    assert loaded.table.equals(saved.table)
    assert (loaded.digest, loaded.meta, loaded.name) == (saved.digest, saved.meta, "x")
    assert table_digest(loaded.table) == saved.digest
    assert manifests.names(tmp_path / "datasets") == ["x"]


def test_older_manifests_stay_readable_by_the_start_of_their_digest(tmp_path: Path) -> None:
    first, second = (build("x", make_source(tmp_path, names)) for names in (["a"], ["a", "b"]))
    for result in (first, second):
        save(tmp_path / "datasets", result)
    assert load(tmp_path / "datasets", "x").digest == second.digest
    assert load(tmp_path / "datasets", "x", first.short).column("id") == ["a"]
    assert load(tmp_path / "datasets", "x", first.digest).digest == first.digest
    have = ", ".join(sorted([first.short, second.short]))
    with pytest.raises(UnknownNameError, match=f"data set 'x' has no manifest 'zzz'; it has {have}"):
        load(tmp_path / "datasets", "x", "zzz")
    with pytest.raises(UnknownNameError, match="has no manifest"):
        load(tmp_path / "datasets", "x", first.digest[:8] + "z" * 56)


def test_unknown_names_list_the_known(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown data set 'y'; registered: none; add it with"):
        load(tmp_path / "datasets", "y")
    save(tmp_path / "datasets", build("x", make_source(tmp_path, ["a"], Edema=["1"])))
    with pytest.raises(
        UnknownNameError, match="unknown data set 'y'; registered: x; add it with `featstore register y"
    ):
        load(tmp_path / "datasets", "y")
    known = "id, path, size, split, group, study, mask_path, Edema"
    with pytest.raises(UnknownNameError, match=f"data set 'x' has no column 'edema'; its columns: {known}$"):
        load(tmp_path / "datasets", "x").column("edema")


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("manifest.parquet", b""),
        ("manifest.parquet", b"PAR1 and no more"),
        ("manifest.parquet", None),
        ("source.toml", b"root = "),
        ("source.toml", b"root = 'no digest'"),
        ("source.toml", b"\xff"),
        ("source.toml", None),
    ],
)
def test_damaged_manifests(tmp_path: Path, file: str, data: bytes | None) -> None:
    saved = build("x", make_source(tmp_path, ["a"]))
    save(tmp_path / "datasets", saved)
    path = tmp_path / "datasets" / "x" / saved.short / file
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(ManifestError, match=r"the manifest is damaged \(\w+\); register 'x' again"):
        load(tmp_path / "datasets", "x")


def test_a_flipped_bit_in_the_cells_is_found(tmp_path: Path) -> None:
    saved = build("x", make_source(tmp_path, [f"sample-{number}" for number in range(50)]))
    save(tmp_path / "datasets", saved)
    path = tmp_path / "datasets" / "x" / saved.short / "manifest.parquet"
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    for position in range(4, len(whole) - footer, 37):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            table = load(tmp_path / "datasets", "x").table
        except ManifestError:
            continue
        assert table.equals(saved.table), position  # fields that nobody reads, such as statistics, may differ
