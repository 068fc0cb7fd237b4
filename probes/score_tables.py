"""Scored samples of a record, or of a file that another tool wrote, in one form, and what two of them share."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

from featstore import files
from featstore.errors import TaskError, UnknownNameError
from featstore.objects import Place, parse_place
from probes.records import load_predictions
from probes.regression import NumberKind

FORMATS = (".csv", ".tsv", ".parquet")
# Prefixes of score columns in files of other tools; a bare label is a score too.
PREFIXES = ("score:", "prob_", "pred_")
OWN = ("id", "group", "split", "images", "label")
MISSING = ("", "nan", "NaN", "null", "None", "NA")


@dataclass(frozen=True)
class ScoreTable:
    """Scores of the samples of one split: (N, L), NaN where there is none.

    `y` and `mask` are (N, L), None in a file that has no truth. `classes` says that exactly one label holds a row,
    `numbers` that labels are targets: numbers, or ranks below `num_classes`; a file cannot say it.
    `columns` are further columns of the file. `record` is where they come from, None for a file.
    """

    name: str
    ids: tuple[str, ...]
    labels: tuple[str, ...]
    scores: np.ndarray
    y: np.ndarray | None
    mask: Bool[np.ndarray, "N L"] | None
    groups: Shaped[np.ndarray, " N"] | None
    classes: bool
    columns: dict[str, list[Any]]
    record: dict[str, Any] | None = None
    numbers: NumberKind | None = None
    num_classes: int = 0

    def of_labels(self) -> "ScoreTable":
        """The same with a truth of 0 and 1.

        Raises:
            TaskError: another value.
        """
        if self.y is None or self.mask is None:
            return self
        if not np.isin(self.y[self.mask], (0, 1)).all():
            found = np.unique(self.y[self.mask])[:5].tolist()
            raise TaskError(
                f"{self.name}: labels are 0, 1 or empty; found {found}; numbers are compared by --metric mae"
            )
        return replace(self, y=np.where(self.mask, self.y, 0).astype(np.int64))

    def rows(self, ids: tuple[str, ...], labels: tuple[str, ...]) -> "ScoreTable":
        """The same for some of the samples and labels, in the order given."""
        at = {name: number for number, name in enumerate(self.ids)}
        rows = np.array([at[name] for name in ids], np.int64)
        chosen = np.array([self.labels.index(label) for label in labels], np.int64)
        cells = np.ix_(rows, chosen)
        return replace(
            self,
            ids=ids,
            labels=labels,
            scores=self.scores[cells],
            y=None if self.y is None else self.y[cells],
            mask=None if self.mask is None else self.mask[cells],
            groups=None if self.groups is None else self.groups[rows],
            columns={name: [values[row] for row in rows] for name, values in self.columns.items()},
        )


def open_scores(name: str, folder: Place, *, split: str = "test") -> ScoreTable:
    """The scores of a record, by its id, the start of its id or its path, or of a CSV, TSV or Parquet file.

    A file has the columns `id`, a score for every label (`score:NAME`, `prob_NAME`, `pred_NAME` or `NAME`) and as far
    as it knows them `label:NAME` (0 or 1, or a number), `mask:NAME`, `group` (patient) and `split`; others are kept as
    columns.

    Raises:
        UnknownNameError: no such record or file. TaskError: the file cannot be read as scores.
    """
    record = record_of(name, folder)
    return read_file(parse_place(name), split=split) if record is None else of_record(record, split=split)


def record_of(name: str, folder: Place) -> dict[str, Any] | None:
    """The record of a name, None where it is a file of scores without one.

    Raises:
        UnknownNameError: no such record or file.
    """
    path = parse_place(name)
    if path.suffix not in FORMATS:
        return find_record(name, folder)
    if not path.is_file():
        raise UnknownNameError(f"no score file {name}; give a record of `probes results --json`, or an existing file")
    beside = path.with_suffix(".json")
    return find_record(str(beside), folder) if path.suffix == ".parquet" and beside.is_file() else None


def find_record(name: str, folder: Place) -> dict[str, Any]:
    """One record by its path, or by its id or the start of it in a folder.

    Raises:
        UnknownNameError: none, or several.
    """
    path = parse_place(name)
    if path.suffix != ".json":
        found = (
            [item for item in sorted(folder.glob("*.json")) if item.stem.startswith(name)] if folder.is_dir() else []
        )
        if len(found) != 1:
            what = f"{len(found)} records start" if found else "no record starts"
            raise UnknownNameError(
                f"{what} with {name!r} in {folder}; `probes results --json` prints their ids; or give the path of a "
                f"record or of a {', '.join(FORMATS)} file"
            )
        path = found[0]
    elif not path.is_file():
        raise UnknownNameError(f"no record {name}; `probes results --json` prints the ids of those there are")
    return {**files.unseal(path.read_bytes(), path), "file": str(path)}


def of_record(record: dict[str, Any], *, split: str = "test") -> ScoreTable:
    """The predictions of a record.

    Raises:
        TaskError: a few-shot curve, which keeps none, or no row of the split.
    """
    task = record["task"]
    if "curve" in record:
        raise TaskError(
            f"record {record['id']} is a few-shot curve, which keeps metrics of its heads instead of predictions; "
            "`probes compare` takes it beside another curve"
        )
    table = load_predictions(record).to_pydict()
    rows = _rows_of_split(table["split"], split, str(record["file"]))
    labels = tuple(task["labels"])
    numbers: NumberKind | None = task["kind"] if task["kind"] in ("regression", "ordinal") else None
    scores = np.array([table[f"score:{label}"] for label in labels], np.float64).T[rows]
    if task["kind"] == "multiclass":
        truth = [table["label"][row] for row in rows]
        y = np.array([[value == label for label in labels] for value in truth], np.int64)
        mask = np.ones(y.shape, dtype=bool)
    else:
        y = np.array([table[f"label:{label}"] for label in labels], np.float64).T[rows]
        mask = np.array([table[f"mask:{label}"] for label in labels], dtype=bool).T[rows]
        y = y if numbers else y.astype(np.int64)
    return ScoreTable(
        name=f"{record['probe']} on {record['set']} ({record['features']})",
        ids=tuple(str(table["id"][row]) for row in rows),
        labels=labels,
        scores=scores.reshape(len(rows), len(labels)),
        y=y.reshape(len(rows), len(labels)),
        mask=mask.reshape(len(rows), len(labels)),
        groups=np.array([str(table["group"][row]) for row in rows]),
        classes=task["kind"] == "multiclass",
        columns={},
        record=record,
        numbers=numbers,
        num_classes=len(task["spec"]["classes"]) if numbers == "ordinal" else 0,
    )


def read_file(path: Place, *, split: str = "test") -> ScoreTable:
    """Scores that another tool wrote; see `open_scores` for the columns.

    Raises:
        TaskError: no `id`, no scores, an id twice, or a cell that is no number.
    """
    table = _read_columns(path)
    if "id" not in table:
        raise TaskError(f"{path}: a score file names its samples in a column `id`; it has {', '.join(table)}")
    if split != "test" and "split" not in table:
        raise TaskError(f"{path} has no column `split`, so all its rows are test rows; add one that names {split} rows")
    rows = _rows_of_split(table["split"], split, str(path)) if "split" in table else np.arange(len(table["id"]))
    table = {name: [values[row] for row in rows] for name, values in table.items()}
    ids = tuple(str(value) for value in table["id"])
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise TaskError(f"{path}: sample {twice!r} has more than one row; keep one, or pool them first")
    columns = dict(_score_columns(table))
    if not columns:
        raise TaskError(
            f"{path}: no column of scores; name them score:LABEL, prob_LABEL or pred_LABEL; it has {', '.join(table)}"
        )
    labels = tuple(columns)
    scores = np.array([_numbers(table[columns[label]], columns[label], path) for label in labels]).T
    y, mask, classes = _truth(table, labels, path)
    known = {*OWN, *columns.values(), *(f"{kind}:{label}" for kind in ("label", "mask") for label in labels)}
    return ScoreTable(
        name=path.name,
        ids=ids,
        labels=labels,
        scores=scores,
        y=y,
        mask=mask,
        groups=np.array([str(value) for value in table["group"]]) if "group" in table else None,
        classes=classes,
        columns={name: values for name, values in table.items() if name not in known},
    )


def _truth(
    table: dict[str, list[Any]], labels: tuple[str, ...], path: Place
) -> tuple[np.ndarray | None, np.ndarray | None, bool]:
    if "label" in table:
        unknown = sorted({str(value) for value in table["label"]} - set(labels))
        if unknown:
            raise TaskError(f"{path}: the column `label` names {unknown[0]!r}, which has no column of scores")
        y = np.array([[str(value) == label for label in labels] for value in table["label"]], np.int64)
        return y, np.ones(y.shape, dtype=bool), True
    have = [f"label:{label}" in table for label in labels]
    if not any(have):
        return None, None, False
    nothing = np.full(len(table["id"]), np.nan)
    cells = np.array(
        [
            _numbers(table[f"label:{label}"], f"label:{label}", path) if given else nothing
            for label, given in zip(labels, have)
        ]
    ).T
    mask = ~np.isnan(cells)
    for column, label in enumerate(labels):
        if f"mask:{label}" in table:
            said = np.array(
                [str(value) in ("1", "1.0", "True", "true") for value in table[f"mask:{label}"]], dtype=bool
            )
            mask[:, column] &= said
    return np.where(mask, cells, 0), mask, False


def _score_columns(table: dict[str, list[Any]]) -> Iterator[tuple[str, str]]:
    """(label, column); bare names count only where no column has a prefix."""
    for prefix in PREFIXES:
        named = [name for name in table if name.startswith(prefix)]
        if named:
            yield from ((name.removeprefix(prefix), name) for name in named)
            return
    truths = [name.removeprefix("label:") for name in table if name.startswith("label:")]
    yield from ((name, name) for name in table if name in truths)


def _numbers(values: list[Any], name: str, path: Place) -> np.ndarray:
    """Numbers of a column, NaN for empty cells."""
    try:
        return np.array([np.nan if value is None or value in MISSING else float(value) for value in values])
    except (TypeError, ValueError) as error:
        raise TaskError(f"{path}: column {name!r} holds what is no number ({error})") from error


def _rows_of_split(splits: list[Any], split: str, where: str) -> np.ndarray:
    rows = np.flatnonzero(np.array([str(value) for value in splits], dtype=np.str_) == split)
    if not len(rows):
        known = ", ".join(sorted({str(value) for value in splits}))
        raise TaskError(f"{where}: no row of the split {split!r}; it has {known or 'no rows'}")
    return rows


def _read_columns(path: Place) -> dict[str, list[Any]]:
    data = path.read_bytes()
    if path.suffix == ".parquet":
        return dict(files.read_parquet(data).to_pydict())
    try:
        lines = list(
            csv.reader(io.StringIO(data.decode("utf-8-sig")), delimiter="\t" if path.suffix == ".tsv" else ",")
        )
    except (UnicodeDecodeError, csv.Error) as error:
        raise TaskError(f"{path}: not a table of text ({error})") from error
    header, body = (lines[0], [line for line in lines[1:] if line]) if lines else ([], [])
    short = next((number for number, line in enumerate(body, 2) if len(line) != len(header)), None)
    if short is not None:
        raise TaskError(f"{path}: row {short} has another number of cells than the header ({len(header)})")
    return {name: [line[number] for line in body] for number, name in enumerate(header)}
