"""Finding the files of a release: tables by pattern, plain or compressed, and images by name wherever they lie."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featstore.datasets.walk import find_files
from featstore.errors import ManifestError

if TYPE_CHECKING:
    import pyarrow as pa


def find_table(root: Path, pattern: str) -> tuple[Path | None, list[str]]:
    """The last of the files `pattern`.csv and `pattern`.csv.gz by name, and a note on those that are not read.

    Releases number their versions, so the last name is the newest; of one version the plain file is taken.
    """
    names = sorted(path.name for suffix in (".csv", ".csv.gz") for path in root.glob(f"{pattern}{suffix}"))
    if not names:
        return None, []
    chosen = max(names, key=lambda name: (name.removesuffix(".gz"), not name.endswith(".gz")))
    others = [name for name in names if name != chosen]
    return root / chosen, [f"{chosen} is read, {', '.join(others)} is not"] if others else []


def need_table(root: Path, pattern: str, layout: str) -> tuple[Path, list[str]]:
    """As `find_table`.

    Raises:
        ManifestError: there is none; `layout` says what should be there.
    """
    path, notes = find_table(root, pattern)
    if path is None:
        raise ManifestError(f"{root} has no {pattern}.csv or {pattern}.csv.gz: {layout}")
    return path, notes


def named_column(table: "pa.Table", path: Path, name: str) -> "pa.ChunkedArray":
    """A column by name, whatever its case and with spaces or underscores.

    Raises:
        ManifestError: no such column.
    """
    wanted = name.casefold().replace("_", " ")
    for column in table.column_names:
        if column.strip().casefold().replace("_", " ") == wanted:
            return table[column]
    raise ManifestError(f"{path} lacks the column {name!r}; it names {table.column_names}")


def has_column(table: "pa.Table", name: str) -> bool:
    """Whether `named_column` finds it."""
    wanted = name.casefold().replace("_", " ")
    return any(column.strip().casefold().replace("_", " ") == wanted for column in table.column_names)


def locate(
    root: Path, names: Sequence[str], expected: Sequence[str], pattern: str, *, prefer: str = ""
) -> tuple[list[str], list[str]]:
    """Paths below `root` of files by name, found in one walk, and notes on what is absent or there twice.

    Of several files of one name (resized copies beside the originals) that at its `expected` path counts, else one
    whose whole path matches the regular expression `prefer`, else one whose path ends in the expected one; among
    equals the first in path order, which a note tells with both paths. A name that is nowhere gets its `expected`
    path, whose form `pattern` tells in the note.
    """
    wanted = set(names)
    found: dict[str, list[str]] = {}
    for path in find_files(root):
        name = path.rpartition("/")[2]
        if name in wanted:
            found.setdefault(name, []).append(path)
    chosen, unsure, example = [], set(), ""
    for name, place in zip(names, expected):
        several = found.get(name, [place])
        if len(several) > 1:
            ranks = [_rank(path, place, prefer) for path in several]
            best = [path for path, rank in zip(several, ranks) if rank == max(ranks)]
            if len(best) > 1:
                unsure.add(name)
                example = example or f"{best[0]} is taken, not {best[1]}"
            several = best
        chosen.append(several[0])
    absent, repeated = len(wanted) - len(found), sum(len(several) > 1 for several in found.values()) - len(unsure)
    notes = [f"{absent} images are not below the folder; their path is {pattern}"] if absent else []
    notes += [f"{repeated} images lie in other folders too; those of the documented layout are taken"] * (repeated > 0)
    if unsure:
        notes += [f"{len(unsure)} images lie in more than one folder; the first path is taken", f"such as {example}"]
    return chosen, notes


def _rank(path: str, expected: str, prefer: str) -> tuple[bool, bool, bool]:
    fits = bool(prefer) and re.fullmatch(prefer, path, re.IGNORECASE) is not None
    return path == expected, fits, path.endswith(f"/{expected}")
