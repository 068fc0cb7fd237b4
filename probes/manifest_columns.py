"""What the manifest says of the samples of a record: a column for every id of a score table."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from featstore.errors import TaskError
from featstore.store.catalog import Store
from probes.score_tables import ScoreTable
from probes.subgroups import AGE_BANDS, find_column, subgroup_rows


def parts(
    tables: Sequence[ScoreTable],
    ids: tuple[str, ...],
    columns: Sequence[str],
    store: Store,
    bands: Sequence[int] = AGE_BANDS,
) -> list[tuple[str, str, Bool[np.ndarray, " N"]]]:
    """(column, value, rows of `ids`) of every subgroup with a sample.

    A column is that of a score file, else of a record's manifest; a unit of images has a value where all of them agree.

    Raises:
        UnknownNameError: no such column. TaskError: too many values.
    """
    found = []
    for asked in columns:
        name, values = _column(tables, ids, asked, store)
        found += [(name, value, rows) for value, rows in subgroup_rows(name, values, bands=bands).items()]
    return found


def _column(tables: Sequence[ScoreTable], ids: tuple[str, ...], asked: str, store: Store) -> tuple[str, list[Any]]:
    names: list[str] = []
    for table in tables:
        if table.record is None:
            columns = dict(table.rows(ids, table.labels).columns)
        else:
            columns = _of_record(table.record, ids, asked, store)
        names += columns
        try:
            name = find_column(list(columns), asked)
        except LookupError:
            continue
        return name, columns[name]
    return find_column(names, asked), []


def _of_record(record: dict[str, Any], ids: tuple[str, ...], asked: str, store: Store) -> dict[str, list[Any]]:
    """The column asked for (or, where there is none, the names of all) for a record's test samples."""
    test = record.get("test", record)
    manifest = store.manifest(test["dataset"], test["manifest"])
    names = [name for name in manifest.table.column_names if name not in ("content", "mtime_ns")]
    try:
        name = find_column(names, asked)
    except LookupError:
        return {other: [] for other in names}
    unit = record["task"]["unit"]
    keys = (
        manifest.place("volume")
        if unit == "volume"
        else manifest.column({"image": "id", "study": "study", "patient": "group"}[unit])
    )
    values: dict[str, set[Any]] = {}
    for key, group, value in zip(keys, manifest.column("group"), manifest.column(name)):
        for text in (str(key), f"{group}/{key}"):  # ids that patients share carry the patient's
            values.setdefault(text, set()).add(value)
    if not any(key in values for key in ids):
        raise TaskError(f"the {unit}s of this record cannot be found in the manifest; subgroups need their rows")
    one = {key: next(iter(cells)) if len(cells) == 1 else None for key, cells in values.items()}
    return {name: [one.get(key) for key in ids]}
