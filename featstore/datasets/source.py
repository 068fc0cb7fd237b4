"""What an adapter hands over: one table with fixed first columns, and how its text files are read.

An adapter turns the layout of one data set family into a `Source`; it opens no image. Values stay the text of the file:
what "1.0", "-1.0" or a blank means is decided by a task, never here.
"""

import csv
import gzip
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from featstore.errors import ManifestError

if TYPE_CHECKING:
    import pyarrow as pa

RESERVED = ("id", "path", "group", "study", "split", "mask_path")
# Only in tables whose samples are parts of files: texts of `featstore.images.part`, the id of the volume or slide (or
# video) a sample belongs to, and where it lies in it, in slices (z) and in pixels of the finest level (y, x).
PLACES = ("part", "mask_part", "volume", "z", "y", "x")
_MARK = {b"featstore": b"place"}
_SUSPECT = re.compile(r"^$|^/|^[A-Za-z]:|(^|/)\.\.(/|$)|\\|\x00")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set as its adapter sees it: rows, where they lie, and which tasks they can serve.

    `table` starts with the `RESERVED` columns, all strings: `id` (unique), `path` (relative to `root`, with forward
    slashes), `group` (patient or null), `study` (or null), `split` ("train", "val", "test" or ""), `mask_path` (or
    null). Several masks of one image stand in one text, joined by "|", as their parts do. Those of `PLACES` that the
    adapter gives come next (`z`, `y`, `x` are int64, the others strings). Every column of the original follows
    verbatim, blank as null; one whose name is taken is `source_<name>`.
    `label_columns` are in canonical order. `split_origin` is "official", "table", "none" or says how it was drawn.
    `notes` hold licence, access and whatever was odd, with counts. `mask_classes` names the values of the masks from
    0 (background) on, where they are fixed.
    """

    table: "pa.Table"
    root: Path
    adapter: str
    default_task: str | None
    tasks: tuple[str, ...]
    label_columns: tuple[str, ...]
    split_origin: str
    groups_known: bool
    notes: tuple[str, ...]
    mask_classes: tuple[str, ...] = ()


def build_table(
    original: "pa.Table", reserved: Mapping[str, Any], derived: Mapping[str, Any] | None = None
) -> "pa.Table":
    """The table of a `Source`: reserved columns, the original verbatim, then the `derived` columns.

    `reserved` gives arrays for `id`, `path` and what else of `RESERVED` and `PLACES` is known; the rest of `RESERVED`
    is null, `split` empty text. An original column named like a reserved or derived one becomes `source_<name>`.

    Raises:
        ManifestError: two columns end with one name.
    """
    import pyarrow as pa

    derived = derived or {}
    default = {name: pa.nulls(original.num_rows, pa.string()) for name in RESERVED}
    default["split"] = pa.array([""] * original.num_rows, pa.string())
    places = [name for name in PLACES if name in reserved]
    taken = {*RESERVED, *places, *derived}
    renamed = [f"source_{name}" if name in taken else name for name in original.column_names]
    names = [*RESERVED, *places, *renamed, *derived]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ManifestError(f"columns must have different names, but {twice} would appear twice; rename them")
    first = [reserved.get(name, default[name]) for name in RESERVED]
    first += [reserved[name] for name in places]
    table = pa.table([*first, *original.columns, *derived.values()], names=names)
    # A column of the original may be called `x` or `part` too; the mark tells which ones are places.
    marked = [field.with_metadata(_MARK) if field.name in places else field for field in table.schema]
    return table.cast(pa.schema(marked))


def places_of(table: "pa.Table") -> list[str]:
    """Those of `PLACES` that the adapter gave."""
    return [field.name for field in table.schema if (field.metadata or {}).items() >= _MARK.items()]


def check_inside(root: Path, relative: str) -> None:
    """Check that `relative` stays below `root` as text; symlinks are not resolved. `a.zip!/b`: both parts must.

    Raises:
        ManifestError: it is empty, absolute, climbs with "..", or is not written with forward slashes.
    """
    if "!/" in relative:
        for piece in relative.split("!/", 1):
            check_inside(root, piece)
    # Two quick looks first: a table has a million paths, and the expression takes ten times as long.
    plain = relative[:1] not in ("", "/") and relative[1:2] != ":" and ".." not in relative
    if plain and "\\" not in relative and "\x00" not in relative:
        return
    if not _SUSPECT.search(relative):
        return
    if not relative or "\x00" in relative:
        raise ManifestError(f"a path must name a file below {root}, not {relative!r}")
    if "\\" in relative:
        raise ManifestError(f"path {relative!r} holds a backslash; write it with forward slashes, relative to {root}")
    if PurePosixPath(relative).is_absolute() or PureWindowsPath(relative).drive:
        raise ManifestError(f"path {relative!r} is absolute; write it relative to {root}")
    raise ManifestError(f"path {relative!r} climbs with '..'; every file must lie below {root}")


def read_csv(path: Path, *, delimiter: str = ",") -> "pa.Table":
    """A delimited text file as string columns with exactly its text; a blank field is null.

    UTF-8 with or without a byte order mark; a name ending in .gz is decompressed; quoted line breaks and empty lines
    are allowed. Unnamed columns that are blank throughout are dropped (trailing commas), others become
    `unnamed_<position>`, counted from 1.

    Raises:
        ManifestError: the file is absent, empty, not UTF-8 or cut off, a column name is repeated, or a line has more
            or fewer fields than the header; the message names the line, never its content.
    """
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    names, has_rows = _read_header(path, delimiter)
    if not names:
        raise ManifestError(f"{path} is empty; its first line must name the columns")
    labels = [name or f"unnamed_{position}" for position, name in enumerate(names, 1)]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ManifestError(f"{path} line 1: column names must differ, but {twice} appear more than once")
    if not has_rows:
        return pa.table({label: pa.array([], pa.string()) for label in labels})
    try:
        # Arrow reads ahead, and may still be at it when a row has failed. Were the descriptor Arrow's own, that read
        # would go to whatever file is given its number next; a Python file waits for it before it closes.
        packed = "gzip" if path.name.endswith(".gz") else None
        with _open_bytes(path) as source, pa.input_stream(source, compression=packed) as stream:
            table = arrow_csv.read_csv(
                stream,
                # A row must fit a block; radiology reports stand in single fields.
                read_options=arrow_csv.ReadOptions(column_names=labels, skip_rows_after_names=1, block_size=1 << 24),
                parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=arrow_csv.ConvertOptions(
                    column_types=dict.fromkeys(labels, pa.string()), strings_can_be_null=True, null_values=[""]
                ),
            )
    except (pa.ArrowInvalid, OSError) as error:
        _raise_first_fault(path, delimiter, len(names))
        # Arrow's text may quote the row, and a row may speak of a patient.
        raise ManifestError(
            f"{path} cannot be read as delimited text ({type(error).__name__}); is a row above 16 MiB?"
        ) from None
    # An unclosed quote swallows the rest of the file into the last row and is not an error for Arrow.
    if any(
        "\n" in (value or "") for row in table.slice(max(table.num_rows - 1, 0)).to_pylist() for value in row.values()
    ):
        _raise_first_fault(path, delimiter, len(names))
    blank = [label for label, name in zip(labels, names) if not name and table[label].null_count == table.num_rows]
    return table.drop_columns(blank) if blank else table


def _open_bytes(path: Path) -> io.BufferedReader:
    return path.open("rb")


def _open_text(path: Path) -> io.TextIOWrapper:
    binary = gzip.GzipFile(path) if path.name.endswith(".gz") else path.open("rb")
    return io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")


def _read_header(path: Path, delimiter: str) -> tuple[list[str], bool]:
    """Column names, and whether any line follows."""
    try:
        with _open_text(path) as text:
            reader = csv.reader(text, delimiter=delimiter)
            names, first = next(reader, []), next(reader, None)
    except FileNotFoundError:
        raise ManifestError(f"{path} does not exist") from None
    except UnicodeDecodeError:
        raise ManifestError(f"{path} is not UTF-8; convert it, for example with iconv") from None
    except (csv.Error, OSError, EOFError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from None
    # Some files (the box list of ChestX-ray14) end their header, but no other line, with extra commas.
    while first and len(first) < len(names) and not names[-1]:
        names.pop()
    return names, first is not None


def _raise_first_fault(path: Path, delimiter: str, width: int) -> None:
    """Raise for the first faulty line, found by a slow and exact second reading; return if there is none."""
    line = 0
    with _open_text(path) as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if row and len(row) != width:
                    first = line + 1
                    raise ManifestError(f"{path} line {first}: {len(row)} fields where the header names {width}")
                line = reader.line_num
        except UnicodeDecodeError:
            raise ManifestError(f"{path} is not UTF-8; convert it, for example with iconv") from None
        except csv.Error as error:
            raise ManifestError(f"{path} line {line + 1}: {error}; is a quote left open?") from None
        except (OSError, EOFError) as error:
            raise ManifestError(f"{path} is damaged after line {line} ({error}); copy or download it again") from None
