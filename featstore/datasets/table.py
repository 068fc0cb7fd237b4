"""Any table of images: CSV, TSV or Parquet with a column of paths."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featstore.configs import Frames
from featstore.datasets.expand import expand
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


def stripped(values: Sequence[str | None]) -> tuple[list[str | None], int]:
    """(values without surrounding blanks, None where nothing is left; how many had some): `P1 ` is patient `P1`."""
    plain = [None if value is None else value.strip() or None for value in values]
    return plain, sum(before != after for before, after in zip(values, plain))


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


def _holds_images(column: "pa.ChunkedArray") -> bool:
    """Whether a column is the images themselves: bytes, or what the hub's image feature writes."""
    import pyarrow as pa

    kind = column.type
    inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    return bool(pa.types.is_binary(inner) or pa.types.is_large_binary(inner))


def _paths_inside(file: Path, root: Path, column: str, num_rows: int) -> list[str | None]:
    """The images of a Parquet column as members of that file.

    Raises:
        ManifestError: the file does not lie below the root.
    """
    try:
        inside = file.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        raise ManifestError(
            f"--path-column {column!r} holds the images themselves, so {file} must lie below the root {root}"
        ) from None
    return [f"{inside}!/{column}/{row}" for row in range(num_rows)]


def _names(
    data: "pa.Table", name: str | None, option: str, default: list[str | None], notes: list[str]
) -> list[str | None]:
    """The values of a column without the blanks around them, `default` if none is named; `notes` tells how many."""
    if not name:
        return default
    values, count = stripped(strings(need_column(data, name, option)))
    if count:
        notes.append(f"column {name!r}: {count} values had blanks around them, which are not part of the name")
    return values


def _draw(paths: Sequence[str | None], ids: Sequence[str | None], groups: Sequence[str | None], seed: int) -> list[str]:
    """A seeded split by group; rows without one go by their file where they share it, else alone."""
    shared = {path for path, count in Counter(paths).items() if count > 1}
    alone = [f"file:{path}" if path in shared else f"id:{sample}" for path, sample in zip(paths, ids)]
    return split_by_group([group or own for group, own in zip(groups, alone)], seed=seed)


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
    frames: Frames | None = None,
) -> Source:
    """Read a table of samples; without a split column the rows are split 70/10/20 by group, seeded.

    `table` is relative to the working folder or to `root`. A row whose file is a volume becomes a row for each slice
    (`frames` says otherwise), with the same labels, patient and split; its mask is taken slice by slice too, if it has
    as many. Ids, groups and studies are taken without the blanks around them. Rows of one file without group are split
    together.

    Raises:
        ManifestError: see `read_table`; a column is absent, a path is blank, a split has another name, two files are
            called `table`, or a mask does not fit its stack (`Expanded.masks`).
    """
    import pyarrow as pa

    file = table if table.is_file() else root / table
    if table.is_file() and (root / table).is_file() and not table.samefile(root / table):
        raise ManifestError(f"--table {table} is here and in {root}, and they are two files; give the full path of one")
    data = read_table(file)
    column = need_column(data, path_column, "--path-column")
    if _holds_images(column):
        written, data = _paths_inside(file, root, path_column, data.num_rows), data.drop_columns([path_column])
    else:
        written = strings(column)
    blank = [row for row, path in enumerate(written) if path is None]
    if blank:
        raise ManifestError(
            f"--path-column {path_column!r}: {len(blank)} rows have no path, the first is row {blank[0] + 1}"
        )
    paths: list[str | None] = [Path(path).as_posix() for path in written if path is not None]
    for name in label_columns:
        need_column(data, name, "--label-columns")
    nothing: list[str | None] = [None] * len(paths)
    notes: list[str] = []
    ids = _names(data, id_column, "--id-column", paths, notes)
    groups = _names(data, group_column, "--group-column", nothing, notes)
    studies = _names(data, study_column, "--study-column", nothing, notes)
    masks = strings(need_column(data, mask_column, "--mask-column")) if mask_column else nothing
    if split_column:
        splits = normal_splits(strings(need_column(data, split_column, "--split-column")), split_column)
    else:
        splits = _draw(paths, ids, groups, seed)
    names_of_files = [path or "" for path in paths]
    expanded = expand(root, names_of_files, frames)
    mask_paths, mask_parts, more = expanded.masks(root, names_of_files, masks)
    if expanded.unread:
        notes.append(f"{expanded.unread} files could not be opened; extraction says why")
    if expanded.any:
        data = data.take(expanded.rows)
    columns: dict[str, list[str | None]] = {"path": paths, "group": groups, "study": studies, "split": list(splits)}
    reserved = {
        "id": pa.array(expanded.ids([sample or "" for sample in ids]) if expanded.any else ids, pa.string()),
        **{name: pa.array([values[row] for row in expanded.rows], pa.string()) for name, values in columns.items()},
        "mask_path": pa.array(mask_paths, pa.string()),
        **({"mask_part": pa.array(mask_parts, pa.string())} if any(mask_parts) else {}),
        **expanded.places(names_of_files),
    }
    return Source(
        table=build_table(data, reserved),
        root=root,
        adapter="table",
        default_task=None,
        tasks=(),
        label_columns=tuple(f"source_{name}" if name in RESERVED else name for name in label_columns),
        split_origin=f"column {split_column}" if split_column else f"seeded by group, 70/10/20, seed {seed}",
        groups_known=group_column is not None,
        notes=(*notes, *more),
    )
