"""Any table of images: CSV, TSV or Parquet with a column of paths."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featstore.datasets.source import RESERVED, Source, build_table, read_csv
from featstore.datasets.splits import SPLIT_NAMES, split_by_group
from featstore.errors import ManifestError

if TYPE_CHECKING:
    import pyarrow as pa


def read_table(path: Path) -> "pa.Table":
    """All columns of a CSV, TSV (strings, blank is null) or Parquet file (types kept).

    Raises:
        ManifestError: no such file, or it cannot be read as what its suffix says.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise ManifestError(f"{path}: no such table; --table takes a CSV, TSV or Parquet file, relative to ROOT or not")
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in (".parquet", ".pq"):
        try:
            # A file is a table by itself: no columns from folder names such as split=train.
            return pq.read_table(path, partitioning=None)
        except (pa.ArrowException, OSError) as error:
            raise ManifestError(f"{path}: not a readable Parquet file ({type(error).__name__})") from error
    return read_csv(path, delimiter="\t" if ".tsv" in suffixes else ",")


def need_column(table: "pa.Table", name: str, option: str) -> "pa.ChunkedArray":
    """A column by name, or a ManifestError that lists the names there are."""
    if name not in table.column_names:
        raise ManifestError(f"{option} {name!r}: the table has no such column; it has {', '.join(table.column_names)}")
    return table.column(name)


def strings(column: "pa.ChunkedArray") -> list[str | None]:
    """Values as text; null, blank and NaN as None; whole floats print as they stand (1.0 stays 1.0)."""
    return [None if value is None or value == "" or value != value else str(value) for value in column.to_pylist()]


def normal_splits(values: Sequence[str | None], column: str) -> list[str]:
    """train, val, test or '' for each value of a split column, whatever its spelling."""
    result = []
    for row, value in enumerate(values):
        key = (value or "").strip().lower()
        if key not in SPLIT_NAMES:
            raise ManifestError(
                f"split column {column!r}: row {row + 1} says {value!r}; it must be train, val or test "
                "(also training, valid, validation, validate, dev, testing, or blank for unused)"
            )
        result.append(SPLIT_NAMES[key])
    return result


def with_reserved(table: "pa.Table", reserved: dict[str, list[str | None]]) -> "pa.Table":
    """The reserved columns, then every column of the source, renamed only where it collides.

    Raises:
        ManifestError: two columns end with one name.
    """
    import pyarrow as pa

    return build_table(table, {name: pa.array(values, pa.string()) for name, values in reserved.items()})


def read(
    root: Path,
    *,
    table: Path,
    path_column: str = "path",
    id_column: str | None = None,
    label_columns: Sequence[str] = (),
    group_column: str | None = None,
    split_column: str | None = None,
    mask_column: str | None = None,
    study_column: str | None = None,
    seed: int = 0,
) -> Source:
    """Read a table of samples; without a split column the rows are split 70/10/20 by group, seeded.

    `table` is relative to the working folder or to `root`.

    Raises:
        ManifestError: see `read_table`; a column is absent, a path is blank, a split has another name, or two files
            are called `table`.
    """
    file = table if table.is_file() else root / table
    if table.is_file() and (root / table).is_file() and not table.samefile(root / table):
        raise ManifestError(f"--table {table} is here and in {root}, and they are two files; give the full path of one")
    data = read_table(file)
    written = strings(need_column(data, path_column, "--path-column"))
    blank = [row for row, path in enumerate(written) if path is None]
    if blank:
        raise ManifestError(
            f"--path-column {path_column!r}: {len(blank)} rows have no path, the first is row {blank[0] + 1}"
        )
    paths: list[str | None] = [Path(path).as_posix() for path in written if path is not None]
    for name in label_columns:
        need_column(data, name, "--label-columns")
    ids = strings(need_column(data, id_column, "--id-column")) if id_column else paths
    nothing: list[str | None] = [None] * len(paths)
    groups = strings(need_column(data, group_column, "--group-column")) if group_column else nothing
    studies = strings(need_column(data, study_column, "--study-column")) if study_column else nothing
    masks = strings(need_column(data, mask_column, "--mask-column")) if mask_column else nothing
    if split_column:
        splits = normal_splits(strings(need_column(data, split_column, "--split-column")), split_column)
    else:
        splits = split_by_group([group or f"id:{sample}" for group, sample in zip(groups, ids)], seed=seed)
    reserved: dict[str, list[str | None]] = {
        "id": ids,
        "path": paths,
        "group": groups,
        "study": studies,
        "split": list(splits),
        "mask_path": masks,
    }
    return Source(
        table=with_reserved(data, reserved),
        root=root,
        adapter="table",
        default_task=None,
        tasks=(),
        label_columns=tuple(f"source_{name}" if name in RESERVED else name for name in label_columns),
        split_origin=f"column {split_column}" if split_column else f"seeded by group, 70/10/20, seed {seed}",
        groups_known=group_column is not None,
        notes=(),
    )
