"""Records: one JSON file a result, beside it its predictions; tables and comparisons work from these alone."""

import math
import uuid
from typing import Any

import numpy as np

from featstore import files
from featstore.errors import CorruptError, StoreError
from featstore.objects import Place, parse_place
from featstore.records import machine, utc_now, versions
from probes.tasks import Task

RECORD_SCHEMA = 1


def _plain(value: Any) -> Any:
    """JSON without NaN: numpy scalars and arrays become Python values, NaN becomes null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Place):
        return str(value)
    return value


def float_or_nan(value: Any) -> float:
    """A number of a record; JSON has no NaN, so null stands for it."""
    return float("nan") if value is None else float(value)


def save_record(folder: Place, record: dict[str, Any], predictions: dict[str, Any]) -> Place:
    """Write a record and its predictions (`<utc>-<uuid>.json` and `.parquet`); returns the JSON file.

    The predictions come first, so that a record never lacks them.

    Raises:
        StoreError: the folder cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = f"{utc_now().replace(':', '').replace('-', '')}-{uuid.uuid4().hex}"
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(predictions), sink, compression="zstd")
    body = {
        "schema": RECORD_SCHEMA,
        "id": name,
        "time": utc_now(),
        "versions": versions(),
        "machine": machine(),
        **record,
    }
    try:
        files.write_atomic(folder / f"{name}.parquet", sink.getvalue().to_pybytes())
        files.write_atomic(folder / f"{name}.json", files.sealed(_plain(body)))
    except OSError as error:
        raise StoreError(
            f"{folder}: records cannot be written here ({error.strerror or error}); pass --results FOLDER"
        ) from error
    return folder / f"{name}.json"


def load_records(folder: Place, **equal: Any) -> list[dict[str, Any]]:
    """All records of a folder in order of time, those whose top-level fields equal the given ones.

    Raises:
        CorruptError: a record does not match its digest.
    """
    found = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        record = files.unseal(path.read_bytes(), path)
        if all(record.get(key) == value for key, value in equal.items()):
            found.append({**record, "file": str(path)})
    # Times are whole seconds; of two records in one second the later one has seen its test split opened more often.
    return sorted(found, key=lambda record: (record["time"], record.get("test_opened", 0), record["id"]))


def load_records_at(path: Any) -> dict[str, Any]:
    """One record by its file."""
    return {**files.unseal(path.read_bytes(), path), "file": str(path)}


def load_predictions(record: dict[str, Any]) -> Any:
    """The predictions table (pyarrow) of a loaded record.

    Raises:
        CorruptError: the file is missing.
    """
    path = parse_place(record["file"]).with_suffix(".parquet")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CorruptError(f"{path}: the predictions of this record are missing") from error
    return files.read_parquet(data)


def prediction_columns(task: Task, scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """Id, group and split of every sample (or unit, then with its number of images), then label, mask and score of
    every label for validation and test."""
    columns: dict[str, list[Any]] = {"id": [], "group": [], "split": []}
    for split, values in scores.items():
        y, mask, groups, ids = task.truth(split)
        columns["id"] += ids
        columns["group"] += groups.tolist()
        columns["split"] += [split] * len(ids)
        if task.unit_ids is not None:
            columns.setdefault("images", []).extend(task.units(split).sizes.tolist())
        if task.kind == "multiclass":
            columns.setdefault("label", []).extend(task.labels[number] for number in y)
        for position, label in enumerate(task.labels):
            if task.kind != "multiclass":
                columns.setdefault(f"label:{label}", []).extend(y[:, position].tolist())
                columns.setdefault(f"mask:{label}", []).extend(mask[:, position].tolist())
            columns.setdefault(f"score:{label}", []).extend(values[:, position].tolist())
    return columns
